"""Real files of every kind, made by the libraries that write them."""

import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import openpyxl
from docx import Document
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fpdf import FPDF
from pptx import Presentation
from pptx.util import Inches
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.pdfgen.canvas import Canvas

SENTENCE = "自收到商品之日起七天内可以申请退款，运费由本公司承担，三个工作日内到账。"


def saved(save: Callable[[BytesIO], object]) -> bytes:
    """What a library writes into a file."""
    file = BytesIO()
    save(file)
    return file.getvalue()


def docx(*blocks: tuple[str, str] | Sequence[Sequence[str]]) -> bytes:
    """A Word file of (style, text) and of tables (rows of cells)."""
    document = Document()
    for block in blocks:
        if isinstance(block, tuple) and isinstance(block[0], str):
            document.add_paragraph(str(block[1]), style=block[0])
        else:
            table = document.add_table(rows=0, cols=len(block[0]))
            for row in block:
                for cell, text in zip(table.add_row().cells, row, strict=True):
                    cell.text = text
    return saved(document.save)


def xlsx(sheets: Mapping[str, Sequence[Sequence[object]]], formats: Mapping[str, str] | None = None) -> bytes:
    """A workbook; `formats` maps cells of the first sheet to number formats."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(list(row))
    for cell, number_format in (formats or {}).items():
        book.worksheets[0][cell].number_format = number_format
    return saved(book.save)


def pptx(*slides: tuple[str, str, str]) -> bytes:
    """Slides of (title, text, notes)."""
    presentation = Presentation()
    for title, text, notes in slides:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1 if title else 6])
        if title:
            slide.shapes.title.text = title
            slide.placeholders[1].text = text
        else:
            slide.shapes.add_textbox(0, 0, Inches(3), Inches(1)).text_frame.text = text
        if notes:
            slide.notes_slide.notes_text_frame.text = notes
    return saved(presentation.save)


def pdf(pages: Sequence[Sequence[tuple[str, float]]], *, password: str = "", title: str = "") -> bytes:
    """Pages of (line, type size). The Chinese font is named, not embedded."""
    pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
    file = BytesIO()
    canvas = Canvas(file, encrypt=password or None, invariant=True)
    canvas.setTitle(title)
    for lines in pages:
        y = 800.0
        for text, size in lines:
            canvas.setFont("STSong-Light", size)
            canvas.drawString(50, y, text)
            y -= size * 1.5
        canvas.showPage()
    canvas.save()
    return file.getvalue()


def scan(pages: int = 2) -> bytes:
    """A PDF with drawings and no text, as a scanner makes it."""
    file = BytesIO()
    canvas = Canvas(file)
    for _ in range(pages):
        canvas.rect(50, 50, 400, 600, fill=1)
        canvas.showPage()
    canvas.save()
    return file.getvalue()


def pdf_with_embedded_font(text: str, font_path: Path) -> bytes:
    """A PDF with an embedded font, whose characters are numbers of its glyphs (Identity-H)."""
    font_path.write_bytes(font_of(text))
    document = FPDF()
    document.add_page()
    document.add_font("made", fname=str(font_path))
    document.set_font("made", size=12)
    document.multi_cell(0, 8, text)
    return bytes(document.output())


@lru_cache
def font_of(text: str) -> bytes:
    """A TrueType font with a square for every character."""
    characters = sorted({*text, " "} - {"\n"})
    names = [".notdef", *(f"g{index}" for index in range(len(characters)))]
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 700), (900, 700), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"g{index}" for index, c in enumerate(characters)})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    return saved(builder.save)


def zipped(parts: Mapping[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def with_part(office: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """An Office file with one of its parts changed."""
    with zipfile.ZipFile(BytesIO(office)) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    return zipped({**parts, name: change(parts.get(name, b""))})


def encrypted_office() -> bytes:
    """The beginning of an Office file with a password: an OLE container that names its packed content."""
    return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + struct.pack("<504x") + "EncryptedPackage".encode("utf-16-le")
