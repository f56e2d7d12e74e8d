"""HART-0.7B beside Sana-1.6B at 1024 px on one GPU: pictures per second, random weights.

    python bench/autoregressive_gpu.py            → bench/results/autoregressive_gpu.json
    python bench/autoregressive_gpu.py --smoke    the same code on a CPU, tiny; measures nothing

Both draw with guidance from text states that are given, to the finished latent; text encoders and
decoders are left out of both. HART: 14 scales, bf16 and fp16, with the blocks of every scale as a
CUDA graph over one cache, and without. Its noise is drawn on the host, as it is when served, or on
the device. Sana: 20 steps of its solver, the network as a CUDA graph.

What should come out on an H200: HART's authors report 4.5 to 7.7 times the throughput of diffusion
models of its quality (arXiv 2410.10812, table 2); Sana is faster than those, so HART should draw at
least as many pictures per second. The roofline of the blocks: 9750 slots of 0.68e9 multiplications,
two rows per picture, 27 TFLOP with guidance, against 20 steps of 2 x 1024 tokens of Sana, 131.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gesso_core.layers.kv_cache import KVRows
from gesso_core.models.hart.config import HART_CONFIGS, HARTConfig
from gesso_core.models.hart.generation import DrawOptions, ScaleInput, draw_scale, empty_cache
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.scale_noise import ScaleNoise, SeededNoise
from gesso_core.models.hart.transformer import HART, HARTText
from gesso_core.models.sana import SANA_CONFIGS, Sana
from gesso_core.sampling import make_sampler
from gesso_core.sampling.categorical import gumbel_noise
from gesso_core.sampling.guidance import classifier_free
from gpu_timing import Bench, bench_of
from torch import Tensor, nn

# B pictures   R rows, two per picture   N slots of a scale   D width   d channels of a head

RESULTS = Path(__file__).parent / "results" / "autoregressive_gpu.json"
BATCHES, SMOKE_BATCHES = (1, 8), (2,)
GUIDANCE, SANA_STEPS = 4.5, 20
STD = 0.02
Row = dict[str, Any]


class DeviceNoise:
    """The noise of a scale, drawn on the device; not repeatable, and of no use but for timing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def order(self, tokens: int) -> Tensor:
        return torch.randperm(tokens, device=self.device)

    def uniform(self, tokens: int) -> Tensor:
        return torch.rand(tokens, device=self.device, dtype=torch.float64)

    def gumbel(self, tokens: int, vocabulary: int) -> Tensor:
        return gumbel_noise(torch.rand((tokens, vocabulary), device=self.device))

    def normal(self, tokens: int, channels: int) -> Tensor:
        return torch.randn((tokens, channels), device=self.device)


@dataclass(frozen=True)
class _Captured:
    """The blocks at one scale: a graph, what it reads, and what it leaves."""

    graph: "torch.cuda.CUDAGraph"
    x_RND: Tensor
    angles_RNd: Tensor
    states_RND: Tensor
    rows: KVRows


class GraphedBlocks:
    """Stands in for `HART.run`: the blocks of every scale as a CUDA graph over one cache."""

    def __init__(self, model: HART, rows: int) -> None:
        self.plain, self.cache = model.run, empty_cache(model, rows)
        self.captured: dict[int, _Captured] = {}

    def __call__(
        self,
        x_RND: Tensor,
        angles_RNd: Tensor,
        text: HARTText,
        *,
        cache: KVRows | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KVRows | None]:
        assert cache is not None
        assert mask is None
        if cache.length not in self.captured:
            self.captured[cache.length] = self._capture(cache.length, x_RND, angles_RNd, text)
        done = self.captured[cache.length]
        done.x_RND.copy_(x_RND)
        done.angles_RNd.copy_(angles_RNd)
        done.graph.replay()
        return done.states_RND, done.rows

    def _capture(self, length: int, x_RND: Tensor, angles_RNd: Tensor, text: HARTText) -> _Captured:
        x, angles = x_RND.clone(), angles_RNd.clone()

        def run() -> tuple[Tensor, KVRows | None]:
            return self.plain(x, angles, text, cache=self.first(length))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states, rows = run()
        assert rows is not None
        return _Captured(graph, x, angles, states, rows)

    def first(self, length: int) -> KVRows:
        """The first slots of the one cache, as if nothing had been written behind them."""
        memory = self.cache._memory
        memory.used = length
        return KVRows(length, self.cache.rows, memory)


def materialized(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """A module of the meta device with random weights on the real one."""
    module = module.to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=STD, generator=generator)
    return module.eval().requires_grad_(False)


def hart_of(config: HARTConfig, bench: Bench) -> tuple[HART, MultiScaleQuantizer]:
    with torch.device("meta"):
        empty = HART(config)
    # The schedules are plain tables, which have to exist.
    empty.residual.training_schedule = type(empty.residual.training_schedule).squared_cosine(1000)
    empty.residual.drawing_schedule = empty.residual.training_schedule.respaced(
        config.diffusion_steps
    )
    model = materialized(empty, bench.device, bench.dtype)
    assert isinstance(model, HART)
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(
        vocabulary=config.vocabulary, channels=config.latent_channels, scales=config.scales
    ).to(bench.device)
    return model, quantizer.eval().requires_grad_(False)


def text_of(model: HART, pictures: int) -> HARTText:
    """Random states for the pictures, then what stands for no text."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    shape = (pictures, config.context_tokens)
    states = torch.randn(*shape, config.context_channels, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    text = model.encode_text(states.to(model.device), mask.to(model.device))
    return HARTText.concatenate([text, model.no_text(pictures)])


def draw_hart(
    model: HART,
    quantizer: MultiScaleQuantizer,
    text: HARTText,
    cache: KVRows,
    *,
    host_noise: bool,
    options: DrawOptions,
) -> Tensor:
    """Finished latents (B, C, h, w)."""
    config, pictures = model.config, len(text) // 2
    latent = torch.zeros(
        (pictures, config.latent_channels, config.side, config.side), device=model.device
    )
    guidance = torch.full((pictures,), GUIDANCE, device=model.device)
    for scale in range(len(config.scales)):
        noises: list[ScaleNoise] = [DeviceNoise(model.device)] * pictures
        if host_noise:
            noises = [SeededNoise(seed, scale) for seed in range(pictures)]
        given = ScaleInput(
            scale=scale,
            text=text,
            latent_BCHW=latent,
            cache=cache,
            guidance_B=guidance,
            noises=noises,
            kept=[None] * pictures,
        )
        result = draw_scale(model, quantizer, given, options)
        assert result.cache is not None
        latent, cache = result.latent_BCHW, result.cache
    return latent


def hart_rows(bench: Bench) -> Iterator[Row]:
    """Pictures per second of HART in every way."""
    name = "hart-tiny" if bench.smoke else "hart-0.7b-1024px"
    config = HART_CONFIGS[name]
    dtypes = (torch.float32,) if bench.smoke else (torch.bfloat16, torch.float16)
    for dtype in dtypes:
        model, quantizer = hart_of(config, replace(bench, dtype=dtype))
        plain = model.run
        for pictures in SMOKE_BATCHES if bench.smoke else BATCHES:
            text = text_of(model, pictures)
            for graphs, host_noise, smooth in _ways(bench):
                model.run = plain  # what GraphedBlocks captures
                if graphs:
                    model.run = GraphedBlocks(model, 2 * pictures)
                options = DrawOptions(smooth=smooth)

                def draw(
                    text: HARTText = text,
                    host_noise: bool = host_noise,
                    options: DrawOptions = options,
                    model: HART = model,
                    quantizer: MultiScaleQuantizer = quantizer,
                ) -> Tensor:
                    run: Any = model.run
                    graphed = isinstance(run, GraphedBlocks)
                    cache = run.first(0) if graphed else empty_cache(model, len(text))
                    return draw_hart(
                        model, quantizer, text, cache, host_noise=host_noise, options=options
                    )

                latent = draw()
                yield {
                    "model": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": pictures,
                    "cuda_graphs": graphs,
                    "noise": "host" if host_noise else "device",
                    "smoothed_codes": smooth,
                    **_speed(bench, draw, pictures),
                    "finite": bool(latent.isfinite().all()),
                }
            model.run = plain
        del model, quantizer


def _ways(bench: Bench) -> Sequence[tuple[bool, bool, bool]]:
    """(graphs, noise of the host, smoothed codes)."""
    if bench.smoke:
        return ((False, True, True), (False, False, True))
    return ((False, True, True), (False, False, True), (True, False, True), (True, False, False))


def sana_rows(bench: Bench) -> Iterator[Row]:
    """Pictures per second of Sana, the network as a CUDA graph."""
    name = "sana-tiny" if bench.smoke else "sana-1.6b-1024"
    config = SANA_CONFIGS[name]
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = Sana(config).to(bench.dtype).eval().requires_grad_(False)
    for pictures in SMOKE_BATCHES if bench.smoke else BATCHES:
        rows, side = 2 * pictures, config.sample_size
        text = torch.randn(rows, 300, config.caption_channels, device=bench.device)
        context = model.encode_text(text.to(bench.dtype))
        x = torch.zeros(rows, config.in_channels, side, side, device=bench.device).to(bench.dtype)
        time = torch.zeros(rows, device=bench.device)

        def network(
            x: Tensor = x, time: Tensor = time, context: Any = context, model: Sana = model
        ) -> Tensor:
            velocity: Tensor = model(x, time, context)
            return velocity

        velocity, replay = _graphed(network) if not bench.smoke else (network(), None)
        noise = torch.randn(pictures, config.in_channels, side, side, device=bench.device)

        def draw(
            noise: Tensor = noise,
            x: Tensor = x,
            time: Tensor = time,
            velocity: Tensor = velocity,
            replay: Any = replay,
            network: Any = network,
        ) -> Tensor:
            sampler = make_sampler("flow-dpm-solver", 3.0)
            state = sampler.start(noise, SANA_STEPS)
            while not state.done:
                latent, now = sampler.model_input(state)
                x.copy_(latent.repeat(2, 1, 1, 1))
                time.fill_(now * config.timestep_scale)
                if replay is None:
                    found = network()
                else:
                    replay()
                    found = velocity
                positive, negative = found.chunk(2)
                state = sampler.step(state, classifier_free(negative, positive, GUIDANCE), None)
            return state.latent

        yield {
            "model": name,
            "dtype": str(bench.dtype).removeprefix("torch."),
            "batch": pictures,
            "steps": SANA_STEPS,
            "cuda_graphs": replay is not None,
            **_speed(bench, draw, pictures),
        }


def _graphed(network: Any) -> tuple[Tensor, Any]:
    """Output and replay of a captured call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            network()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = network()
    return output, graph.replay


def _speed(bench: Bench, draw: Any, pictures: int) -> Row:
    milliseconds = bench.microseconds(draw) / 1e3
    return {
        "ms": round(milliseconds, 2),
        "pictures_per_s": round(1e3 * pictures / milliseconds, 3),
        "peak_gib": 0.0 if bench.smoke else round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU; not a result")
    arguments = parser.parse_args()
    bench = bench_of(arguments.smoke)
    result: dict[str, Any] = bench.about() | {"rows": []}
    print(json.dumps(result))
    for part in (sana_rows, hart_rows):
        for row in part(bench):
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if not bench.smoke:
                RESULTS.write_text(json.dumps(result, indent=1) + "\n")
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
