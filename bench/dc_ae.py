"""DC-AE on a CPU against diffusers' AutoencoderDC: same weights, same run, interleaved.

    python bench/dc_ae.py [--repeats 5] [--only sana-float32-decode] [--size 256]

CPU seconds are the process time of all threads, the figure that survives other load on the machine.
Peak memory is that of a fresh process that loads the model and does one encoding or decoding.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gesso_core.models.dc_ae import DC_AE_CONFIGS, DCAE
from gesso_core.models.dc_ae_fused import fuse_for_inference
from gesso_core.models.keys.dc_ae import translate_dc_ae
from torch import Tensor, nn

MODELS = {"in": "dc-ae-f32c32-in-1.0", "sana": "dc-ae-f32c32-sana-1.0"}
DTYPES = ("float32", "bfloat16")
ACTIONS = ("encode", "decode")
RESULTS = Path(__file__).parent / "results" / "dc_ae_cpu.json"
TARGET = 0.80


def build_peer(name: str, dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    config = DC_AE_CONFIGS[MODELS[name]].to_diffusers()
    config.pop("_class_name")
    model = AutoencoderDC(**config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def build_ours(name: str, dtype: torch.dtype, state: dict[str, Tensor] | None = None) -> DCAE:
    config = DC_AE_CONFIGS[MODELS[name]]
    if state is None:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        model = DCAE(config)
        torch.set_default_dtype(torch.float32)
    else:
        with torch.device("meta"):
            model = DCAE(config)
        ours = translate_dc_ae(state, config, model.state_dict())
        model.load_state_dict({key: tensor.clone() for key, tensor in ours.items()}, assign=True)
    return fuse_for_inference(model)


def inputs(action: str, dtype: torch.dtype, size: int) -> Tensor:
    shape = (1, 3, size, size) if action == "encode" else (1, 32, size // 32, size // 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def runner(model: nn.Module, action: str) -> Callable[[Tensor], Tensor]:
    method = getattr(model, action)
    if isinstance(model, DCAE):
        return method
    return lambda x: method(x, return_dict=False)[0]


def timed(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    y = function(x)
    return y, time.process_time() - cpu, time.perf_counter() - wall


def measure(
    peer: nn.Module, ours: nn.Module, action: str, x: Tensor, repeats: int
) -> dict[str, Any]:
    """Alternate the two, so that both see the same load; the first round only warms up."""
    functions = {"peer": runner(peer, action), "ours": runner(ours, action)}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    outputs: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            outputs[name], c, w = timed(function, x)
            if repeat:
                cpu[name].append(c)
                wall[name].append(w)
    difference = (outputs["peer"].float() - outputs["ours"].float()).abs().max()
    row: dict[str, Any] = {}
    for name in functions:
        row[f"{name}_cpu_s"] = round(statistics.median(cpu[name]), 3)
        row[f"{name}_wall_s"] = round(statistics.median(wall[name]), 3)
    row["cpu_ratio"] = round(row["ours_cpu_s"] / row["peer_cpu_s"], 3)
    row["max_abs_difference"] = float(f"{difference:.2e}")
    row["output_std"] = float(f"{outputs['peer'].float().std():.2e}")
    return row


def peak_memory(who: str, case: tuple[str, str, str], size: int, threads: int) -> float:
    """Peak resident size, in MB, of a process of its own."""
    command = [sys.executable, __file__, "--peak", who, *case]
    command += ["--size", str(size), "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_peak(who: str, name: str, dtype_name: str, action: str, size: int) -> None:
    dtype = getattr(torch, dtype_name)
    model = (build_peer if who == "peer" else build_ours)(name, dtype)
    with torch.inference_mode():
        runner(model, action)(inputs(action, dtype, size))
    status = Path("/proc/self/status").read_text()
    print(round(int(status.split("VmHWM:")[1].split()[0]) / 1000))


def accuracy(
    name: str, action: str, size: int, outputs_of: dict[str, nn.Module]
) -> dict[str, float]:
    """RMS distance of the 16-bit results from the fp32 result of the same (rounded) weights."""
    exact = build_peer(name, torch.float32)
    exact.load_state_dict({k: v.float() for k, v in outputs_of["peer"].state_dict().items()})
    x = inputs(action, torch.bfloat16, size)
    truth = runner(exact, action)(x.float())
    return {
        f"{who}_rms_error": float(f"{(runner(m, action)(x).float() - truth).std():.2e}")
        for who, m in outputs_of.items()
    }


def hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="part of MODEL-DTYPE-ACTION")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=4, metavar=("WHO", "MODEL", "DTYPE", "ACTION"))
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.peak:
        print_peak(*args.peak, args.size)
        return
    rows: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        for dtype_name in DTYPES:
            cases = [a for a in ACTIONS if args.only in f"{name}-{dtype_name}-{a}"]
            if cases:
                rows |= measure_model(name, dtype_name, cases, args)
    report(rows, args)


@torch.inference_mode()
def measure_model(
    name: str, dtype_name: str, cases: list[str], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    dtype = getattr(torch, dtype_name)
    peer = build_peer(name, dtype)
    ours = build_ours(name, dtype, peer.state_dict())
    rows = {}
    for action in cases:
        x = inputs(action, dtype, args.size)
        row = measure(peer, ours, action, x, args.repeats)
        if dtype != torch.float32:
            row |= accuracy(name, action, args.size, {"peer": peer, "ours": ours})
        if not args.no_memory:
            for who in ("peer", "ours"):
                peak = peak_memory(who, (name, dtype_name, action), args.size, args.threads)
                row[f"{who}_peak_mb"] = peak
        rows[f"{name}-{dtype_name}-{action}"] = row
        print(f"{name}-{dtype_name}-{action}", json.dumps(row), flush=True)
    return rows


def report(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    head = f"{'case':24} {'peer CPU s':>10} {'ours CPU s':>10} {'ratio':>6} {'max diff':>9}"
    print("\n" + head + f" {'peer MB':>8} {'ours MB':>8}")
    for case, row in rows.items():
        peaks = [row.get(f"{who}_peak_mb", 0) for who in ("peer", "ours")]
        print(
            f"{case:24} {row['peer_cpu_s']:10.2f} {row['ours_cpu_s']:10.2f} "
            f"{row['cpu_ratio']:6.2f} {row['max_abs_difference']:9.1e} "
            f"{peaks[0]:8.0f} {peaks[1]:8.0f}"
        )
    if args.only or args.size != 256:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "what": f"DC-AE, batch 1, {args.size} px, {args.threads} threads, random weights",
        "peer": "diffusers 0.42.1 AutoencoderDC",
        "target_cpu_ratio": TARGET,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "repeats": args.repeats,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {RESULTS}")


if __name__ == "__main__":
    main()
