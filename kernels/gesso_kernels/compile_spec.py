"""What the compile gate needs to build one variant of a kernel without a device.

Every kernel file offers ``compile_specs() -> list[CompileSpec]``; the gate compiles each entry for
each of its architectures and checks the machine code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Compute capabilities that the kernels are written for.
ARCHS: Final = (80, 86, 89, 90, 100, 103, 120, 121)

# Triton's names of tensor arguments, by the last part of the torch dtype.
POINTERS: Final[Mapping[str, str]] = {
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "float8_e4m3fn": "*fp8e4nv",
    "int8": "*i8",
    "uint8": "*u8",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class CompileSpec:
    """One kernel with everything that is fixed at compile time.

    Attributes:
        name: unique name of the variant, for reports and test ids.
        kernel: the ``@triton.jit`` function.
        signature: Triton type of every argument that is not a constexpr: ``"*bf16"``, ``"i32"``.
        constexprs: value of every constexpr argument.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
        archs: compute capabilities to compile for, times ten: 90 for sm_90.
        expects: by architecture, text that the SASS must contain, for example ``{90: "IGMMA"}``.
        max_registers: most registers that one thread may use; None for no bound.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    archs: tuple[int, ...] = ARCHS
    expects: Mapping[int, str] | None = None
    max_registers: int | None = None
