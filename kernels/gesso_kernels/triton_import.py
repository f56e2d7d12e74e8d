"""Triton where it is installed; on other machines the kernel files still import, and run their
references.

    from gesso_kernels.triton_import import tl, triton

Without Triton, ``@triton.jit`` gives an object that says so when it is launched.
"""

import os
from typing import Any

# Multiplications keep their own rounding: the quantizers must give the codes of their references,
# and `rne` in the quantizing kernels would not survive a fused multiply-add.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Missing:
        """Stands for the modules ``triton`` and ``triton.language``; any attribute is itself."""

        def __getattr__(self, name: str) -> Any:
            return self

        def jit(self, function: Any) -> Any:
            return _Unlaunchable(function.__name__)

    class _Unlaunchable:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            raise ModuleNotFoundError(
                f"the kernel {self.name} needs Triton; install it with: pip install 'gesso[gpu]'"
            )

    triton = tl = _Missing()

__all__ = ["tl", "triton"]
