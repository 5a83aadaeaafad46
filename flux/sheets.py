"""Pictures and texts in rows and columns, drawn as one picture: contact sheets, grids of samples."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Cell = Image.Image | str  # a picture, or a text that is wrapped to its column's width
Row = str | Sequence[Cell]  # one text across the whole table, or a cell for each of the first columns

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONT_SIZE, LINE_HEIGHT, MARGIN = 12, 15, 8  # pixels
MOST_LINES = 12  # of a text; what is left of it is cut off


def table(rows: Sequence[Row], least_width: int = 96) -> np.ndarray:
    """The table on white, (H, W, 3), uint8. least_width: of a column, in pixels; pictures make it wider."""
    font = ImageFont.load_default(FONT_SIZE)
    widths = _widths(rows, least_width)
    whole = sum(widths) + MARGIN * (len(widths) - 1)
    drawn = [
        [_wrapped(row, whole, font)]
        if isinstance(row, str)
        else [_wrapped(c, w, font) if isinstance(c, str) else c for c, w in zip(row, widths, strict=False)]
        for row in rows
    ]
    heights = [max((_height(cell) for cell in row), default=0) for row in drawn]
    size = (whole + 2 * MARGIN, sum(heights) + MARGIN * (len(rows) + 1))
    sheet = Image.new("RGB", size, "white")
    pen, top = ImageDraw.Draw(sheet), MARGIN
    for row, height in zip(drawn, heights, strict=True):
        left = MARGIN
        for cell, width in zip(row, widths, strict=False):
            if isinstance(cell, Image.Image):
                sheet.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
            else:
                for number, line in enumerate(cell):
                    pen.text((left, top + number * LINE_HEIGHT), line, "black", font)
            left += width + MARGIN
        top += height + MARGIN
    return np.array(sheet)


def _widths(rows: Sequence[Row], least: int) -> list[int]:
    cells = [row for row in rows if not isinstance(row, str)]
    widths = [least] * max((len(row) for row in cells), default=1)
    for row in cells:
        for i, cell in enumerate(row):
            widths[i] = max(widths[i], cell.width if isinstance(cell, Image.Image) else 0)
    return widths


def _height(cell: Image.Image | list[str]) -> int:
    return cell.height if isinstance(cell, Image.Image) else LINE_HEIGHT * len(cell)


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces where that can be."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".lstrip()
            if font.getlength(longer) <= width:
                line = longer
                continue
            lines += [line] if line else []
            line = word
            while font.getlength(line) > width:  # a word wider than the column
                fitting = next(
                    n for n in range(len(line), 0, -1) if n == 1 or font.getlength(line[:n]) <= width
                )
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line)
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + " …"]
