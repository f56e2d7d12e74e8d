"""How much memory a DC-AE needs, and how much there is.

The estimate counts the activations that are alive at once in the hungriest stage. Its two factors
were measured on the published f32 configurations at 512 px (peak resident size minus weights): the
plain model took 0.61 to 0.87 of the estimate, whatever the number format, because norms and
attention compute in fp32 for 16-bit models as well; the fused model took less.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from gesso_core.models.dc_ae_config import Stage

# Activations of a stage's width that are alive at once: input, two convolutions, norm, resampling.
_ALIVE_RESIDUAL = 6
# Attention keeps q, k and v in fp32; the gated bottleneck is eight times as wide as its input.
_ALIVE_EFFICIENT_VIT = 36


def activation_bytes_per_pixel(stages: Sequence[Stage]) -> float:
    """Peak of the activations of one side of the autoencoder, per image pixel, in bytes."""
    alive = {"ResBlock": _ALIVE_RESIDUAL, "EfficientViTBlock": _ALIVE_EFFICIENT_VIT}
    elements = [
        alive[stage.block] * stage.width * 0.25**index
        for index, stage in enumerate(stages)
        if stage.depth
    ]
    return float(max(elements)) * torch.float32.itemsize


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return _smallest(_available_in_system(), _available_in_container())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; the allocator of the CPU raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _smallest(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def _available_in_system(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _available_in_container(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Headroom below the limit of a version 2 control group, page cache counted as free."""
    limit, used, detail = (group / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.exists() and used.exists() and detail.exists()):
        return None
    if (text := limit.read_text().strip()) == "max":
        return None
    cache = dict(line.split() for line in detail.read_text().splitlines()).get("inactive_file", 0)
    return max(0, int(text) - int(used.read_text()) + int(cache))
