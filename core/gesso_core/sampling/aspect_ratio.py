"""From the size a person asks for to a size the model knows, and back.

Each model was trained on a table of sizes of about equal area. A picture is generated at the size
of the table whose ratio is closest, then scaled to cover the wanted size, and cropped around its
centre.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import torch.nn.functional as F
from torch import Tensor

from gesso_core.errors import ConfigError, InvalidRequest

AspectTable = Mapping[
    float, tuple[int, int]
]  # height / width, as printed in the table → (height, width) in pixels


@cache
def aspect_table(base: int) -> AspectTable:
    """The sizes of models with a base size of 64, 128, 512, 1024, 2048 or 4096 pixels.

    Raises:
        ConfigError: no table for that size.
    """
    tables = json.loads((files("gesso_core.sampling") / "aspect_ratio_bins.json").read_text())
    if str(base) not in tables:
        raise ConfigError(f"no sizes are known for base {base}; there are {', '.join(tables)}")
    return {float(ratio): (size[0], size[1]) for ratio, size in tables[str(base)].items()}


def bin_for(height: int, width: int, table: AspectTable) -> tuple[int, int]:
    """The (height, width) of the table whose ratio is closest to the wanted one.

    Raises:
        InvalidRequest: a side that is not positive.
    """
    _check_size(height, width)
    ratio = height / width
    return table[min(table, key=lambda known: abs(known - ratio))]


def resize_and_crop(image_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Scale an image so that it covers the wanted size, then crop the centre, to that very size.

    Bilinear, without antialiasing. The scaled size is rounded up, in whole numbers, so no pixel can
    be missing.

    Raises:
        InvalidRequest: a side that is not positive.
    """
    _check_size(height, width)
    given_height, given_width = image_BCHW.shape[-2:]
    if (given_height, given_width) == (height, width):
        return image_BCHW
    if height * given_width >= width * given_height:  # the height decides the scale
        scaled = (height, -(-given_width * height // given_height))
    else:
        scaled = (-(-given_height * width // given_width), width)
    resized = F.interpolate(image_BCHW, size=scaled, mode="bilinear", align_corners=False)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return resized[..., top : top + height, left : left + width]


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise InvalidRequest(
            f"a picture of {width}x{height} pixels cannot be made; both sides must be positive"
        )
