"""Triton where it is installed; on other machines the kernel files still import, and run their
references.

    from gesso_kernels.triton_import import tl, triton

Without Triton, a launch says that it is missing.
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
        """Stands for ``triton``, ``triton.language`` and every kernel; any attribute is itself."""

        def __getattr__(self, name: str) -> Any:
            return self

        def jit(self, function: Any = None, **options: Any) -> Any:
            return self if function is not None else self.jit

        def __call__(self, *args: Any) -> Any:
            raise ModuleNotFoundError(
                "the kernels need Triton; install it with: pip install 'gesso[gpu]'"
            )

        __getitem__ = __call__

    triton = tl = _Missing()

__all__ = ["tl", "triton"]
