"""Spreadsheets: each sheet is a table with its header row, numbers as a person reads them."""

import datetime
import re
from io import BytesIO
from typing import Any

from mogine.errors import UnreadableDocument
from mogine.ingest.loaders.archive import refuse_bombs
from mogine.ingest.loaders.parsed import Parsed, heading, join
from mogine.ingest.loaders.tables import render_rows

MAX_CELLS = 2_000_000
_DEFAULT_NAME = re.compile(r"(sheet|工作表|工作簿)\s*[0-9]*$", re.IGNORECASE)
_DECIMALS = re.compile(r"\.(0+)")


def load_xlsx(data: bytes) -> Parsed:
    """An XLSX file. Formulas count with the value that was saved with them; hidden sheets are left out."""
    from openpyxl import load_workbook

    refuse_bombs(data)
    workbook = load_workbook(BytesIO(data), read_only=True, data_only=True, keep_links=False)
    blocks: list[str] = []
    sheets = [sheet for sheet in workbook.worksheets if sheet.sheet_state == "visible"]
    cells = 0
    for sheet in sheets:
        # The size that a sheet states may be a million rows of nothing, or too small.
        sheet.reset_dimensions()
        rows: list[list[str]] = []
        for row in sheet.iter_rows():
            shown = [_shown(cell) for cell in row]
            if any(shown):
                rows.append(shown)
                cells += len(shown)
            if cells > MAX_CELLS:
                raise UnreadableDocument(
                    f"holds more than {MAX_CELLS:,} cells; export the sheets that matter as CSV"
                )
        body = render_rows(rows, level=3)
        if body:
            named = len(sheets) > 1 or not _DEFAULT_NAME.match(sheet.title)
            blocks += [heading(2, sheet.title) if named else "", body]
    modified = workbook.properties.modified
    workbook.close()
    return Parsed(join(blocks), updated=modified.date().isoformat() if modified is not None else "")


def _shown(cell: Any) -> str:
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, datetime.datetime):
        return (
            value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ", "minutes")
        )
    if isinstance(value, int | float):
        return _number(value, cell.number_format or "General")
    return str(value)


def _number(value: float, shape: str) -> str:
    """Percentages and the number of decimals are part of what a cell says; 0.15 is not 15%."""
    first = shape.split(";")[0]
    decimals = len(match[1]) if (match := _DECIMALS.search(first)) else None
    if "%" in first:
        return f"{value * 100:.{decimals or 0}f}%"
    if decimals is not None and first.strip('0#,.¥￥$€ _()"-') == "":
        return f"{value:.{decimals}f}"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.12g}"
