"""Rounding, float encoding and activations inside the Triton kernels, on every tie."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gesso_kernels import triton_import
from gesso_kernels.device_functions import (
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
    gelu_tanh,
    rne,
    silu,
)
from gesso_kernels.number_formats import e2m1_codes, to_e4m3
from gesso_kernels.triton_import import tl, triton
from torch import Tensor

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@triton.jit
def _apply(x, y, N, FUNCTION: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, 1024)
    for start in range(0, N, 1024):
        value = tl.load(x + start + place, start + place < N, other=0.0)
        tl.store(y + start + place, FUNCTION(value).to(y.dtype.element_ty), start + place < N)


@triton.jit
def _e2m1_of_thirds(x):  # type: ignore[no-untyped-def]
    return e2m1_encode(x, 0.375)


@triton.jit
def _e4m3_and_back(x):  # type: ignore[no-untyped-def]
    return e4m3_decode(e4m3_encode(tl.abs(x)))


def apply(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    _apply[(1,)](x, y, x.numel(), FUNCTION=function)
    return y


def around(points: Tensor) -> Tensor:
    """The points, their neighbours in fp32, and all of it negative."""
    up, down = (torch.nextafter(points, torch.tensor(end)) for end in (1e30, -1e30))
    return torch.cat([points, up, down, -points, -up, -down, normal(2000) * 4])


@interpreted
def test_rounding_is_to_even_on_every_tie() -> None:
    x = around(torch.cat([torch.arange(0, 600) / 2, torch.tensor([2.0**21 - 0.5, 2.0**21 + 1.5])]))
    # Reassociated to x + (c − c) this would return x cut off; rounded up it fails on 0.5 and 2.5.
    assert torch.equal(apply(rne, x, torch.int32), x.round().int())


@interpreted
def test_float_codes_are_those_of_the_number_formats() -> None:
    ties = around(torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7, 100]))
    assert torch.equal(apply(_e2m1_of_thirds, ties * 0.375, torch.uint8), e2m1_codes(ties))
    every = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = around(torch.cat([every, (every[1:] + every[:-1]) / 2, torch.tensor([500.0, 1e9])]))
    assert torch.equal(apply(e4m3_encode, x, torch.uint8), to_e4m3(x).view(torch.uint8))
    assert torch.equal(apply(_e4m3_and_back, x, torch.float32), to_e4m3(x.abs()).float())


@interpreted
def test_activations_of_the_epilogues_match_torch() -> None:
    x = torch.cat([normal(500) * 5, torch.tensor([0.0, -200.0, 200.0, -1e4, 1e4])])
    for function, expected in (
        (silu, torch.nn.functional.silu(x)),
        (gelu_tanh, torch.nn.functional.gelu(x, approximate="tanh")),
    ):
        torch.testing.assert_close(
            apply(function, x, torch.float32), expected, rtol=1e-5, atol=1e-6
        )


COMPILE = """
from gesso_kernels.quant_down import compile_specs
from gesso_kernels.triton_import import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = next(spec for spec in compile_specs() if spec.name == "quant_down-int4-r0")
names = spec.kernel.arg_names
signature = {name: spec.signature.get(name, "constexpr") for name in names}
source = ASTSource(spec.kernel, signature, dict(spec.constexprs))
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def test_without_triton_a_launch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    missing: dict[str, Any] = runpy.run_path(triton_import.__file__)
    triton, tl = missing["triton"], missing["tl"]

    @triton.jit(do_not_specialize=["n"])
    def kernel(n, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
        tl.arange(0, BLOCK)

    for call in (lambda: triton.cdiv(5, 2), lambda: kernel[(1,)](1, BLOCK=16)):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'gesso\[gpu\]'"):
            call()


@pytest.mark.slow
def test_the_compiler_keeps_the_rounding_addition() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # 12582912.0; fused with the product before it, it would round that once too little.
    assert "0f4B400000" in done.stdout
    assert "fma." not in done.stdout
