"""Adapters of the SVDQuant cases about numbers: quantizers, smoothing, low-rank branch, GPTQ.

The cases were made with bfloat16 as the type of scales, unless the tensor itself is another 16-bit
type. What they call codes is the dequantized tensor cut to integers.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from gesso_core.quant.gptq import gptq_levels, hessian
from gesso_core.quant.low_rank import Decompose, iterate_branch, low_rank_branch
from gesso_core.quant.quantizers import (
    WeightGrid,
    quantize_fp4_input,
    quantize_int4,
    quantize_nvfp4,
)
from gesso_core.quant.shift import shifted_bias, split_columns
from gesso_core.quant.smoothing import (
    exponent_pairs,
    quantized_output,
    search_smooth,
    smooth_scale,
    span,
)
from gesso_kernels.number_formats import e2m1_values
from golden_case import Adapter, Case
from torch import Tensor
from torch.nn.functional import linear

Comparison = Callable[[str, Tensor, Tensor, Case], None]


def scale_dtype(case: Case, x: Tensor) -> torch.dtype:
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.dtype
    return getattr(torch, case.meta["config"].get("default_dtype", "bfloat16"))


def dequantized(levels: Tensor, scale: Tensor) -> Tensor:
    groups = levels.float().view(*scale.shape, -1) * scale.float()[..., None]
    return groups.view(levels.shape)


def fake_int4(case: Case) -> Callable[[Tensor], Tensor]:
    """The authors' calibration quantizer, back to values."""
    group = case.meta["config"].get("group", 64)
    return lambda x: dequantized(*quantize_int4(x, scale_dtype(case, x), group))


def exact_branch(case: Case) -> Decompose:
    rank, unused = case.meta["config"]["rank"], torch.Generator()
    return partial(low_rank_branch, rank=rank, svd="exact", generator=unused)


def int4(case: Case) -> dict[str, Tensor]:
    produced = {}
    for of, name, unsigned in (
        ("w", "w_int4", False),
        ("x", "x_int4", False),
        ("x_nonneg", "x_uint4", True),
    ):
        x = case.inputs[of]
        group = case.meta["config"]["group"]
        codes, scale = quantize_int4(x, scale_dtype(case, x), group, unsigned=unsigned)
        values = dequantized(codes, scale)
        produced[f"{name}.codes"] = values.to(torch.int16)
        produced[f"{name}.scale"] = scale
        produced[f"{name}.dequant"] = values
    return produced


def nvfp4(case: Case) -> dict[str, Tensor]:
    w, x, group = case.inputs["w"], case.inputs["x"], case.meta["config"]["group"]
    codes, scale, tensor_scale = quantize_nvfp4(w, scale_dtype(case, w), group)
    w_values = dequantized(e2m1_values(codes), scale.float() * tensor_scale.float())
    x_codes, x_scale = quantize_fp4_input(x, group, ties="up")
    x_values = dequantized(e2m1_values(x_codes), x_scale)
    return {
        "w.scale.0": tensor_scale,
        "w.scale.1": scale,
        "w.values": w_values,
        "w.dequant": w_values,
        "x.scale.0": x_scale,
        "x.values": x_values,
        "x.dequant": x_values,
    }


def gptq(case: Case) -> dict[str, Tensor]:
    weight, config = case.inputs["weight"], case.meta["config"]
    assert config["group"] == 64, "the product has groups of 64"
    grid = WeightGrid.fit(weight, "int4", scale_dtype(case, weight))
    step = grid.step(weight.shape[1])
    levels = gptq_levels(
        weight,
        step,
        hessian(case.inputs["x"]),
        grid.nearest,
        block=config["block"],
        damping=config["damp"],
    )
    return {
        "codes": (levels * step).to(torch.int8),
        "dequant": levels * step,
        "rtn_dequant": grid.nearest(weight / step) * step,
        "scale": grid.scale,
    }


def branch(case: Case) -> dict[str, Tensor]:
    weight = case.inputs["weight"]
    effective = exact_branch(case)(weight).product()
    return {"effective": effective, "residual": weight - effective}


def branch_error(case: Case, effective: Tensor, residual: Tensor) -> float:
    weight, x = case.inputs["weight_smoothed"], case.inputs["x_smoothed"]
    quantized = fake_int4(case)(x) @ residual.mT
    return float((x @ weight.mT - (x @ effective.mT + quantized)).square().sum())


def iterated_branch(case: Case) -> dict[str, Tensor]:
    found = iterate_branch(
        case.inputs["weight_smoothed"],
        iterations=100,
        decompose=exact_branch(case),
        quantize=fake_int4(case),
        error=lambda branch, residual: branch_error(case, branch.product(), residual),
    )
    return {
        "effective": found.branch.product(),
        "residual_dequant": found.residual_NK,
        "sq_error": torch.tensor(found.errors, dtype=torch.float64),
    }


def shifted(case: Case) -> dict[str, Tensor]:
    x, weight, bias = (case.inputs.get(name) for name in ("x", "weight", "bias"))
    shift, split = (case.meta["config"][name] for name in ("shift", "split"))
    repaired = shifted_bias(weight, bias, shift)
    widths = [split, weight.shape[1] - split]
    parts = zip(x.split(widths, -1), split_columns(weight, bias, widths), strict=True)
    return {
        "y": linear(x, weight, bias),
        "shifted_bias": repaired,
        "shifted_y": linear(x + shift, weight, repaired),
        "concat_y": sum(linear(part, *weights) for part, weights in parts),
    }


def all_rows(case: Case, prefix: str) -> Tensor:
    """``x.0``, ``x.1``, … one below the other."""
    names = sorted(name for name in case.inputs if name.startswith(f"{prefix}."))
    return torch.cat([case.inputs[name] for name in names])


def pairs_of(case: Case) -> list[tuple[float, float]]:
    config = case.meta["config"]
    return exponent_pairs(config["num_grids"], config.get("alpha", 0.5), config.get("beta", -2))


def scales(case: Case) -> dict[str, Tensor]:
    """Names say what is asked for: ``scale.AbsMax.a0.5.b0.5``, ``xspan.AbsMax``."""
    x, w = all_rows(case, "x"), all_rows(case, "w")
    produced = {"alpha_beta_pairs": torch.tensor(pairs_of(case), dtype=torch.float64)}
    for name in case.outputs.keys() - produced:
        found = re.fullmatch(r"scale\.(\w+)\.a([\d.]+)\.b([\d.]+)|([xw])span\.(\w+)", name)
        assert found, f"a name that this adapter cannot read: {name}"
        kind, alpha, beta, which, only = found.groups()
        if which:
            produced[name] = span(x if which == "x" else w, only)
        else:
            spans = span(x, kind), span(w, kind)
            produced[name] = smooth_scale(*spans, (float(alpha), float(beta)))
    return produced


def smooth_search(case: Case) -> dict[str, Tensor]:
    weight, x = case.inputs["weight"], case.inputs["x"]
    spans, wanted = (span(x), span(weight)), x @ weight.mT

    def error(smooth: Tensor) -> float:
        got = quantized_output(
            weight,
            x,
            smooth,
            decompose=exact_branch(case),
            quantize_weight=fake_int4(case),
            quantize_input=fake_int4(case),
        )
        return float((got - wanted).square().sum())

    pairs = pairs_of(case)
    found = search_smooth(pairs, lambda pair: smooth_scale(*spans, pair), error)
    return {
        "alpha_beta_pairs": torch.tensor(pairs, dtype=torch.float64),
        "scale": found.smooth_K,
        "sq_error": torch.tensor(found.errors, dtype=torch.float64),
    }


def close(got: Tensor, want: Tensor, bound: dict[str, float]) -> bool:
    return got.shape == want.shape and torch.allclose(got.to(want.dtype), want, **bound)


def compare_gptq(name: str, got: Tensor, want: Tensor, case: Case) -> None:
    """Another BLAS may tip a rounding: few codes differ, and the output error stays."""
    allowed, plain = case.meta["tolerance"], case.meta["tolerances"]["float"]
    if name not in ("codes", "dequant"):
        assert close(got, want, plain), f"output.{name}"
        return
    agree = torch.isclose(got.to(want.dtype), want, **plain).float().mean()
    assert agree >= allowed["codes_agree_at_least"], f"output.{name}: only {agree:.2%} agree"
    if name == "dequant":
        x, weight = case.inputs["x"], case.inputs["weight"]
        errors = [float((x @ (values - weight).mT).norm()) for values in (got, want)]
        low, high = allowed["rel_output_error_ratio_to_ref"]
        ratio = errors[0] / errors[1]
        assert low <= ratio <= high, f"output.{name}: {ratio:.3f} times the error"


def compare_iterated(name: str, got: Tensor, want: Tensor, case: Case) -> None:
    """Another BLAS may tip a rounding, after which the iterations part: their error must not."""
    if close(got, want, case.meta["tolerances"]["float"]):
        return
    allowed, weight = case.meta["tolerance"], case.inputs["weight_smoothed"]
    best = float(case.outputs["sq_error"].min())
    if name == "effective":
        error = branch_error(case, got, fake_int4(case)(weight - got))
    elif name == "residual_dequant":
        error = branch_error(case, exact_branch(case)(weight - got).product(), got)
    else:
        common = min(len(got), len(want))
        bound = {"rtol": allowed["sq_error_rtol"], "atol": 0.0}
        assert close(got[:common], want[:common], bound), f"output.{name}: {got} for {want}"
        error = float(got.min())
    worse = error / best - 1
    assert worse <= allowed["final_error_not_worse_than_ref_by"], f"output.{name}: {worse:.1%}"


def compare_search(name: str, got: Tensor, want: Tensor, case: Case) -> None:
    """Errors of candidates are sums over many rounded products."""
    allowed = case.meta["tolerance"]
    rtol = {"scale": allowed["scale_rtol"], "sq_error": allowed["sq_error_rtol"]}.get(name, 1e-12)
    assert close(got, want, {"rtol": rtol, "atol": 0.0}), f"output.{name}: {got} for {want}"


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("svdquant", "quantize_int4"): int4,
    ("svdquant", "quantize_nvfp4"): nvfp4,
    ("svdquant", "gptq"): gptq,
    ("svdquant", "low_rank_branch"): branch,
    ("svdquant", "low_rank_iterative"): iterated_branch,
    ("svdquant", "shifted_linear"): shifted,
    ("svdquant", "smooth_scale"): scales,
    ("svdquant", "smooth_search"): smooth_search,
}

# Kinds whose cases say in ``tolerance`` what another BLAS may change.
COMPARE: dict[tuple[str, str], Comparison] = {
    ("svdquant", "gptq"): compare_gptq,
    ("svdquant", "low_rank_iterative"): compare_iterated,
    ("svdquant", "smooth_search"): compare_search,
}
