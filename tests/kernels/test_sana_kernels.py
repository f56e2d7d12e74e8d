"""The 16-bit kernels of Sana against their formulas, in Triton's interpreter and as ops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gesso_kernels.depthwise_glu import (
    depthwise_glu,
    depthwise_glu_op,
    depthwise_glu_ref,
    depthwise_glu_triton,
    tap_major,
)
from gesso_kernels.errors import UnsupportedMode
from gesso_kernels.modulated_norm import (
    modulated_norm,
    modulated_norm_op,
    modulated_norm_ref,
    modulated_norm_triton,
)
from gesso_kernels.relu_linear_attention import (
    relu_linear_attention,
    relu_linear_attention_op,
    relu_linear_attention_ref,
    relu_linear_attention_triton,
)
from torch import Tensor

# The interpreter knows fp16, not bf16. Errors are those of the last rounding, relative to the size
# of the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# In the interpreter only; test_on_gpu.py compares what the compiler makes of the kernels.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Function = Callable[..., Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def norm_inputs(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """x inside a wider tensor, shift and scale inside the six parts of a modulation."""
    x_BND = normal(batch, tokens, 2 * width, dtype=dtype)[..., width:]
    shift_B1D, scale_B1D = normal(batch, 6, width, dtype=dtype).chunk(6, dim=1)[1:3]
    return 3 + x_BND, shift_B1D, scale_B1D, 1e-6


def conv_inputs(
    batch: int, rows: int, columns: int, channels: int, dtype: torch.dtype, bias: bool = True
) -> tuple[Any, ...]:
    x_BNE = normal(batch, rows * columns, 2 * channels + 8, dtype=dtype)[..., 8:]
    weight_E133 = normal(2 * channels, 1, 3, 3, dtype=dtype) / 3
    bias_E = normal(2 * channels, dtype=dtype) if bias else None
    return x_BNE, weight_E133, bias_E, (rows, columns)


def attention_inputs(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """q, k and v as [B, H, D, N] views of one (B, N, 3·H·D) product, as Sana has them."""
    qkv_BNE = normal(batch, tokens, 3 * heads * head_dim, dtype=dtype)
    q, k, v = (
        part.view(batch, tokens, heads, head_dim).permute(0, 2, 3, 1)
        for part in qkv_BNE.chunk(3, dim=-1)
    )
    return q, k, v, 1e-15


def exact(reference: Function, inputs: tuple[Any, ...]) -> Tensor:
    """The formula in fp64 where the reference allows it, of the very numbers that are given."""
    doubled = (t.double() if isinstance(t, Tensor) else t for t in inputs)
    return reference(*doubled).double()


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    bound = tolerance * expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, atol=bound, rtol=tolerance)


@interpreted
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 7, 100), (3, 5, 1152)], ids=str)
def test_the_modulated_norm_kernel_is_its_formula(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    inputs = norm_inputs(*shape, dtype)
    got = modulated_norm_triton(*inputs)
    assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, inputs[0].shape, True)
    assert_close(got, exact(modulated_norm_ref, inputs), TOLERANCE[dtype])


@interpreted
def test_one_modulation_serves_every_sample() -> None:
    x, shift, scale, eps = norm_inputs(3, 4, 24, torch.float32)
    got = modulated_norm_triton(x, shift[:1], scale[:1], eps)
    assert_close(got, exact(modulated_norm_ref, (x, shift[:1], scale[:1], eps)), 2e-6)


@interpreted
@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("batch", "grid", "channels"),
    [(1, (1, 1), 3), (2, (5, 3), 70), (1, (17, 9), 64), (1, (16, 8), 8), (1, (35, 2), 5)],
    ids=str,
)
def test_the_depthwise_glu_kernel_is_its_formula(
    batch: int, grid: tuple[int, int], channels: int, bias: bool, dtype: torch.dtype
) -> None:
    inputs = conv_inputs(batch, *grid, channels, dtype, bias)
    got = depthwise_glu_triton(*inputs)
    assert (got.dtype, tuple(got.shape)) == (dtype, (batch, grid[0] * grid[1], channels))
    assert_close(got, exact(depthwise_glu_ref, inputs), TOLERANCE[dtype])


@interpreted
@DTYPES
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"),
    [(1, 1, 1, 32), (2, 300, 2, 32), (1, 256, 1, 8), (1, 70, 1, 40)],
    ids=str,
)
def test_the_attention_kernel_is_its_formula(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    inputs = attention_inputs(batch, tokens, heads, head_dim, dtype)
    got = relu_linear_attention_triton(*inputs)
    assert got.dtype == dtype
    assert got.permute(0, 3, 1, 2).is_contiguous()  # what the next linear layer reads
    assert_close(got, exact(relu_linear_attention_ref, inputs), TOLERANCE[dtype])


@interpreted
def test_the_attention_kernel_gives_zero_to_a_query_that_is_negative_everywhere() -> None:
    q, k, v, eps = attention_inputs(1, 40, 2, 16, torch.float16)
    q[..., 2] = -1.0
    got = relu_linear_attention_triton(q, k, v, eps)
    assert torch.equal(got[..., 2], torch.zeros_like(got[..., 2]))
    assert got.isfinite().all()


@interpreted
def test_the_attention_kernel_adds_up_large_fp16_values() -> None:
    q, k, v, eps = attention_inputs(1, 2049, 1, 16, torch.float16)
    inputs = (100 * q, 100 * k, 100 * v, eps)
    got = relu_linear_attention_triton(*inputs)
    assert_close(got, exact(relu_linear_attention_ref, inputs), 1e-3)


@interpreted
@pytest.mark.parametrize(
    ("kernel", "inputs"),
    [
        (modulated_norm_triton, norm_inputs(2, 5, 48, torch.float16)),
        (depthwise_glu_triton, conv_inputs(2, 6, 5, 12, torch.float16)),
        (relu_linear_attention_triton, attention_inputs(2, 270, 1, 16, torch.float16)),
    ],
    ids=["modulated_norm", "depthwise_glu", "relu_linear_attention"],
)
def test_neither_a_second_run_nor_its_neighbours_change_a_sample(
    kernel: Function, inputs: tuple[Any, ...]
) -> None:
    got = kernel(*inputs)
    assert torch.equal(kernel(*inputs), got)
    batch = len(inputs[0])
    per_sample = [isinstance(t, Tensor) and len(t) == batch for t in inputs]  # not the weights
    one = [t[1:2] if own else t for t, own in zip(inputs, per_sample, strict=True)]
    assert torch.equal(kernel(*one), got[1:2])


OPS = [
    (modulated_norm_op, norm_inputs(2, 5, 48, torch.float32)),
    (depthwise_glu_op, (*conv_inputs(2, 6, 5, 12, torch.float32)[:3], 6, 5)),
    (depthwise_glu_op, (*conv_inputs(2, 6, 5, 12, torch.float32, bias=False)[:3], 6, 5)),
    (relu_linear_attention_op, attention_inputs(2, 30, 2, 16, torch.float32)),
    (relu_linear_attention_op, attention_inputs(2, 9, 2, 16, torch.float16)),
]


@pytest.mark.parametrize(("op", "inputs"), OPS, ids=lambda value: getattr(value, "_name", ""))
def test_the_ops_keep_the_rules_of_torch_library(op: Any, inputs: tuple[Any, ...]) -> None:
    tests = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(op, inputs, test_utils=tests).values()) == {"SUCCESS"}


FUNCTIONS = [
    (modulated_norm, norm_inputs(2, 5, 48, torch.float32)),
    (depthwise_glu, conv_inputs(2, 6, 5, 12, torch.float32)),
    (relu_linear_attention, attention_inputs(2, 30, 2, 16, torch.float32)),
]
names = pytest.mark.parametrize(
    ("function", "inputs"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", "")
)


@names
def test_compiled_whole_a_function_is_one_op(function: Function, inputs: tuple[Any, ...]) -> None:
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        seen.extend(str(node.target) for node in calls)
        return module.forward

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert sum(name.startswith("gesso") for name in seen) == 1


@names
def test_gradients_flow_eagerly_and_compiled(function: Function, inputs: tuple[Any, ...]) -> None:
    def gradients(of: Function) -> list[Tensor | None]:
        leaves = [t.detach().clone() if isinstance(t, Tensor) else t for t in inputs]
        tensors = [t.requires_grad_() for t in leaves if isinstance(t, Tensor)]
        of(*leaves).square().sum().backward()
        return [t.grad for t in tensors]

    eager = gradients(function)
    assert all(gradient is not None and gradient.any() for gradient in eager)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(gradients(compiled), eager)


@interpreted
def test_the_attention_kernel_takes_keys_of_another_type_than_its_values() -> None:
    q, k, v, eps = attention_inputs(1, 40, 2, 16, torch.float32)
    inputs = (q, k, v.half(), eps)
    got = relu_linear_attention_triton(*inputs)
    assert got.dtype == torch.float16
    assert_close(got, exact(relu_linear_attention_ref, inputs), TOLERANCE[torch.float16])


def test_the_norm_keeps_the_type_of_x_under_a_modulation_in_fp32() -> None:
    x, shift, scale, eps = norm_inputs(2, 5, 48, torch.bfloat16)
    assert modulated_norm(x, shift.float(), scale.float(), eps).dtype == torch.bfloat16


def test_taps_are_moved_once() -> None:
    weight = normal(12, 1, 3, 3)
    moved = tap_major(weight)
    assert torch.equal(moved, weight)
    assert moved.stride(0) == 1
    assert tap_major(moved).data_ptr() == moved.data_ptr()


def test_a_grid_that_does_not_hold_the_tokens_is_named() -> None:
    x, weight, bias, _ = conv_inputs(1, 6, 5, 4, torch.float16)
    with pytest.raises(ValueError, match="grid of 6x4"):
        depthwise_glu_triton(x, weight, bias, (6, 4))


def test_a_head_that_is_too_wide_for_the_kernel_is_refused() -> None:
    with pytest.raises(UnsupportedMode, match=r"head of 96 channels.*relu_linear_attention_ref"):
        relu_linear_attention_triton(*attention_inputs(1, 4, 1, 96, torch.float16))


@pytest.mark.parametrize(
    ("function", "reference", "inputs"),
    [
        (modulated_norm, modulated_norm_ref, norm_inputs(2, 77, 2240, torch.bfloat16)),
        (depthwise_glu, depthwise_glu_ref, conv_inputs(2, 33, 30, 200, torch.bfloat16)),
        (
            relu_linear_attention,
            relu_linear_attention_ref,
            attention_inputs(2, 4096, 5, 32, torch.bfloat16),
        ),
    ],
    ids=["modulated_norm", "depthwise_glu", "relu_linear_attention"],
)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_bf16_on_a_gpu_is_the_formula(
    device: str, function: Function, reference: Function, inputs: tuple[Any, ...]
) -> None:
    moved = (t.to(device) if isinstance(t, Tensor) else t for t in inputs)
    assert_close(function(*moved).cpu(), exact(reference, inputs), 8e-3)
