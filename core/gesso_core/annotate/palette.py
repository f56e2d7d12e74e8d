"""Colours to tell annotated things apart."""

import colorsys
from typing import Final

Colour = tuple[int, int, int]

GOLDEN: Final = 0.381966  # of the colour circle between neighbours: no two look alike


def colour_of(number: int, *, saturation: float = 0.8) -> Colour:
    """The RGB colour, 0..255, of the thing with this number."""
    r, g, b = colorsys.hsv_to_rgb(number * GOLDEN % 1, saturation, 1.0)
    return round(255 * r), round(255 * g), round(255 * b)
