"""``python -m gesso_core.evaluate.sheet``: pictures for people to look at.

Writes contact sheets of 64 prompts, and a sheet of reconstructions (above: the original sprite that
the autoencoder never saw, below: what it makes of it).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor

from gesso_core.evaluate.hart import draw_hart
from gesso_core.evaluate.run import SIZE, draw
from gesso_core.hub import load_dc_ae, resolve
from gesso_core.pipelines.hart_load import load_hart
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_core.train.compose import COLORS, composite, palette_colors, sprites_to_float

COLUMNS = 8
SCALE = 2
LINE = 11  # pixels per line of a caption
LINES = 3
PROMPTS = (
    "a car", "a dog", "a cat", "a house", "a tree", "a plane", "a pizza", "a rocket",
    "a red apple, 3D style, on a blue background",
    "a banana, flat style, on a purple background",
    "a strawberry, 3D style, on a teal background",
    "a watermelon, flat style, on a pink background",
    "a hamburger, 3D style, on a yellow background",
    "french fries, flat style, on a gray background",
    "a birthday cake, 3D style, on a green background",
    "an ice cream, flat style, on a brown background",
    "a lion, 3D style, on a green background",
    "an elephant, flat style, on an orange background",
    "a penguin, 3D style, on a red background",
    "a turtle, flat style, on a yellow background",
    "an octopus, 3D style, on a black background",
    "a butterfly, flat style, on a white background",
    "an owl, 3D style, on a pink background",
    "a fox, flat style, on a teal background",
    "a bus", "a bike", "a train", "a boat", "a truck", "a helicopter", "a tractor", "a taxi",
    "a sunflower", "a rose", "a cactus", "a mushroom",
    "a palm tree", "a rainbow", "the sun", "a fire",
    "a guitar", "a violin", "a drum", "a trumpet", "a camera", "a laptop", "a phone", "a TV",
    "a key", "a hammer", "a book", "a pencil", "a chair", "a bed", "a lamp", "a gift",
    "a castle", "a mountain", "a robot", "a ghost", "a smiley", "a heart", "a crown", "a spaceship",
)  # fmt: skip


def contact_sheet(pictures_BCHW: Tensor, captions: Sequence[str]) -> Image.Image:
    """Pictures in [-1, 1] as a grid of eight columns, enlarged, with captions below."""
    side = SIZE * SCALE
    cell = side + LINES * LINE + 4
    rows = -(-len(captions) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (side + 4), rows * cell), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, (picture, caption) in enumerate(zip(to_images(pictures_BCHW), captions, strict=True)):
        x, y = i % COLUMNS * (side + 4) + 2, i // COLUMNS * cell
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(wrapped(caption, side, font)[:LINES]):
            pen.text((x, y + side + number * LINE), line, fill="black", font=font)
    return sheet


def reconstruction_sheet(folder: Path) -> Image.Image:
    """Held-out sprites above their reconstructions, twelve pairs in a row."""
    pixels = load_file(folder / "held_out_sprites.safetensors")["pixels"][:36]
    colors = palette_colors(torch.arange(len(pixels)) % len(COLORS))
    pictures = composite(sprites_to_float(pixels), colors)
    with torch.no_grad():
        decoded = load_dc_ae(folder)(pictures).clamp(-1, 1)
    pairs = torch.cat([pictures, decoded], dim=2)  # one below the other
    rows = [torch.cat(list(row), dim=2) for row in torch.split(pairs, 12)]
    (image,) = to_images(torch.cat(rows, dim=1)[None])
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)


def to_images(pictures_BCHW: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) in [-1, 1]."""
    scaled = ((pictures_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(np.asarray(p.permute(1, 2, 0))) for p in scaled]


def wrapped(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines of at most ``width`` pixels, if its words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Write the sheets as PNG."""
    parser = argparse.ArgumentParser(
        prog="python -m gesso_core.evaluate.sheet", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = draw(TextToImage.load("sana-tiny"), PROMPTS, options.seed)
    contact_sheet(pictures, PROMPTS).save(options.out / "contact_sheet.png", optimize=True)
    hart = load_hart("hart-tiny")
    pictures = draw_hart(hart, load_dc_ae(resolve(hart.autoencoder)), PROMPTS, options.seed)
    contact_sheet(pictures, PROMPTS).save(options.out / "hart_sheet.png", optimize=True)
    sheet = reconstruction_sheet(resolve("dcae-tiny"))
    sheet.save(options.out / "reconstructions.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
