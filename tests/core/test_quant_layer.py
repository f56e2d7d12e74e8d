"""One quantized layer from its samples to its file and its output, and the table of errors."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
import torch
from gesso_core.errors import ConfigError, GessoError, InvalidRequest, NumericalError
from gesso_core.quant import layer_table
from gesso_core.quant.canonical import QuantizedModel, read_canonical, write_canonical
from gesso_core.quant.layer import QuantOptions, quantize_linear
from gesso_core.quant.layer_calibration import CalibratedLinear, Objective, calibrate_linear
from gesso_core.quant.record import QuantizedLinear, pad_columns
from gesso_core.quant.reference import svdquant_linear_ref
from gesso_core.quant.shift import GELU_SHIFT, shifted_bias
from gesso_core.quant.synthetic import SyntheticLayer, synthetic_layer
from torch import Tensor
from torch.nn.functional import gelu, linear

FORMATS = [("int4", "int4"), ("nvfp4", "nvfp4"), ("int8", "int8"), ("int4", "16bit")]
NAIVE = {"rank": 0, "smooth": False}


def options(weight: str = "int4", activation: str = "int4", **others: Any) -> QuantOptions:
    """Small enough for a test: rank 8, 9 candidates, 5 iterations."""
    chosen = {"rank": 8, "grids": 5, "iterations": 5, "dtype": torch.float16} | others
    return QuantOptions(weight=weight, activation=activation, **chosen)


@pytest.fixture(scope="module")
def synthetic() -> SyntheticLayer:
    return synthetic_layer(0, rows=96, columns=192, calibration=640, test=64)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def bias_of(rows: int) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(9))


# ---- what comes out


@pytest.mark.parametrize(("weight", "activation"), FORMATS)
def test_smoothing_and_branch_beat_plain_rounding(
    synthetic: SyntheticLayer, weight: str, activation: str
) -> None:
    w, x = synthetic.weight_NK, synthetic.calibration_MK
    layer, report = quantize_linear(w, None, x, options(weight, activation))
    layer.require_valid("layer")
    assert report.error < 0.5 * report.naive_error
    assert (report.rank, report.rows) == (8, 640)
    error = relative(svdquant_linear_ref(layer, synthetic.test_MK), synthetic.test_MK @ w.mT)
    assert error == pytest.approx(report.error, rel=0.5)


def test_the_naive_error_is_that_of_the_naive_recipe(synthetic: SyntheticLayer) -> None:
    w, x = synthetic.weight_NK, synthetic.calibration_MK
    full = quantize_linear(w, None, x, options())[1]
    naive = quantize_linear(w, None, x, options(**NAIVE))[1]
    assert naive.error == pytest.approx(full.naive_error, rel=1e-4)
    assert (naive.alpha, naive.beta, naive.iterations) == (0, 0, 0)


def test_the_dense_weight_of_a_weight_only_layer_gives_its_output(
    synthetic: SyntheticLayer,
) -> None:
    w, x = synthetic.weight_NK, synthetic.calibration_MK
    layer, _ = quantize_linear(w, None, x, options("int4", "16bit"))
    y = svdquant_linear_ref(layer, synthetic.test_MK)
    assert relative(synthetic.test_MK @ layer.dense().mT, y) < 1e-3


def test_the_same_arguments_give_the_same_bits(synthetic: SyntheticLayer) -> None:
    w, x = synthetic.weight_NK, synthetic.calibration_MK
    first, again, other = (
        quantize_linear(w, None, x, options(seed=seed))[0].tensors() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["up"], other["up"])


def test_iterations_help_and_gptq_helps_on_top(synthetic: SyntheticLayer) -> None:
    w, x = synthetic.weight_NK, synthetic.calibration_MK
    once, iterated, compensated = (
        quantize_linear(w, None, x, options(activation="16bit", **more))[1]
        for more in ({"iterations": 1}, {"iterations": 30}, {"iterations": 30, "gptq": True})
    )
    assert iterated.error < 0.95 * once.error
    assert compensated.error < 0.9 * iterated.error


@pytest.mark.slow
def test_exact_and_randomized_svd_agree_in_output_error() -> None:
    ratios = []
    for seed in range(4):
        layer = synthetic_layer(seed, rows=256, columns=256, calibration=2048, test=16)
        exact, randomized = (
            quantize_linear(
                layer.weight_NK,
                None,
                layer.calibration_MK,
                options(rank=16, grids=10, iterations=40, svd=svd),
            )[1].error
            for svd in ("exact", "randomized")
        )
        ratios.append(randomized / exact)
    assert geometric_mean(ratios) == pytest.approx(1, abs=0.01)


def test_the_strides_of_weight_and_samples_do_not_matter(synthetic: SyntheticLayer) -> None:
    w, x = synthetic.weight_NK, synthetic.calibration_MK
    turned = [t.mT.contiguous().mT for t in (w, x)]
    straight = quantize_linear(w, None, x, options())[0]
    other = quantize_linear(turned[0], None, turned[1], options())[0]
    y = svdquant_linear_ref(straight, x)
    assert relative(svdquant_linear_ref(other, turned[1]), y) < 0.03


def test_unsigned_codes_after_a_shift_are_finer_than_signed_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    x = gelu(2 * torch.randn(640, 128, generator=draw))
    w, bias = torch.randn(64, 128, generator=draw) / 11, bias_of(64)
    signed = quantize_linear(w, bias, x, options())[1]
    layer, unsigned = quantize_linear(w, bias, x, options(activation="uint4"), shift=GELU_SHIFT)
    assert unsigned.error < 0.9 * signed.error
    y = svdquant_linear_ref(layer, x)
    assert float((y - linear(x, w, bias)).norm() / (x @ w.mT).norm()) < 1.2 * unsigned.error


def test_columns_are_padded_to_whole_groups() -> None:
    layer = synthetic_layer(1, rows=64, columns=208, calibration=320, test=32)
    made, report = quantize_linear(layer.weight_NK, None, layer.calibration_MK, options())
    assert (made.in_features, made.padded_in) == (208, 256)
    assert made.smooth[208:].unique().tolist() == [1]
    assert not made.down[:, 208:].any()
    assert not made.residual()[:, 208:].any()
    assert report.error < 0.5 * report.naive_error


def test_dead_channels_do_not_end_the_smoothing(synthetic: SyntheticLayer) -> None:
    w, x = synthetic.weight_NK.clone(), synthetic.calibration_MK.clone()
    w[:, 5] = 0
    x[:, 17] = 0
    layer, report = quantize_linear(w, None, x, options())
    assert layer.smooth.unique().numel() > 100
    assert report.error < 0.5 * report.naive_error


def test_candidates_are_judged_where_evaluate_says(synthetic: SyntheticLayer) -> None:
    w, x = synthetic.weight_NK, synthetic.calibration_MK
    seen: list[Tensor] = []

    def first_rows_only(y_MN: Tensor, rows_M: Tensor) -> Tensor:
        seen.append(rows_M)
        return y_MN[:, :4]

    layer, _ = quantize_linear(
        w, bias_of(96), x, options(search_rows=96), evaluate=first_rows_only, sequence=32
    )
    assert len(seen) > 9
    rows = seen[0].view(-1, 32)
    assert len(rows) == 3
    assert torch.equal(rows, rows[:, :1] + torch.arange(32))
    assert set(rows[:, 0].tolist()) <= set(range(0, 640, 32))
    plain, _ = quantize_linear(w, bias_of(96), x, options(search_rows=96), sequence=32)
    exact = x @ w.mT
    four = slice(0, 4)
    assert relative(
        (svdquant_linear_ref(layer, x) - bias_of(96))[:, four], exact[:, four]
    ) < relative((svdquant_linear_ref(plain, x) - bias_of(96))[:, four], exact[:, four])


# ---- to the file and back


def calibrated(
    w: Tensor, bias: Tensor | None, x: Tensor, recipe: QuantOptions, shift: float
) -> tuple[CalibratedLinear, Tensor, Tensor]:
    """The calibration graph on the rows and draws that `quantize_linear` uses."""
    moved = pad_columns(x + shift, 64)
    weight = pad_columns(w, 64)
    repaired = shifted_bias(weight, bias, shift)
    draw = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(x), generator=draw)
    rest = order[len(x) // 8 :]
    rows = rest.sort().values
    searched = rest[: recipe.search_rows].sort().values
    objective = Objective(weight, repaired, moved, searched, None)
    return calibrate_linear(weight, moved[rows], recipe, objective, draw), moved, repaired


@pytest.mark.parametrize("shift", [0.0, GELU_SHIFT])
@pytest.mark.parametrize(("weight", "activation"), [*FORMATS, ("int4", "uint4")])
def test_a_loaded_file_computes_what_calibration_computed(
    tmp_path: Path, weight: str, activation: str, shift: float
) -> None:
    synthetic = synthetic_layer(2, rows=64, columns=144, calibration=320, test=32)
    w, bias = synthetic.weight_NK, bias_of(64)
    x = gelu(synthetic.calibration_MK)
    if activation == "uint4" and not shift:
        x = x.relu()
    recipe = options(weight, activation)
    made, moved, repaired = calibrated(w, bias, x, recipe, shift)
    layer, _ = quantize_linear(w, bias, x, recipe, shift=shift)
    write_canonical(tmp_path / "model.safetensors", QuantizedModel(layers={"l": layer}, plain={}))
    loaded = read_canonical(tmp_path / "model.safetensors").layers["l"]
    assert relative(svdquant_linear_ref(loaded, x), made(moved) + repaired) < 1e-3


# ---- the reference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("weight", "activation"), FORMATS)
def test_a_16_bit_input_gives_a_16_bit_output_close_by(
    synthetic: SyntheticLayer, weight: str, activation: str, dtype: torch.dtype
) -> None:
    w, x = synthetic.weight_NK, synthetic.calibration_MK
    layer, _ = quantize_linear(w, bias_of(96), x, options(weight, activation, dtype=dtype))
    x = x[:60].view(3, 20, 192).to(dtype)
    y = svdquant_linear_ref(layer, x)
    assert (y.dtype, y.shape) == (dtype, (3, 20, 96))
    # A rounding of h to 16 bit tips some codes by one step.
    assert relative(y, svdquant_linear_ref(layer, x.float())) < 0.03


def by_hand(**changes: Any) -> QuantizedLinear:
    """One output, 64 inputs, λ = 2, codes 3, scale ½, branch 0: y = Σ Q(x / 2) · 1.5."""
    parts: dict[str, Any] = {
        "weight": "int4",
        "activation": "int4",
        "in_features": 64,
        "codes": torch.full((1, 32), 0x33, dtype=torch.uint8),
        "scale": torch.full((1, 1), 0.5, dtype=torch.bfloat16),
        "smooth": torch.full((64,), 2, dtype=torch.bfloat16),
        "down": torch.zeros(1, 64, dtype=torch.bfloat16),
        "up": torch.ones(1, 1, dtype=torch.bfloat16),
    }
    return QuantizedLinear(**parts | changes)


def test_the_reference_quantizes_the_smoothed_input() -> None:
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([14.0, 2.9, 3.1])  # h = 7, 1.45, 1.55 with the scale 1
    assert svdquant_linear_ref(by_hand(), x).item() == (7 + 1 + 2) * 1.5


def test_the_branch_reads_the_raw_input_and_rounds_inside_for_16_bit() -> None:
    layer = by_hand(down=torch.ones(1, 64, dtype=torch.bfloat16), smooth=torch.ones(64).bfloat16())
    x = torch.zeros(1, 64)
    x[0, :2] = torch.tensor([256.0, 1.0])  # 257 is not a bfloat16; 1 quantizes to 0
    assert svdquant_linear_ref(layer, x).item() == pytest.approx(256 * 1.5 + 257)
    assert svdquant_linear_ref(layer, x.bfloat16()).item() == 256 * 1.5 + 256


def test_the_reference_shifts_the_quantized_input_only() -> None:
    layer = by_hand(
        activation="uint4",
        shift=0.5,
        bias=torch.tensor([0.25], dtype=torch.bfloat16),
        down=torch.ones(1, 64, dtype=torch.bfloat16),
    )
    # h = (29.5 + 0.5) / 2 = 15 once and 0.25 elsewhere, which rounds to 0.
    x = torch.zeros(1, 64)
    x[0, 0] = 29.5
    assert svdquant_linear_ref(layer, x).item() == 15 * 1.5 + 29.5 + 0.25


def test_int8_products_are_scaled_by_token_and_row() -> None:
    layer = by_hand(
        weight="int8",
        activation="int8",
        codes=torch.full((1, 64), 100, dtype=torch.int8),
        scale=torch.full((1, 1), 0.25),
    )
    x = torch.zeros(1, 64)
    x[0, :2] = torch.tensor([254.0, -2.0])  # h = 127 and −1 with the scale 1
    assert svdquant_linear_ref(layer, x).item() == 126 * 100 * 0.25


def test_a_layer_refuses_an_input_of_another_width() -> None:
    with pytest.raises(ValueError, match="63 channels, this layer reads 64"):
        svdquant_linear_ref(by_hand(), torch.zeros(2, 63))


# ---- bad input

GOOD = {"weight_NK": torch.ones(16, 64), "bias_N": None, "x_samples_MK": torch.ones(64, 64)}
NAN = torch.full((64, 64), math.nan)


@pytest.mark.parametrize(
    ("changes", "recipe", "error", "message"),
    [
        ({"x_samples_MK": torch.ones(9, 64)}, {}, InvalidRequest, "9 rows.*at least 16"),
        ({"x_samples_MK": torch.ones(0, 64)}, {}, InvalidRequest, "0 rows of calibration"),
        ({"x_samples_MK": torch.ones(60, 64)}, {"gptq": True}, InvalidRequest, "64 with GPTQ"),
        ({"x_samples_MK": torch.ones(4, 16, 64)}, {}, InvalidRequest, "do not fit; give"),
        ({"x_samples_MK": torch.ones(64, 32)}, {}, InvalidRequest, r"\(64, 32\) do not fit"),
        ({"weight_NK": torch.ones(16, 64, 1, 1)}, {}, InvalidRequest, "convolution as its matrix"),
        ({"bias_N": torch.ones(3)}, {}, InvalidRequest, r"bias is \(3,\), expected \(16,\)"),
        ({"parts": (8, 9)}, {}, InvalidRequest, "do not add up to the 16 rows"),
        ({"sequence": 48}, {}, InvalidRequest, "whole sequences of 48"),
        ({}, {"rank": 32}, InvalidRequest, "rank 32 is more than a 16 × 64"),
        ({"x_samples_MK": NAN}, {}, NumericalError, "input samples of a layer contain NaN"),
        ({"weight_NK": NAN}, {}, NumericalError, "the weight of a layer contain NaN"),
        (
            {"x_samples_MK": -torch.ones(64, 64)},
            {"activation": "uint4"},
            InvalidRequest,
            "samples go down to -1",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused_with_the_reason(
    changes: dict[str, Any], recipe: dict[str, Any], error: type[GessoError], message: str
) -> None:
    given = GOOD | changes
    with pytest.raises(error, match=message):
        quantize_linear(**given, options=options(**recipe))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rank": -1}, "rank is -1, give at least 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"dtype": torch.float32}, "stores torch.bfloat16 or torch.float16"),
        ({"activation": "nvfp4"}, "nvfp4 activations need nvfp4 weights, not int4"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**recipe)


def test_a_branch_too_large_for_float16_says_what_to_do(synthetic: SyntheticLayer) -> None:
    huge = 1e6 * synthetic.weight_NK
    with pytest.raises(NumericalError, match=r"quantize with dtype=torch\.bfloat16"):
        quantize_linear(huge, None, synthetic.calibration_MK, options())
    report = quantize_linear(
        huge, None, synthetic.calibration_MK, replace(options(), dtype=torch.bfloat16)
    )[1]
    assert report.error < 0.5 * report.naive_error


# ---- the table


def test_the_generator_gives_the_same_layer_everywhere() -> None:
    layer = synthetic_layer(3, rows=32, columns=64, calibration=8, test=4)
    assert layer.weight_NK.dtype == torch.float32
    assert [tuple(t.shape) for t in layer] == [(32, 64), (8, 64), (4, 64)]
    again = synthetic_layer(3, rows=32, columns=64, calibration=8, test=4)
    assert all(torch.equal(a, b) for a, b in zip(layer, again, strict=True))
    # The planted part dominates: its largest singular value is 8.
    assert float(torch.linalg.svdvals(layer.weight_NK)[0]) == pytest.approx(8, rel=0.15)


def test_every_row_of_the_table_is_measured() -> None:
    layer = synthetic_layer(0, rows=128, columns=128, calibration=640, test=64)
    errors = layer_table.layer_errors(layer, "int4")
    assert errors.keys() == layer_table.EXPECTED.keys()
    assert errors["smooth + SVD r16"] < errors["smooth only"] < errors["naive W4A4"]
    assert errors["bf16"] < 0.005


def test_the_command_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = synthetic_layer(0, rows=128, columns=128, calibration=640, test=64)
    monkeypatch.setattr(layer_table, "synthetic_layer", lambda seed: small)
    out = tmp_path / "table.json"
    threads = torch.get_num_threads()
    layer_table.main(["--seeds", "0", "--out", str(out), "--threads", str(threads)])
    rows = json.loads(out.read_text())["rows"]
    assert rows["naive W4A4"]["int4"]["expected"] == 0.287
    assert "iterated r32, fp8 activations" in capsys.readouterr().out


@pytest.mark.slow
def test_the_expected_orderings_hold_for_a_layer_of_real_size() -> None:
    layer = synthetic_layer(0)
    four = layer_table.layer_errors(layer, "int4")
    fp4 = layer_table.layer_errors(layer, "nvfp4")
    for errors in (four, fp4):
        assert errors["smooth + SVD r32"] <= 0.7 * errors["smooth only"]
        for kind in ("smooth + SVD", "iterated", "iterated + GPTQ"):
            ranked = [errors[f"{kind} r{rank}"] for rank in (64, 32, 16)]
            assert ranked == sorted(ranked)
        for rank, gain in ((16, 0.03), (32, 0.06), (64, 0.08)):
            iterated = errors[f"iterated r{rank}"]
            assert iterated <= (1 - gain) * errors[f"smooth + SVD r{rank}"]
            assert errors[f"iterated + GPTQ r{rank}"] <= 0.93 * iterated
        a8, a16 = (errors[f"iterated r32, {a} activations"] for a in ("int8", "16-bit"))
        assert a8 <= 1.02 * a16
    assert four["smooth only"] <= 0.5 * four["naive W4A4"]
    assert all(four[f"SVD only r{rank}"] > 0.6 * four["naive W4A4"] for rank in (16, 32, 64))
    same = {"plain W8A8 int8", "plain W8A8 fp8", "bf16"}
    assert all(fp4[label] < four[label] for label in four.keys() - same)
