"""Which arithmetic a quantized layer runs in: by architecture, file, tokens and memory.

Only `choose_mode` decides; layers and services pass on what it returns and report it.
"""

# arch: compute capability, (9, 0) for sm_90; None is a CPU

from typing import Final, Literal

from gesso_kernels.errors import UnsupportedMode

Mode = Literal[
    "reference",
    "dequantized",
    "w4a16",
    "w4a4_i8dot",
    "w8a8_int8",
    "w8a8_fp8",
    "w4a8_prog",
    "nvfp4",
]
WeightFormat = Literal["int4", "nvfp4", "int8"]
Budget = Literal["4bit", "8bit"]
Arch = tuple[int, int]

MODES: Final[dict[Mode, str]] = {
    "reference": "plain torch in the exact arithmetic of the file; on every device",
    "dequantized": "weights and branch merged into one 16- or 32-bit matrix; on every device",
    "w4a16": "4-bit weights, 16-bit inputs; for few tokens, where reading weights is the cost",
    "w4a4_i8dot": "4-bit weights and inputs, multiplied as int8, rescaled per group of 64",
    "w8a8_int8": "weights expanded to int8 rows, int8 inputs; twice the memory of 4 bit",
    "w8a8_fp8": "weights expanded to e4m3 rows, e4m3 inputs; twice the memory of 4 bit",
    "w4a8_prog": "4-bit weights times int8 group multipliers, int8 inputs",
    "nvfp4": "e2m1 weights and inputs with block scales in the tensor core",
}
# Up to here reading the weights costs more than multiplying.
SMALL_TOKENS: Final = 64

_TRITON: Final = (8, 0)
_FP8: Final = (8, 9)
_HOPPER: Final = (9, 0)
_NVFP4: Final = (10, 0)
_NO_INT8_UNIT: Final = (10, 3)  # its int8 product is the slow one of Ampere
_AFTER_DATACENTER_BLACKWELL: Final = (12, 0)


def possible_modes(weight: WeightFormat, arch: Arch | None) -> tuple[Mode, ...]:
    """The modes that a file of this format can run in on this architecture."""
    found: list[Mode] = ["reference", "dequantized"]
    if arch is None or arch < _TRITON:
        return tuple(found)
    if weight == "int8":
        found.append("w8a8_int8")
    if weight == "int4":
        found += ["w4a16", "w4a4_i8dot", "w8a8_int8", "w4a8_prog"]
    if weight == "nvfp4":
        found.append("w4a16")
    if weight != "int8" and arch >= _FP8:
        found.append("w8a8_fp8")
    if weight == "nvfp4" and arch >= _NVFP4:
        found.append("nvfp4")
    return tuple(found)


def choose_mode(
    weight: WeightFormat,
    *,
    arch: Arch | None,
    tokens: int,
    budget: Budget = "8bit",
    wanted: Mode | None = None,
) -> Mode:
    """The mode of a layer.

    Args:
        weight: number format of the file's weights.
        arch: compute capability of the device; None for a CPU.
        tokens: rows of the layer's usual input, M.
        budget: ``"4bit"`` keeps the weights in 4 bits in memory; ``"8bit"`` may expand them.
        wanted: overrides the choice.

    Raises:
        UnsupportedMode: ``wanted`` is impossible here; names the best mode.
    """
    best = _best_mode(weight, arch, tokens, budget)
    if wanted is None:
        return best
    if wanted not in MODES:
        raise UnsupportedMode(f"unknown mode {wanted!r}; modes: {', '.join(MODES)}")
    possible = possible_modes(weight, arch)
    if wanted not in possible:
        device = "a CPU" if arch is None else f"sm_{arch[0]}{arch[1]}"
        raise UnsupportedMode(
            f"the mode {wanted} cannot run {weight} weights on {device}; the best mode there is "
            f"{best}, possible are {', '.join(possible)}"
        )
    return wanted


def _best_mode(weight: WeightFormat, arch: Arch | None, tokens: int, budget: Budget) -> Mode:
    if arch is None or arch < _TRITON:
        return "dequantized"
    if weight == "int8":
        return "w8a8_int8"
    if weight == "nvfp4":
        return _best_for_nvfp4(arch, tokens, budget)
    return _best_for_int4(arch, tokens, budget)


def _best_for_nvfp4(arch: Arch, tokens: int, budget: Budget) -> Mode:
    if arch >= _NVFP4:
        return "nvfp4"
    if arch < _FP8 or tokens <= SMALL_TOKENS or budget == "4bit":
        return "w4a16"
    return "w8a8_fp8"


def _best_for_int4(arch: Arch, tokens: int, budget: Budget) -> Mode:
    if tokens <= SMALL_TOKENS:
        return "w4a16"
    slow_int8 = _NO_INT8_UNIT <= arch < _AFTER_DATACENTER_BLACKWELL
    if budget == "8bit":
        return "w8a8_fp8" if slow_int8 else "w8a8_int8"
    if slow_int8:
        return "w4a16"
    # The rescaling per group of 64 costs what int8 gains where the tensor core is fast.
    fast = _HOPPER <= arch < _AFTER_DATACENTER_BLACKWELL
    return "w4a8_prog" if fast else "w4a4_i8dot"
