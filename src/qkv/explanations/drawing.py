"""Figures for papers: shapes, placed once, written as SVG or as PNG. Sizes are in pixels, on white.

Letters are of one width, so that both formats, and every machine, place them alike.

Legend: R rows and C columns of pixels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from html import escape
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from qkv.errors import InputError
from qkv.report.pictures import png

Colour = tuple[int, int, int]
INK: Colour = (29, 34, 48)
SOFT: Colour = (91, 98, 117)
PALE: Colour = (168, 172, 184)
COOL: Colour = (53, 82, 196)
WARM: Colour = (194, 87, 26)

SIZE = 13
"""Height of letters."""
_LETTER = 0.602 * SIZE
_FONTS = (
    "DejaVuSansMono.ttf",
    "NotoSansMono-Regular.ttf",
    "NotoSansMonoCJK-Regular.ttc",
    "Menlo.ttc",
    "consola.ttf",
)
"""Fonts of the usual systems, each letter as wide as `_LETTER` or twice as wide."""


@dataclass(frozen=True)
class Box:
    """A rectangle, filled, or only outlined."""

    x: float
    y: float
    width: float
    height: float
    colour: Colour
    outlined: bool = False


@dataclass(frozen=True)
class Label:
    """One line of text; (x, y): where its middle line starts, or ends; upward: turned to the left."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "end"] = "start"
    upward: bool = False
    colour: Colour = INK


@dataclass(frozen=True)
class Pixels:
    """An image, each of its pixels a square of `zoom` x `zoom`."""

    x: float
    y: float
    values: NDArray[np.uint8]
    """(R, C, 3)."""
    zoom: int


@dataclass
class Drawing:
    """Shapes, the later ones over the earlier ones."""

    width: float = 0.0
    height: float = 0.0
    shapes: list[Box | Label | Pixels] = field(default_factory=list)

    def add(self, shapes: Iterable[Box | Label | Pixels]) -> None:
        """Put shapes on top."""
        self.shapes.extend(shapes)

    def svg(self) -> str:
        """The drawing as a file of its own, which loads nothing."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" font-size="{SIZE}" '
            "font-family=\"ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace\">"
            f'<rect width="100%" height="100%" fill="#fff"/>{"".join(map(_svg, self.shapes))}</svg>\n'
        )

    def png(self, scale: int = 2) -> bytes:
        """The drawing as an image file, a pixel of it `scale` pixels wide.

        Raises InputError for letters that no font of this machine has.
        """
        image = Image.new("RGB", (round(scale * self.width), round(scale * self.height)), "white")
        for shape in self.shapes:
            _paint(image, shape, scale)
        file = BytesIO()
        image.save(file, "PNG", optimize=True)
        return file.getvalue()


def width_of(text: str) -> float:
    """Of a line of text, in pixels: wide letters, as of Chinese, count twice, accents nothing."""
    letters = sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )
    return _LETTER * max(letters, bool(text))


def tinted(colour: Colour, share: float) -> Colour:
    """A colour on white, by its share from 0 to 1."""
    red, green, blue = (round(255 - (255 - part) * share) for part in colour)
    return red, green, blue


def _svg(shape: Box | Label | Pixels) -> str:
    match shape:
        case Box():
            look = f'fill="none" stroke="{_hex(shape.colour)}" stroke-width="2"'
            look = look if shape.outlined else f'fill="{_hex(shape.colour)}"'
            place = f'x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" height="{shape.height:g}"'
            return f"<rect {place} {look}/>"
        case Label():
            turned = " rotate(-90)" if shape.upward else ""
            return (
                f'<text transform="translate({shape.x:g} {shape.y:g}){turned}" text-anchor="{shape.anchor}" '
                f'dominant-baseline="central" textLength="{width_of(shape.text):g}" xml:space="preserve" '
                f'lengthAdjust="spacingAndGlyphs" fill="{_hex(shape.colour)}">{escape(shape.text)}</text>'
            )
        case Pixels():
            rows, columns, _ = shape.values.shape
            return (
                f'<image x="{shape.x:g}" y="{shape.y:g}" width="{columns * shape.zoom}" '
                f'height="{rows * shape.zoom}" style="image-rendering:pixelated" href="{png(shape.values)}"/>'
            )


def _paint(image: Image.Image, shape: Box | Label | Pixels, scale: int) -> None:
    x, y = round(scale * shape.x), round(scale * shape.y)
    match shape:
        case Box():
            end = (round(scale * (shape.x + shape.width)) - 1, round(scale * (shape.y + shape.height)) - 1)
            draw = ImageDraw.Draw(image)
            if shape.outlined:
                draw.rectangle((x, y, *end), outline=shape.colour, width=2 * scale)
            else:
                draw.rectangle((x, y, *end), fill=shape.colour)
        case Label():
            font = _font(shape.text, SIZE * scale)
            size = (round(scale * width_of(shape.text)) + 2, 2 * SIZE * scale)
            mask = Image.new("L", size, 0)
            ImageDraw.Draw(mask).text((0, size[1] // 2), shape.text, 255, font, anchor="lm")
            if shape.upward:
                mask = mask.rotate(90, expand=True)
                corner = (x - size[1] // 2, y if shape.anchor == "end" else y - size[0])
            else:
                corner = (x - size[0] if shape.anchor == "end" else x, y - size[1] // 2)
            image.paste(shape.colour, corner, mask)
        case Pixels():
            rows, columns, _ = shape.values.shape
            side = shape.zoom * scale
            picture = Image.fromarray(shape.values).resize(
                (columns * side, rows * side), Image.Resampling.NEAREST
            )
            image.paste(picture, (x, y))


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that has all letters of a text. Raises InputError if there is none."""
    missing = text
    for name in _FONTS:
        if (font := _load(name, size)) is None:
            continue
        blank = bytes(font.getmask("\U0010ffff"))  # what stands for a letter that a font lacks
        lacks = "".join(
            letter for letter in text if not letter.isspace() and bytes(font.getmask(letter)) == blank
        )
        if not lacks:
            return font
        missing = min(missing, lacks, key=len)
    raise InputError(
        f"no font here has all letters of “{text}” (“{missing}”): save the figure as .svg, or install "
        "DejaVu Sans Mono or Noto Sans Mono"
    )


@cache
def _load(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None
