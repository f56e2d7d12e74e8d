"""A quantized layer inside a model: what each mode computes, keeps in memory, and refuses."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gesso_core.layers.adapters import LowRank, adapters
from gesso_core.quant.exact import QUANTIZERS
from gesso_core.quant.layer import QuantOptions, quantize_linear
from gesso_core.quant.modules import SVDQuantLinear
from gesso_core.quant.quantizers import quantize_input
from gesso_core.quant.record import ActivationFormat, QuantizedLinear, WeightFormat
from gesso_core.quant.reference import smoothed_input, svdquant_linear_ref
from gesso_core.quant.shift import GELU_SHIFT
from gesso_kernels.errors import UnsupportedMode
from gesso_kernels.modes import Mode, possible_modes
from gesso_kernels.modulated_norm import modulated_norm
from gesso_kernels.quantized_input import MAX_RANK
from torch import Tensor, nn

N, K, K_PADDED, M, RANK = 48, 100, 128, 40, 8
KINDS: dict[str, tuple[WeightFormat, ActivationFormat, float]] = {
    "int4": ("int4", "int4", 0.0),
    "shifted": ("int4", "uint4", GELU_SHIFT),
    "weight-only": ("int4", "16bit", 0.0),
    "nvfp4": ("nvfp4", "nvfp4", 0.0),
    "int8": ("int8", "int8", 0.0),
}
# What a layer of the kind may run in, beside reference and dequantized.
KERNEL_MODES: dict[str, tuple[Mode, ...]] = {
    "int4": ("w4a16", "w4a4_i8dot", "w4a8_prog", "w8a8_int8", "w8a8_fp8"),
    "shifted": ("w4a16", "w4a4_i8dot", "w4a8_prog", "w8a8_int8", "w8a8_fp8"),
    "weight-only": ("w4a16",),
    "nvfp4": ("w4a16", "w8a8_fp8", "nvfp4"),
    "int8": ("w8a8_int8",),
}
KERNEL_CASES = [(kind, mode) for kind, modes in KERNEL_MODES.items() for mode in modes]
ALL_CASES = KERNEL_CASES + [(kind, mode) for kind in KINDS for mode in ("reference", "dequantized")]


def rows(kind: str, count: int = M, seed: int = 1) -> Tensor:
    x = torch.randn(count, K, generator=torch.Generator().manual_seed(seed))
    return F.gelu(x) if kind == "shifted" else x


@pytest.fixture(scope="module")
def records() -> dict[str, QuantizedLinear]:
    """One layer of every kind, from the quantizer."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator) / 8 for shape in ((N, K), (N,)))
    made = {}
    for kind, (weight_format, activation, shift) in KINDS.items():
        options = QuantOptions(
            weight=weight_format, activation=activation, rank=RANK, grids=3, iterations=2
        )
        made[kind], _ = quantize_linear(weight, bias, rows(kind, 200), options, shift=shift)
    return made


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class OneAdapter:
    """The same factors for every layer."""

    def __init__(self, low_rank: LowRank) -> None:
        self.factors = low_rank

    def low_rank(self, _: nn.Module) -> LowRank:
        return self.factors


@contextmanager
def adapter(seed: int) -> Iterator[Tensor]:
    """A LoRA is active; gives the weight that it adds."""
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, K, generator=generator), torch.randn(N, 4, generator=generator)
    down, up = (part.bfloat16().float() / 8 for part in (down, up))
    with adapters(OneAdapter((down, up))):
        yield up @ down


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_is_the_dense_layer_that_the_record_stands_for(
    records: dict[str, QuantizedLinear], kind: str
) -> None:
    record, x = records[kind], rows(kind)
    layer = SVDQuantLinear.from_record(record, "dequantized")
    assert record.bias is not None
    residual = record.residual() / record.smooth.float()
    expected = F.linear(x, record.dense(), record.bias.float())
    expected += record.shift * residual[:, :K].sum(1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def wide_rows(kind: str) -> Tensor:
    """Rows of very different sizes, zeros among them."""
    x = rows(kind, 200)
    x *= torch.logspace(-12, 3, 200)[:, None]
    x[7], x[8, :64] = 0, 0
    return x


@pytest.mark.parametrize("with_lora", [False, True], ids=["alone", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_arithmetic_of_the_record(
    records: dict[str, QuantizedLinear], kind: str, with_lora: bool
) -> None:
    record, x = records[kind], wide_rows(kind)
    layer = SVDQuantLinear.from_record(record, "reference")
    expected = svdquant_linear_ref(record, x)
    with adapter(seed=3) if with_lora else nullcontext() as added_NK:
        found = layer(x)
    if added_NK is not None:
        expected += x @ added_NK.T
    bias_N = torch.zeros(N) if record.bias is None else record.bias.float()
    for y_N, expected_N in zip(found - bias_N, expected - bias_N, strict=True):
        # What is left of a small row beside a bias has the rounding error of the bias.
        assert (y_N - expected_N).norm() <= 1e-6 * (expected_N.norm() + bias_N.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_rounds_a_16_bit_input_where_the_record_does(
    records: dict[str, QuantizedLinear], kind: str, dtype: torch.dtype
) -> None:
    x = rows(kind).to(dtype)
    y = SVDQuantLinear.from_record(records[kind], "reference", dtype=dtype)(x)
    assert y.dtype == dtype
    # Sums in another order may round to the neighbour, here and there.
    assert distance(y.float(), svdquant_linear_ref(records[kind], x).float()) < 1e-4


@pytest.mark.parametrize("kind", ["int4", "shifted", "nvfp4", "int8"])
@pytest.mark.parametrize("columns", [64, 100])
def test_the_quantizers_of_reference_give_every_code_of_the_oracle(kind: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(9)
    format_, shift = KINDS[kind][1:]
    assert format_ != "16bit"
    x = torch.cat([wide_rows(kind), edges_of_e2m1()])[:, :columns] + shift
    smooth = torch.rand(columns, generator=generator) + 0.5
    smooth[:32] = 1  # leaves ties what they are
    divisor = 1 / smooth if format_ == "int8" else smooth
    padded = F.pad(smooth, (0, -columns % 64), value=1.0)
    h = smoothed_input(x, padded, shift=0.0, activation=format_)
    expected = quantize_input(h, format_).dequantized()[:, :columns]
    assert torch.equal(QUANTIZERS[format_](x, divisor), expected)


def edges_of_e2m1() -> Tensor:
    """Rows whose groups hold all ties of e2m1 beside a 6, and scales at the ends of e4m3."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    group = torch.cat([ties, -ties]).repeat(7)[:K]
    return group * torch.tensor([1.0, 0.5, 4.0, 2.0**-9, 2.0**-10, 2.0**-11, 448.0, 1e4])[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_and_reference_differ_by_the_rounding_of_the_input(
    records: dict[str, QuantizedLinear], kind: str
) -> None:
    x = rows(kind)
    exact, rounded = (
        SVDQuantLinear.from_record(records[kind], mode)(x) for mode in ("dequantized", "reference")
    )
    bounds = {"int8": (1e-4, 0.01), "weight-only": (0, 1e-5), "shifted": (0.01, 0.08)}
    least, most = bounds.get(kind, (0.02, 0.12))
    assert least <= distance(rounded, exact) <= most


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("int4", "w4a4_i8dot"), ("weight-only", "w4a16"), ("nvfp4", "nvfp4"), ("int8", "w8a8_int8")],
)
def test_a_kernel_mode_of_the_formats_in_the_file_gives_the_reference(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode
) -> None:
    x = rows(kind)
    layer = SVDQuantLinear.from_record(records[kind], mode)
    assert distance(layer(x), svdquant_linear_ref(records[kind], x)) < 1e-3


@pytest.mark.parametrize(("kind", "mode"), KERNEL_CASES)
def test_every_kernel_mode_stays_near_the_dense_layer(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode
) -> None:
    x = rows(kind)
    dense = SVDQuantLinear.from_record(records[kind], "dequantized")(x)
    found = SVDQuantLinear.from_record(records[kind], mode)(x)
    bound = {"w4a16": 1e-5, "w8a8_int8": 0.015, "w4a8_prog": 0.05, "w8a8_fp8": 0.05}
    assert distance(found, dense) < bound.get(mode, 0.12)


@pytest.mark.parametrize(("kind", "mode"), ALL_CASES)
def test_any_leading_dimensions_and_the_activation(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode
) -> None:
    layer = SVDQuantLinear.from_record(records[kind], mode)
    x = rows(kind).view(2, 5, M // 10, K)
    y = layer(x)
    assert y.shape == (2, 5, M // 10, N)
    torch.testing.assert_close(layer(x, "silu"), F.silu(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "mode"), ALL_CASES)
def test_rows_do_not_depend_on_what_they_are_computed_with(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode
) -> None:
    layer, x = SVDQuantLinear.from_record(records[kind], mode), rows(kind)
    torch.testing.assert_close(layer(x)[:3], layer(x[:3]), rtol=1e-5, atol=1e-5)


BRANCH = 2 * (K_PADDED + RANK * (K_PADDED + N) + N)  # λ, down, up, bias in 16 bit
PROMISED: dict[tuple[str, Mode], int] = {
    ("int4", "dequantized"): 2 * (N * K + N),
    ("int4", "reference"): 4 * (N * (K + RANK) + RANK * K + N) + 2 * K,
    ("int4", "w4a16"): N * K_PADDED // 2 + 2 * N * K_PADDED // 64 + BRANCH,
    ("int4", "w4a4_i8dot"): N * K_PADDED // 2 + 2 * N * K_PADDED // 64 + BRANCH,
    ("int4", "w4a8_prog"): N * K_PADDED // 2 + N * K_PADDED // 64 + 4 * N + BRANCH,
    ("int4", "w8a8_int8"): N * K_PADDED + 4 * N + BRANCH,
    ("int4", "w8a8_fp8"): N * K_PADDED + 4 * N + BRANCH,
    ("nvfp4", "nvfp4"): N * K_PADDED // 2 + N * K_PADDED // 16 + 4 + BRANCH,
    ("nvfp4", "w4a16"): N * K_PADDED // 2 + N * K_PADDED // 16 + 4 + BRANCH,
    ("int8", "w8a8_int8"): N * K_PADDED + 4 * N + BRANCH,
}


@pytest.mark.parametrize(("kind", "mode"), PROMISED)
def test_a_layer_keeps_what_its_mode_promises_and_no_more(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode
) -> None:
    layer = SVDQuantLinear.from_record(records[kind], mode, dtype=torch.bfloat16)
    assert layer.mode == mode
    assert layer.nbytes == PROMISED[kind, mode]
    assert sum(b.untyped_storage().nbytes() for b in layer.buffers()) == layer.nbytes
    assert all(buffer.is_contiguous() for buffer in layer.buffers())
    assert layer.dense_nbytes == 2 * (N * K + N)


@pytest.mark.parametrize(("kind", "mode"), ALL_CASES)
def test_another_number_format_of_the_model_leaves_the_layer_as_it_is(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode
) -> None:
    layer = SVDQuantLinear.from_record(records[kind], mode)
    before = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    nn.Sequential(layer).half()
    assert {name: buffer.dtype for name, buffer in layer.named_buffers()} == before


@pytest.mark.parametrize(
    ("kind", "mode", "best"),
    [
        ("nvfp4", "w8a8_int8", "w8a8_fp8"),
        ("nvfp4", "w4a4_i8dot", "w8a8_int8"),
        ("int4", "nvfp4", "w8a8_int8"),
        ("int8", "w4a16", "dequantized"),
        ("int8", "w8a8_fp8", "w8a8_int8"),
        ("weight-only", "w4a4_i8dot", "w8a8_int8"),
    ],
)
def test_a_mode_that_a_layer_has_not_is_refused_with_one_that_it_has(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode, best: str
) -> None:
    with pytest.raises(UnsupportedMode, match=rf"^blocks\.0\.q has .*'{best}'"):
        SVDQuantLinear.from_record(records[kind], mode, name="blocks.0.q")


@pytest.mark.parametrize(("kind", "mode"), ALL_CASES)
def test_an_active_lora_joins_the_branch(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode
) -> None:
    layer, x = SVDQuantLinear.from_record(records[kind], mode), rows(kind)
    plain = layer(x)
    with adapter(seed=3) as added_NK:
        found = layer(x)
        again = layer(x)
    torch.testing.assert_close(found, plain + x @ added_NK.T, rtol=1e-3, atol=1e-3)
    assert torch.equal(again, found)
    with adapter(seed=4) as added_NK:
        torch.testing.assert_close(layer(x), plain + x @ added_NK.T, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("mode", ["dequantized", "w4a16", "w8a8_int8"])
def test_a_lora_of_more_ranks_than_the_kernels_take_is_added_beside_them(
    records: dict[str, QuantizedLinear], mode: Mode
) -> None:
    layer, x = SVDQuantLinear.from_record(records["int4"], mode), rows("int4")
    plain = layer(x)
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(MAX_RANK, K, generator=generator) / K
    up = torch.randn(N, MAX_RANK, generator=generator) / 8
    with adapters(OneAdapter((down, up))):
        found = layer(x, "silu")
    expected = F.silu(plain + x @ (up @ down).T)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])
@pytest.mark.parametrize(("kind", "mode"), ALL_CASES)
def test_a_norm_in_front_can_be_left_to_the_layer(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode, lora: bool
) -> None:
    layer = SVDQuantLinear.from_record(records[kind], mode)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 10, K, generator=generator)
    shift, scale = (torch.randn(2, 1, K, generator=generator) / 4 for _ in range(2))
    with adapter(seed=3) if lora else nullcontext():
        expected = layer(modulated_norm(x, shift, scale, 1e-6), "silu")
        found = layer.normed(x, shift, scale, 1e-6, "silu")
    assert found.shape == (2, 10, N)
    # An input on the edge between two codes may fall to the other side.
    assert distance(found, expected) < 5e-3


def test_an_active_lora_comes_before_the_activation(records: dict[str, QuantizedLinear]) -> None:
    layer, x = SVDQuantLinear.from_record(records["int4"], "dequantized"), rows("int4")
    with adapter(seed=3):
        torch.testing.assert_close(layer(x, "silu"), F.silu(layer(x)))


def test_a_layer_without_bias_and_with_columns_for_the_kernels_to_pad() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    record, _ = quantize_linear(
        weight, None, rows("int8", 200), QuantOptions(weight="int8", rank=4)
    )
    narrow = replace(
        record,
        codes=record.codes[:, :K],
        smooth=record.smooth[:K],
        down=record.down[:, :K],
    )
    layer = SVDQuantLinear.from_record(narrow, "w8a8_int8")
    assert layer.bias is None
    assert layer.weight.shape == (N, K_PADDED)
    x = rows("int8")
    assert distance(layer(x), SVDQuantLinear.from_record(record, "w8a8_int8")(x)) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "mode"), KERNEL_CASES)
def test_a_gpu_computes_what_the_references_of_its_kernels_do(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode
) -> None:
    arch = torch.cuda.get_device_capability()
    if mode not in possible_modes(KINDS[kind][0], arch):
        pytest.skip(f"{mode} does not run on sm_{arch[0]}{arch[1]}")
    half, x = torch.bfloat16, rows(kind).bfloat16()
    expected = SVDQuantLinear.from_record(records[kind], mode, dtype=half)(x, "silu")
    layer = SVDQuantLinear.from_record(records[kind], mode, device="cuda", dtype=half)
    found = layer(x.cuda(), "silu").cpu()
    assert distance(found.float(), expected.float()) < 0.02


@pytest.mark.parametrize(
    ("kind", "mode", "operations"),
    [
        ("int4", "dequantized", set()),
        ("int4", "w4a16", {"gemm_w4a16"}),
        ("int4", "w4a4_i8dot", {"quant_down", "gemm_w4a4"}),
        ("int4", "w4a8_prog", {"quant_down", "gemm_w4a8"}),
        ("int8", "w8a8_int8", {"quant_down", "gemm_w8a8"}),
        ("nvfp4", "nvfp4", {"quant_down", "gemm_nvfp4"}),
    ],
)
def test_a_layer_compiles_and_exports_as_one_graph_of_its_operations(
    records: dict[str, QuantizedLinear], kind: str, mode: Mode, operations: set[str]
) -> None:
    torch._dynamo.reset()
    layer, x = SVDQuantLinear.from_record(records[kind], mode), rows(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, "silu"), layer(x, "silu"))
    called = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes]
    assert {name.split(".")[1] for name in called if name.startswith("gesso.")} == operations
