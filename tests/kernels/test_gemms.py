"""Quantized products: kernels and references against float64 on the same codes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gesso_kernels import gemm_epilogue, gemm_nvfp4, gemm_w4a4, gemm_w4a8, gemm_w4a16, gemm_w8a8
from gesso_kernels.dispatch import compiled_rank, on_its_device
from gesso_kernels.errors import UnsupportedMode
from gesso_kernels.expand_w4 import nvfp4_to_split_half, progressive_multipliers
from gesso_kernels.number_formats import (
    e2m1_values,
    pack_consecutive,
    pack_split_half,
)
from gesso_kernels.tables import Tile
from torch import Tensor
from torch.nn import functional as F

# In the interpreter only; test_on_gpu.py compares what the compiler makes of the kernels.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
# Relative Frobenius; an output rounded to fp16 alone has 2e-4.
TOLERANCE = 5e-4
# M, N, K and R, all but K with sizes that are no multiples of a tile; activation, bias.
SHAPES = [
    ((1, 40, 64, 0), "none", False),
    ((7, 130, 192, 16), "silu", True),
    ((70, 96, 320, 48), "gelu_tanh", True),
    ((16, 33, 128, 36), "none", True),
]
SPLIT = Tile(block_m=16, block_n=32, block_k=64, warps=4, stages=1, split_k=2)
WIDE = Tile(block_m=32, block_n=64, block_k=128, warps=4, stages=1)


@dataclass(frozen=True)
class Product:
    """One call: arguments of the public function, and what float64 gives."""

    module: Any
    function: str
    arguments: tuple[Tensor | None, ...]
    options: dict[str, Any]
    exact: Tensor

    def public(self) -> Tensor:
        return getattr(self.module, self.function)(*self.arguments, **self.options)

    def kernel(self, tile: Tile | None = None) -> Tensor:
        launch = getattr(self.module, f"{self.module.__name__.rpartition('.')[2]}_triton")
        arguments = self.arguments
        if self.function == "gemm_w4a16":
            arguments = (*arguments[:4], None, *arguments[4:])
        return launch(*arguments, **self.options, tile=tile)


class Source:
    """Random operands of one shape."""

    def __init__(self, tokens: int, rows: int, columns: int, rank: int, bias: bool) -> None:
        self.generator = torch.Generator().manual_seed(tokens + rows + columns)
        self.tokens, self.rows, self.columns, self.rank = tokens, rows, columns, rank
        self.low_rank = self.normal(tokens, rank)
        self.up = self.normal(rows, rank).half()
        self.bias = self.normal(rows).half() if bias else None

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) / 10 + 0.01

    def codes(self, low: int, high: int, rows: int) -> Tensor:
        shape = (rows, self.columns)
        return torch.randint(low, high, shape, generator=self.generator)

    def branch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.low_rank, self.up, self.bias

    def finish(self, acc: Tensor, activation: str, low_rank: Tensor | None = None) -> Tensor:
        low_rank = self.low_rank if low_rank is None else low_rank
        y = acc + low_rank.half().double() @ self.up.double().T
        y = y if self.bias is None else y + self.bias.double()
        return {"none": y, "silu": F.silu(y), "gelu_tanh": F.gelu(y, approximate="tanh")}[
            activation
        ]


def groups(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [rows, K] times scales [rows, G] in float64."""
    grouped = codes.double().view(*scale.shape, codes.shape[1] // scale.shape[1])
    return (grouped * scale.double()[..., None]).flatten(1)


def w8a8(source: Source, activation: str, dtype: torch.dtype = torch.int8) -> Product:
    q, w = source.codes(-127, 128, source.tokens), source.codes(-127, 128, source.rows)
    q, w = q.to(dtype), w.to(dtype)
    s, t = source.positive(source.tokens) / 10, source.positive(source.rows) / 10
    acc = (q.double() * s.double()[:, None]) @ (w.double() * t.double()[:, None]).T
    options = {"activation": activation, "out_dtype": torch.float16}
    exact = source.finish(acc, activation)
    return Product(gemm_w8a8, "gemm_w8a8", (q, s, w, t, *source.branch()), options, exact)


def w8a8_fp8(source: Source, activation: str) -> Product:
    return w8a8(source, activation, torch.float8_e4m3fn)


def w4a8(source: Source, activation: str) -> Product:
    w = source.codes(-7, 8, source.rows)
    packed = pack_split_half(w)
    multipliers, t = progressive_multipliers(
        packed, source.positive(source.columns // 64, source.rows).half()
    )
    q, s = source.codes(-127, 128, source.tokens).to(torch.int8), source.positive(source.tokens)
    w8 = groups(w, multipliers.T) * t.double()[:, None]
    exact = source.finish((q.double() * s.double()[:, None]) @ w8.T, activation)
    arguments = (q, s, packed, multipliers, t, *source.branch())
    options = {"activation": activation, "out_dtype": torch.float16}
    return Product(gemm_w4a8, "gemm_w4a8", arguments, options, exact)


def w4a4(source: Source, activation: str, unsigned: bool = False) -> Product:
    q = source.codes(0, 16, source.tokens) if unsigned else source.codes(-8, 8, source.tokens)
    w = source.codes(-8, 8, source.rows)
    s = source.positive(source.columns // 64, source.tokens).half()
    t = source.positive(source.columns // 64, source.rows).half()
    exact = source.finish(groups(q, s.T) @ groups(w, t.T).T, activation)
    arguments = (pack_split_half(q), s, pack_split_half(w), t, *source.branch())
    options = {"unsigned": unsigned, "activation": activation, "out_dtype": torch.float16}
    return Product(gemm_w4a4, "gemm_w4a4", arguments, options, exact)


def w4a4_unsigned(source: Source, activation: str) -> Product:
    return w4a4(source, activation, unsigned=True)


def w4a16(source: Source, activation: str) -> Product:
    w, t = source.codes(-8, 8, source.rows), source.positive(source.columns // 64, source.rows)
    weight = groups(w, t.half().T).half()
    tensors = (pack_split_half(w), t.half())
    return _sixteen_bit("gemm_w4a16", source, activation, tensors, weight.double())


def w4a16_nvfp4(source: Source, activation: str) -> Product:
    w, t = source.codes(0, 16, source.rows), source.positive(source.rows, source.columns // 16)
    t, alpha = (100 * t).to(torch.float8_e4m3fn), source.positive(1)
    weight = groups(e2m1_values(w), t) * alpha.double()
    tensors = (*nvfp4_to_split_half(pack_consecutive(w), t), alpha)
    return _sixteen_bit("gemm_w4a16_nvfp4", source, activation, tensors, weight)


def _sixteen_bit(
    name: str, source: Source, activation: str, weight: tuple[Tensor, ...], exact_weight: Tensor
) -> Product:
    # The last columns of K are padding: x does not have them.
    x = F.pad(source.normal(source.tokens, source.columns - 5), (0, 5)).half()
    smooth = 1 + 5 * source.positive(source.columns).half()
    down = source.normal(source.rank, source.columns).half() / 10
    low_rank = x.double() @ down.double().T
    exact = source.finish((x / smooth).double() @ exact_weight.T, activation, low_rank)
    arguments = (x[:, :-5], smooth, *weight, down, source.up, source.bias)
    return Product(gemm_w4a16, name, arguments, {"activation": activation}, exact)


def nvfp4(source: Source, activation: str, scales: str = "e4m3") -> Product:
    q, w = source.codes(0, 16, source.tokens), source.codes(0, 16, source.rows)
    powers = [
        torch.randint(-4, 4, (rows, source.columns // 16), generator=source.generator)
        for rows in (source.tokens, source.rows)
    ]
    alpha = source.positive(source.rows)
    x, weight = (
        groups(e2m1_values(c), p.double().exp2()) for c, p in zip((q, w), powers, strict=True)
    )
    exact = source.finish((x @ weight.T) * alpha.double(), activation)
    if scales == "e4m3":
        s, t = (p.float().exp2().to(torch.float8_e4m3fn) for p in powers)
    else:
        s, t = ((p + 127).to(torch.uint8) for p in powers)
    arguments = (pack_consecutive(q), s, pack_consecutive(w), t, alpha, *source.branch())
    options = {"activation": activation, "out_dtype": torch.float16}
    return Product(gemm_nvfp4, "gemm_nvfp4", arguments, options, exact)


PRODUCTS: list[Callable[[Source, str], Product]] = [
    w8a8,
    w8a8_fp8,
    w4a8,
    w4a4,
    w4a4_unsigned,
    w4a16,
    w4a16_nvfp4,
]
with_products = pytest.mark.parametrize("make", PRODUCTS, ids=lambda make: make.__name__)
with_all_products = pytest.mark.parametrize(
    "make", [*PRODUCTS, nvfp4], ids=lambda make: make.__name__
)
with_shapes = pytest.mark.parametrize(
    ("shape", "activation", "bias"), SHAPES, ids=["x".join(map(str, s)) for s, *_ in SHAPES]
)


def relative_error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    return ((got.double() - exact).norm() / exact.norm()).item()


@with_shapes
@with_all_products
def test_the_reference_agrees_with_float64(
    make: Callable[..., Product], shape: tuple[int, int, int, int], activation: str, bias: bool
) -> None:
    product = make(Source(*shape, bias=bias), activation)
    assert product.public().dtype == torch.float16
    assert relative_error(product.public(), product.exact) < TOLERANCE


@interpreted
@with_shapes
@with_products
def test_the_kernel_agrees_with_float64(
    make: Callable[..., Product], shape: tuple[int, int, int, int], activation: str, bias: bool
) -> None:
    product = make(Source(*shape, bias=bias), activation)
    assert relative_error(product.kernel(), product.exact) < TOLERANCE


@interpreted
@with_shapes
def test_the_nvfp4_kernel_agrees_with_float64(
    shape: tuple[int, int, int, int], activation: str, bias: bool
) -> None:
    """Scales are powers of two: the interpreter takes the bytes of every scale for exponents."""
    product = nvfp4(Source(*shape, bias=bias), activation, scales="exponents")
    assert relative_error(product.kernel(), product.exact) < TOLERANCE


@interpreted
@with_products
def test_two_runs_of_a_kernel_give_the_same_bits(make: Callable[..., Product]) -> None:
    product = make(Source(33, 70, 192, 32, bias=True), "silu")
    assert torch.equal(product.kernel(), product.kernel())


@interpreted
@pytest.mark.parametrize("make", [w8a8, w8a8_fp8], ids=lambda make: make.__name__)
@pytest.mark.parametrize("columns", [128, 192])
def test_steps_that_do_not_divide_k_are_halved(make: Callable[..., Product], columns: int) -> None:
    product = make(Source(40, 70, columns, 16, bias=True), "none")
    assert relative_error(product.kernel(WIDE), product.exact) < TOLERANCE


@interpreted
@pytest.mark.parametrize("make", [w4a16, w4a16_nvfp4], ids=lambda make: make.__name__)
@pytest.mark.parametrize("columns", [64, 128, 320])
def test_a_split_sum_is_the_same_product_and_reproducible(
    make: Callable[..., Product], columns: int
) -> None:
    product = make(Source(18, 40, columns, 16, bias=True), "gelu_tanh")
    split = product.kernel(SPLIT)
    assert torch.equal(split, product.kernel(SPLIT))
    assert relative_error(split, product.exact) < TOLERANCE


def test_int8_sums_beyond_the_digits_of_fp32_are_exact() -> None:
    q = torch.full((2, 4096), 127, dtype=torch.int8)
    w = q.clone()
    w[1, ::2] = -126
    exact = (q.long() @ w.long().T).float()
    assert torch.equal(gemm_w8a8.integer_product(q, w), exact)


@interpreted
@pytest.mark.parametrize("make", [w8a8, w4a8, w4a4, w4a16, nvfp4], ids=lambda make: make.__name__)
def test_no_tokens_give_no_outputs(make: Callable[..., Product]) -> None:
    product = make(Source(0, 40, 64, 16, bias=True), "none")
    assert product.kernel().shape == product.public().shape == (0, 40)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@with_all_products
def test_the_op_is_registered_as_torch_expects(make: Callable[..., Product]) -> None:
    product = make(Source(3, 40, 64, 16, bias=True), "silu")
    arguments = product.arguments
    if product.function == "gemm_w4a16":
        arguments = (*arguments[:4], None, *arguments[4:])
    # torch compares the inputs before and after, which it cannot do for e4m3.
    has_e4m3 = any(t is not None and t.dtype == torch.float8_e4m3fn for t in arguments)
    checks = ("test_faketensor",) if has_e4m3 else ("test_schema", "test_faketensor")
    torch.library.opcheck(
        product.module._op, (*arguments, *product.options.values()), test_utils=checks
    )


@with_all_products
def test_torch_compile_sees_one_graph_with_the_op(make: Callable[..., Product]) -> None:
    product = make(Source(3, 40, 64, 16, bias=True), "silu")
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        getattr(product.module, product.function), fullgraph=True, backend=backend
    )
    torch.testing.assert_close(
        compiled(*product.arguments, **product.options), product.public(), rtol=0, atol=0
    )
    assert "gesso" in graphs[0].code
    torch._dynamo.reset()


def test_a_k_that_is_not_whole_groups_is_refused() -> None:
    source = Source(2, 8, 96, 16, bias=False)
    q, w = source.codes(-7, 8, 2).to(torch.int8), source.codes(-7, 8, 8).to(torch.int8)
    arguments = (q, source.positive(2), w, source.positive(8), *source.branch())
    with pytest.raises(ValueError, match=r"K is 96.* multiple of 64: pad"):
        gemm_w8a8.gemm_w8a8(*arguments, out_dtype=torch.float16)


def test_wrong_shapes_formats_and_activations_are_named() -> None:
    product = w8a8(Source(2, 8, 64, 16, bias=True), "none")
    q, s, *rest = product.arguments
    with pytest.raises(ValueError, match=r"scale_M has the shape \(1,\), expected \(2,\)"):
        gemm_w8a8.gemm_w8a8(q, s[:1], *rest, out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"codes are torch.float8_e4m3fn and the weight is"):
        gemm_w8a8.gemm_w8a8(q.to(torch.float8_e4m3fn), s, *rest, out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"'relu' is not one of none, silu, gelu_tanh"):
        gemm_w8a8.gemm_w8a8(q, s, *rest, activation="relu", out_dtype=torch.float16)


def test_a_product_that_the_gpu_lacks_names_the_mode_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnAmpere:
        is_cuda = True

        def get_device(self) -> int:
            return 0

    monkeypatch.setattr(gemm_epilogue, "_arch_and_cores", lambda _: ((8, 6), 82))
    message = "sm_86 has no FP8 product, which needs sm_89 or newer; use the mode w8a8_int8"
    with pytest.raises(UnsupportedMode, match=message):
        gemm_epilogue.require_arch(OnAmpere(), (8, 9), "FP8 product", "w8a8_int8")  # type: ignore[arg-type]


@interpreted
@with_products
def test_bias_and_branch_may_have_gaps_in_memory(make: Callable[..., Product]) -> None:
    product = make(Source(5, 40, 64, 16, bias=True), "none")
    *others, up, bias = product.arguments
    assert up is not None
    assert bias is not None
    gaps = (up.T.contiguous().T, torch.stack([bias, bias], dim=1)[:, 0])
    strided = replace(product, arguments=(*others, *gaps))
    assert torch.equal(strided.kernel(), product.kernel())


def test_ranks_of_loras_share_compiled_kernels() -> None:
    ranks = (0, 1, 16, 17, 32, 36, 64, 200, 256)
    assert [compiled_rank(rank) for rank in ranks] == [0, 16, 16, 32, 32, 64, 64, 256, 256]


def test_a_launcher_makes_the_gpu_of_its_tensors_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(1)
    assert on_its_device(lambda first, other: first + other)(x, 1) == 1
    assert entered == [x]
