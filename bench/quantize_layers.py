"""Quantizing the linears of one Sana-0.6B block with randomized against exact SVD, same run.

    python bench/quantize_layers.py [--format int4|nvfp4] [--only qkv] [--threads 2]

Weights and inputs are drawn by `gesso_core.quant.synthetic`: planted outliers, correlated channels,
4096 calibration tokens. The two alternate layer by layer, so that both see the same load. Errors
are those of the stored layer on 1024 other tokens.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from dc_ae import hardware
from gesso_core.quant.layer import LayerReport, QuantOptions, quantize_linear
from gesso_core.quant.record import QuantizedLinear
from gesso_core.quant.reference import svdquant_linear_ref
from gesso_core.quant.synthetic import SyntheticLayer, synthetic_layer

# Name to (N, K).
LAYERS = {
    "qkv": (3456, 1152),
    "out": (1152, 1152),
    "cross-q": (1152, 1152),
    "cross-out": (1152, 1152),
    "ffn-expand": (5760, 1152),
    "ffn-project": (1152, 2880),
}
KINDS = ("randomized", "exact")
RESULTS = Path(__file__).parent / "results" / "quantize_layers.json"
TARGET_SPEEDUP = 5.0
TARGET_ERROR = 0.01


def error_of(layer: QuantizedLinear, drawn: SyntheticLayer) -> float:
    wanted = drawn.test_MK @ drawn.weight_NK.mT
    return float((svdquant_linear_ref(layer, drawn.test_MK) - wanted).norm() / wanted.norm())


def measure(drawn: SyntheticLayer, four: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for svd in KINDS:
        options = QuantOptions(four, four, svd=svd)
        cpu, wall = time.process_time(), time.perf_counter()
        layer, report = quantize_linear(drawn.weight_NK, None, drawn.calibration_MK, options)
        row[f"{svd}_wall_s"] = round(time.perf_counter() - wall, 2)
        row[f"{svd}_cpu_s"] = round(time.process_time() - cpu, 2)
        row[f"{svd}_error"] = round(error_of(layer, drawn), 5)
        row[svd] = outcome(report)
    row["wall_ratio"] = round(row["exact_wall_s"] / row["randomized_wall_s"], 2)
    row["error_ratio"] = round(row["randomized_error"] / row["exact_error"], 4)
    return row


def outcome(report: LayerReport) -> dict[str, Any]:
    return {"alpha": report.alpha, "beta": report.beta, "iterations": report.iterations}


def total(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    sums = {
        f"{svd}_{clock}_s": round(sum(row[f"{svd}_{clock}_s"] for row in rows.values()), 1)
        for svd in KINDS
        for clock in ("wall", "cpu")
    }
    ratios = [row["error_ratio"] for row in rows.values()]
    return {
        **sums,
        "wall_ratio": round(sums["exact_wall_s"] / sums["randomized_wall_s"], 2),
        "cpu_ratio": round(sums["exact_cpu_s"] / sums["randomized_cpu_s"], 2),
        "error_ratio": round(geometric_mean(ratios), 4),
        "largest_error_ratio": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=("int4", "nvfp4"), default="int4")
    parser.add_argument("--only", default="", help="part of a layer's name")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: dict[str, dict[str, Any]] = {}
    for seed, (name, (height, width)) in enumerate(LAYERS.items()):
        if args.only in name:
            rows[name] = measure(synthetic_layer(seed, rows=height, columns=width), args.format)
            print(name, json.dumps(rows[name]), flush=True)
    result = {
        "what": f"one Sana-0.6B block to {args.format}, rank 32, 39 candidates, 4096 tokens, "
        f"{args.threads} threads",
        "target": {"wall_ratio": TARGET_SPEEDUP, "error": TARGET_ERROR},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "total": total(rows),
        "rows": rows,
    }
    print(json.dumps(result["total"]))
    if not args.only and args.format == "int4":
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
