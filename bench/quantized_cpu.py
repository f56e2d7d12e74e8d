"""Quantized Sana on a CPU: bytes of the big one, and the time of a step of the small one.

    python bench/quantized_cpu.py

Bytes of Sana-1.6B follow from its shapes. Steps of the small Sana (guidance pairs, 4x4 latents; one
picture and eight) alternate with the fp32 model's, so that a busy machine is busy for both. Two
modes: `dequantized`, what a CPU serves with, and `reference`, the exact arithmetic of the file.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gesso_core.hub import resolve
from gesso_core.hub.load import load_sana
from gesso_core.hub.quantized import load_quantized_sana
from gesso_core.models.sana import SANA_CONFIGS, Sana
from gesso_core.quant.layer_map import layer_map, planned_bytes
from gesso_kernels.modes import Mode
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "quantized_cpu.json"
BYTES_TARGET, STEP_TARGET = 0.33, 1.2
MODELS = ("sana-tiny-int4", "sana-tiny-nvfp4", "sana-tiny-w8a8")
MODES: tuple[Mode, ...] = ("dequantized", "reference")


def byte_ratios() -> dict[str, float]:
    """Quantized bytes of Sana-1.6B over its bf16 bytes, all weights counted, rank 32."""
    with torch.device("meta"):
        model = Sana(SANA_CONFIGS["sana-1.6b-1024"])
    rows = {}
    for weight in ("int4", "nvfp4", "int8"):
        quantized, plain = planned_bytes(model, layer_map("sana"), weight=weight)
        rows[weight] = round(quantized / plain, 4)
    return rows


def step_of(model: Sana, pictures: int) -> Callable[[], Tensor]:
    config, generator, rows = model.config, torch.Generator().manual_seed(0), 2 * pictures
    side = config.sample_size
    latent = torch.randn(rows, config.in_channels, side, side, generator=generator)
    context = model.encode_text(torch.randn(rows, 16, config.caption_channels, generator=generator))
    return lambda: model(latent, torch.full((rows,), 500.0), context)


def medians(steps: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median CPU milliseconds, the steps taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            taken[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(times) for name, times in taken.items()}


def measured(models: dict[str, Sana], pictures: int, repeats: int) -> dict[str, Any]:
    """Times of a step, and how far its result is from the exact one."""
    steps = {name: step_of(model, pictures) for name, model in models.items()}
    exact = steps["fp32"]()
    times = medians(steps, repeats)
    return {
        name: {
            "cpu_ms": round(milliseconds, 3),
            "ratio": round(milliseconds / times["fp32"], 3),
            "error": round(float((steps[name]() - exact).norm() / exact.norm()), 4),
        }
        for name, milliseconds in times.items()
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = {"fp32": load_sana(resolve("sana-tiny"))}
    for name in MODELS:
        for mode in MODES:
            models[f"{name} {mode}"] = load_quantized_sana(resolve(name), mode=mode)
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "processor": _processor(),
        "bytes_of_sana_1.6b": byte_ratios(),
        "bytes_target": BYTES_TARGET,
        "step_of_small_sana": measured(models, 1, arguments.repeats),
        "step_of_8_pictures": measured(models, 8, arguments.repeats // 4),
        "step_target": STEP_TARGET,
    }
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
