"""Sana-0.6B at 512 px, one forward on the CPU: this project against diffusers, in one run.

Both hold the same random weights and see the same inputs: a guidance pair (batch 2) of 16x16
latents and 300 text tokens, all valid. Forwards alternate, so that a busy machine is busy for both.
Peak memory is that of a fresh process that builds one model and runs it once.

    python bench/sana.py                              full depth, fp32 and bf16 → bench/results
    python bench/sana.py --layers 2 --repeats 2       a cheap look; nothing is written
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
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gesso_core.models.keys.sana import SANA_DIFFUSERS
from gesso_core.models.keys.translate import translate
from gesso_core.models.sana import SANA_CONFIGS, Sana, SanaConfig
from torch import Tensor, nn

MODEL = "sana-0.6b-512"
BATCH, TEXT_TOKENS = 2, 300
RESULTS = Path(__file__).parent / "results" / "sana_cpu.json"
TARGET = 0.90
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Forward = Callable[[], Tensor]


def build_peer(config: SanaConfig) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    peer: nn.Module = SanaTransformer2DModel.from_config(config.to_diffusers())
    return peer


def build_ours(config: SanaConfig, peer: nn.Module) -> Sana:
    with torch.device("meta"):
        model = Sana(config)
    state = translate(peer.state_dict(), SANA_DIFFUSERS, model.state_dict())
    model.load_state_dict(state, assign=True)
    return model


def inputs_for(config: SanaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, timestep, text states, text mask."""
    generator = torch.Generator().manual_seed(1)
    side = config.sample_size
    latent = torch.randn(BATCH, config.in_channels, side, side, generator=generator)
    text = torch.randn(BATCH, TEXT_TOKENS, config.caption_channels, generator=generator)
    mask = torch.ones(BATCH, TEXT_TOKENS, dtype=torch.long)
    return latent.to(dtype), torch.full((BATCH,), 500.0), text.to(dtype), mask


def peer_forward(peer: nn.Module, inputs: tuple[Tensor, ...]) -> Forward:
    latent, time_B, text, mask = inputs
    return lambda: peer(latent, text, time_B, encoder_attention_mask=mask).sample


def our_forwards(model: Sana, inputs: tuple[Tensor, ...]) -> tuple[Forward, Forward]:
    """From text states as the peer does it, and from a text encoded once per sampling run."""
    latent, time_B, text, mask = inputs
    context = model.encode_text(text, mask)
    return (lambda: model(latent, time_B, text, mask)), (lambda: model(latent, time_B, context))


def interleaved(forwards: dict[str, Forward], repeats: int) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each forward, after one unmeasured round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in forwards}
    for round_number in range(repeats + 1):
        for name, forward in forwards.items():
            cpu, wall = time.process_time(), time.perf_counter()
            forward()
            if round_number:
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            "cpu_s": statistics.median(cpu for cpu, _ in pairs),
            "wall_s": statistics.median(wall for _, wall in pairs),
        }
        for name, pairs in seconds.items()
    }


def peak_mib(who: str, arguments: argparse.Namespace, dtype: str) -> float:
    """Peak resident memory of a fresh process with one model and one forward."""
    command = [sys.executable, __file__, "--only", who, "--dtype", dtype]
    command += ["--layers", str(arguments.layers), "--threads", str(arguments.threads)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(answer.stdout.split()[-1])


def run_only(who: str, config: SanaConfig, dtype: torch.dtype) -> None:
    """Build one model in its dtype, run it once, print the peak in MiB."""
    from diffusers import SanaTransformer2DModel

    # The import above is in both processes, so that what it costs is in both peaks.
    inputs = inputs_for(config, dtype)
    torch.set_default_dtype(dtype)
    if who == "peer":
        peer_forward(SanaTransformer2DModel.from_config(config.to_diffusers()), inputs)()
    else:
        latent, time_B, text, mask = inputs
        Sana(config)(latent, time_B, text, mask)
    # Not ru_maxrss: a child inherits that from the process that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)


def processor() -> str:
    """Name of the processor, for the record."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure(config: SanaConfig, dtype_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    dtype = DTYPES[dtype_name]
    peer = build_peer(config)
    ours = build_ours(config, peer).to(dtype).eval()
    peer = peer.to(dtype).eval()
    inputs = inputs_for(config, dtype)
    fresh, cached = our_forwards(ours, inputs)
    forwards = {"peer": peer_forward(peer, inputs), "ours": fresh, "ours_cached_text": cached}
    wanted = forwards["peer"]()
    difference = float((fresh() - wanted).abs().max())
    times = interleaved(forwards, arguments.repeats)
    del peer, ours, forwards, fresh, cached
    return {
        "case": f"{MODEL}/batch-{BATCH}/text-{TEXT_TOKENS}/{dtype_name}",
        "layers": config.depth,
        "device": processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        **{f"{name}_{unit}": round(t[unit], 3) for name, t in times.items() for unit in t},
        "ratio_cpu": round(times["ours"]["cpu_s"] / times["peer"]["cpu_s"], 3),
        "ratio_cpu_cached_text": round(
            times["ours_cached_text"]["cpu_s"] / times["peer"]["cpu_s"], 3
        ),
        "target_ratio": TARGET,
        "max_abs_difference": difference,
        "max_abs_output": float(wanted.abs().max()),
        "peer_peak_mib": round(peak_mib("peer", arguments, dtype_name)),
        "ours_peak_mib": round(peak_mib("ours", arguments, dtype_name)),
        "measured": date.today().isoformat(),
    }


def show(row: dict[str, Any]) -> None:
    print(f"{row['case']}  ({row['layers']} layers, {row['threads']} threads, {row['device']})")
    for name in ("peer", "ours", "ours_cached_text"):
        print(f"  {name:18} {row[f'{name}_cpu_s']:8.3f} CPU s {row[f'{name}_wall_s']:8.3f} s")
    print(
        f"  ratio {row['ratio_cpu']} (target {TARGET}), "
        f"with cached text {row['ratio_cpu_cached_text']}; "
        f"difference {row['max_abs_difference']:.1e} of {row['max_abs_output']:.2f}; "
        f"peak MiB {row['ours_peak_mib']} against {row['peer_peak_mib']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--layers", type=int, default=SANA_CONFIGS[MODEL].depth)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help=f"default at full depth: {RESULTS}")
    parser.add_argument("--only", choices=["peer", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = replace(SANA_CONFIGS[MODEL], depth=arguments.layers)
    dtypes = arguments.dtype or list(DTYPES)
    with torch.inference_mode():
        if arguments.only:
            run_only(arguments.only, config, DTYPES[dtypes[0]])
            return
        rows = []
        for dtype_name in dtypes:
            rows.append(measure(config, dtype_name, arguments))
            show(rows[-1])
    full = config.depth == SANA_CONFIGS[MODEL].depth
    output = arguments.output or (RESULTS if full else None)
    if output:
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
