"""Channel norms, gates and ReLU attention against their formulas."""

from collections.abc import Callable

import pytest
import torch
from gesso_kernels.gated_silu import gated_silu, gated_silu_ref
from gesso_kernels.relu_linear_attention import (
    relu_linear_attention,
    relu_linear_attention_ref,
    relu_linear_attention_tokens,
    relu_quadratic_attention_ref,
)
from gesso_kernels.rms_norm import rms_norm_2d, rms_norm_2d_, rms_norm_2d_ref
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (2, 12, 5, 3), (1, 300, 1, 7)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_rms_norm_matches_its_formula(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x = normal(*shape, dtype=dtype).contiguous(memory_format=memory_format)
    weight, bias = normal(shape[1], dtype=dtype), normal(shape[1] + 1, dtype=dtype)[1:]
    bound = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    expected = rms_norm_2d_ref(x, weight, bias)
    torch.testing.assert_close(rms_norm_2d(x, weight, bias), expected, **bound)
    residual = normal(*shape, dtype=dtype)
    got = rms_norm_2d_(x.clone(), weight, bias, residual_BCHW=residual)
    torch.testing.assert_close(got, expected + residual, **bound)
    torch.testing.assert_close(rms_norm_2d_(x, weight, bias), expected, **bound)
    torch.testing.assert_close(x, expected, **bound)


def test_rms_norm_in_strips_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2, 6, 7, 5).contiguous(memory_format=torch.channels_last)
    expected = rms_norm_2d_ref(x, normal(6), normal(6))
    monkeypatch.setattr("gesso_kernels.rms_norm._STRIP_ELEMENTS", 6 * 4)
    torch.testing.assert_close(rms_norm_2d_(x, normal(6), normal(6)), expected)


def test_rms_norm_has_gradients() -> None:
    arguments = [normal(1, 4, 2, 3).double(), normal(4).double(), normal(4).double()]
    leaves = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(rms_norm_2d, tuple(leaves))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
def test_every_form_of_relu_attention_agrees(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = normal(3, 2, 3, 8, tokens, dtype=dtype)
    expected = relu_quadratic_attention_ref(q.double(), k.double(), v.double())
    bound = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    forms: list[Callable[..., Tensor]] = [relu_linear_attention, relu_linear_attention_ref]
    for form in forms:
        got = form(q, k, v)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected.double(), **bound)
    rows = [t.permute(0, 3, 1, 2) for t in (q, k, v)]
    got = relu_linear_attention_tokens(*rows).permute(0, 2, 3, 1)
    torch.testing.assert_close(got.double(), expected.double(), **bound)


@pytest.mark.parametrize("tokens", [4, 40])
def test_a_query_that_is_negative_everywhere_gives_zero(tokens: int) -> None:
    q, k, v = normal(3, 1, 1, 8, tokens)
    q[..., 2] = -1.0
    for got in (
        relu_linear_attention(q, k, v),
        relu_linear_attention_tokens(*(t.permute(0, 3, 1, 2) for t in (q, k, v))).permute(
            0, 2, 3, 1
        ),
    ):
        assert torch.equal(got[..., 2], torch.zeros_like(got[..., 2]))
        assert got.isfinite().all()


def test_attention_over_large_fp16_values_does_not_overflow() -> None:
    q, k, v = (100 * normal(3, 1, 1, 8, 4096)).half()
    got = relu_linear_attention(q, k, v).double()
    exact = relu_linear_attention_ref(q.double(), k.double(), v.double())
    torch.testing.assert_close(got, exact.double(), atol=0.1, rtol=1e-2)


@pytest.mark.parametrize(("shape", "dim"), [((2, 6, 3, 5), 1), ((2, 7, 10), -1)], ids=str)
def test_the_gate_is_the_second_half(shape: tuple[int, ...], dim: int) -> None:
    x = normal(*shape)
    torch.testing.assert_close(gated_silu(x, dim), gated_silu_ref(x, dim))
