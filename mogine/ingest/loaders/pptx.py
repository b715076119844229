"""Slides: each is a page, its title a heading."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any

from mogine.ingest.loaders.archive import refuse_bombs
from mogine.ingest.loaders.parsed import PAGE_END, Parsed, heading, join, one_line, plain, title_of
from mogine.ingest.loaders.tables import render_rows

_MAX_SHAPES = 20_000


def load_pptx(data: bytes) -> Parsed:
    """A PPTX file: text, tables and the speaker's notes of every slide."""
    from pptx import Presentation

    refuse_bombs(data)
    presentation = Presentation(BytesIO(data))
    slides = [_slide(slide) for slide in presentation.slides]
    text = "".join(f"{slide}\n{PAGE_END}" for slide in slides)
    modified = presentation.core_properties.modified
    return Parsed(
        text if any(slide.strip("# \n") for slide in slides) else "",
        title=title_of(text),
        updated=modified.date().isoformat() if modified is not None else "",
    )


def _slide(slide: Any) -> str:
    title = slide.shapes.title
    name = one_line(title.text_frame.text) if title is not None else ""
    # The title is found as a shape again below, by another object of the same element.
    blocks = [heading(2, name)]
    blocks += [
        _shape(shape) for shape in _shapes(slide.shapes) if title is None or shape.shape_id != title.shape_id
    ]
    if slide.has_notes_slide and (notes := slide.notes_slide.notes_text_frame) is not None:
        blocks.append(plain(notes.text.replace("\v", "\n").strip()))
    return join(blocks)


def _shapes(shapes: Any) -> Iterator[Any]:
    """All shapes, those in groups too, from top to bottom as they were drawn."""
    stack = [iter(shapes)]
    for _ in range(_MAX_SHAPES):
        shape = next(stack[-1], None)
        if shape is None:
            stack.pop()
            if not stack:
                return
        elif hasattr(shape, "shapes"):
            stack.append(iter(shape.shapes))
        else:
            yield shape


def _shape(shape: Any) -> str:
    if getattr(shape, "has_table", False):
        return render_rows([[cell.text for cell in row.cells] for row in shape.table.rows], level=6)
    if not shape.has_text_frame:
        return ""
    lines = (paragraph.text.replace("\v", "\n").strip() for paragraph in shape.text_frame.paragraphs)
    return plain("\n".join(filter(None, lines)))
