"""Pictures in a labelled grid: one row per version of a model, one column per prompt."""

from collections.abc import Mapping, Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gesso_core.evaluate.sheet import to_images, wrapped

SCALE: Final = 2
GAP: Final = 4
LABEL_WIDTH: Final = 90
LINE: Final = 12
LINES: Final = 4


def picture_grid(rows: Mapping[str, Tensor], prompts: Sequence[str]) -> Image.Image:
    """Pictures (B, 3, H, W) in [-1, 1] per label, B = number of prompts; enlarged twofold."""
    height, width = next(iter(rows.values())).shape[-2:]
    cell_width, cell_height = SCALE * width + GAP, SCALE * height + GAP
    size = (LABEL_WIDTH + cell_width * len(prompts), LINES * LINE + GAP + cell_height * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, prompt in enumerate(prompts):
        x = LABEL_WIDTH + column * cell_width
        for number, line in enumerate(wrapped(prompt, cell_width - GAP, font)[:LINES]):
            pen.text((x, number * LINE), line, fill="black", font=font)
    for row, (label, pictures_BCHW) in enumerate(rows.items()):
        y = LINES * LINE + GAP + row * cell_height
        for number, line in enumerate(wrapped(label, LABEL_WIDTH - GAP, font)[:LINES]):
            pen.text((2, y + cell_height // 3 + number * LINE), line, fill="black", font=font)
        for column, picture in enumerate(to_images(pictures_BCHW)):
            enlarged = picture.resize((SCALE * width, SCALE * height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (LABEL_WIDTH + column * cell_width, y))
    return sheet
