"""What a run of the quantizer is asked for, checked before the hours of work and not after."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from torch import nn

from gesso_core.errors import InvalidRequest
from gesso_core.quant.layer_map import matrix_of
from gesso_core.quant.low_rank import Svd
from gesso_core.quant.record import WeightFormat

Format = Literal["int4", "nvfp4", "w8a8"]

FORMATS: Final[Mapping[Format, WeightFormat]] = {"int4": "int4", "nvfp4": "nvfp4", "w8a8": "int8"}
DEFAULT_RANK: Final = 32
MAX_RANK: Final = 1024
# With fewer rows than columns the system that GPTQ solves is singular; some rows are held out.
GPTQ_ROWS_PER_COLUMN: Final = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices of `quantize_model`, which has their meaning.

    Raises:
        InvalidRequest: a format or a rank that cannot be.
    """

    to: Format
    rank: int
    gptq: bool
    svd: Svd
    layers: str
    steps: int | None
    seed: int
    max_tokens: int

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise InvalidRequest(
                f"cannot quantize to {self.to!r}; use one of {', '.join(FORMATS)}", field="to"
            )
        if not 0 <= self.rank <= MAX_RANK:
            raise InvalidRequest(f"rank {self.rank} is not in 0..{MAX_RANK}", field="rank")

    def for_layers(
        self, model: nn.Module, names: Iterable[str], *, keep_tokens: bool
    ) -> "Settings":
        """The settings for these layers; GPTQ gets more rows, unless ``keep_tokens``.

        Raises:
            InvalidRequest: a layer has fewer rows or columns than the rank.
        """
        sizes = {name: matrix_of(model.get_submodule(name), name)[0].shape for name in names}
        narrow = min(sizes, key=lambda name: min(sizes[name]))
        if self.rank > min(sizes[narrow]):
            raise InvalidRequest(
                f"rank {self.rank} is more than the layer {narrow} of "
                f"{sizes[narrow][0]} x {sizes[narrow][1]} has; give at most {min(sizes[narrow])}",
                field="rank",
            )
        if not self.gptq or keep_tokens:
            return self
        rows = GPTQ_ROWS_PER_COLUMN * max(columns for _, columns in sizes.values())
        return replace(self, max_tokens=max(self.max_tokens, rows))


def require_writable(folder: Path) -> None:
    """Make the folder; raises `InvalidRequest` where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "no permission"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise InvalidRequest(
            f"{folder} cannot be a folder for the quantized model ({reason}); name a new folder, "
            "or that of an earlier run, where you may write",
            field="out_folder",
        )
