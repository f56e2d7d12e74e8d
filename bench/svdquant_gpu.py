"""SVDQuant's layers on one GPU, at the shapes of Sana-1.6B, against bf16 cuBLAS and torchao.

    python bench/svdquant_gpu.py [--only layers|quantizers|producers|attention|model]
    python bench/svdquant_gpu.py --smoke          the same code on a CPU, tiny; measures nothing

Every mode that the device has is run at the same inputs in the same process, with its error against
the fp32 product of the unquantized weight beside it. Written to bench/results/svdquant_gpu.json.

What should come out on an H200 (specification of the kernels, roofline): quantizer and product at
least 1.25x bf16 from 2048 tokens on; fused producers at least 1.4x the separate ones; w4a16 at
least 2.5x up to 64 tokens; linear attention at least 2x eager; one step of Sana-1.6B at least 1.3x
compiled bf16 at a third of its memory.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from gesso_core.models.sana import SANA_CONFIGS, Sana, SanaConfig
from gesso_core.pipelines.graphed import GraphedSana
from gesso_core.quant.layer import QuantOptions, quantize_linear
from gesso_core.quant.layer_map import find_layers, layer_map, matrix_of
from gesso_core.quant.modules import SVDQuantLinear
from gesso_core.quant.record import QuantizedLinear, WeightFormat
from gesso_kernels.glu_quant_down import glu_quant_down
from gesso_kernels.modes import Mode, choose_mode, possible_modes
from gesso_kernels.modulated_norm import modulated_norm
from gesso_kernels.norm_quant_down import norm_quant_down
from gesso_kernels.quant_down import InputFormat, quant_down
from gesso_kernels.relu_linear_attention import relu_linear_attention, relu_linear_attention_ref
from gpu_timing import Bench, bench_of, relative_error
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "svdquant_gpu.json"
LAYERS = {
    "qkv": (6720, 2240),
    "out": (2240, 2240),
    "expand": (11200, 2240),
    "project": (2240, 5600),
}
SMOKE_LAYERS = {"out": (128, 128)}
TOKENS, SMOKE_TOKENS = (1, 64, 2048, 8192), (1, 48)
RANK = 32
FORMATS: tuple[WeightFormat, ...] = ("int4", "nvfp4", "int8")
PRODUCED = ("out", "project")  # one layer of each width
QUANTIZED: tuple[InputFormat, ...] = ("int8", "fp8", "int4", "nvfp4")
Row = dict[str, Any]


def outlier_rows(rows: int, columns: int, seed: int) -> Tensor:
    """Inputs with a few loud channels, as transformers have them."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.exp(0.5 * torch.randn(columns, generator=generator))
    gain[torch.randperm(columns, generator=generator)[: max(4, columns // 128)]] *= 40
    return torch.randn(rows, columns, generator=generator) * gain


@cache
def layer(shape: tuple[int, int], weight: WeightFormat) -> tuple[Tensor, QuantizedLinear]:
    """A random weight [N, K] and its record; one refit of the branch, as only speed is new here."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    options = QuantOptions(weight=weight, activation=weight, rank=RANK, grids=3, iterations=1)
    record, _ = quantize_linear(dense, None, outlier_rows(256, shape[1], 1), options)
    return dense, record


def arch_of(bench: Bench) -> tuple[int, int] | None:
    return None if bench.smoke else torch.cuda.get_device_capability()


def layers(bench: Bench) -> Iterator[Row]:
    """One linear layer in every mode, per number of tokens."""
    shapes = SMOKE_LAYERS if bench.smoke else LAYERS
    for name, shape in shapes.items():
        for tokens in SMOKE_TOKENS if bench.smoke else TOKENS:
            x = outlier_rows(tokens, shape[1], 2)
            dense = layer(shape, "int4")[0]
            exact = (x.to(bench.device) @ dense.to(bench.device).T).float()
            x = x.to(bench.device, bench.dtype)
            runs = dict(_competitors(bench, x, dense)) | dict(_ours(bench, x, shape))
            row: Row = {"layer": name, "tokens": tokens, "shape": shape}
            for label, run in runs.items():
                got = run()
                row[label] = {
                    "us": round(bench.microseconds(run), 2),
                    "graph_us": round(bench.graph_microseconds(run), 2),
                    "error": relative_error(cast(Tensor, got), exact),
                }
            base = row["bf16"]["graph_us"]
            row["times_bf16"] = {label: round(base / row[label]["graph_us"], 3) for label in runs}
            yield row


def _competitors(
    bench: Bench, x: Tensor, dense: Tensor
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    weight = dense.to(bench.device, bench.dtype)
    yield "bf16", lambda: F.linear(x, weight)
    if bench.smoke:
        return
    if len(x) > 16:  # the library's own limit
        yield "cuBLAS fp8, product alone", _library_fp8(x, weight)
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device=bench.device)
    for config in ("Int8DynamicActivationInt8WeightConfig", "Int4WeightOnlyConfig",
                   "Float8DynamicActivationFloat8WeightConfig"):  # fmt: skip
        quantized = _torchao(linear, weight, config)
        if quantized is not None:
            yield f"torchao {config.removesuffix('Config')}", lambda q=quantized: q(x)


def _library_fp8(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """e4m3 with a scale per row on both sides, quantized beforehand: what K2 could gain at most."""
    scales = [t.abs().amax(1, keepdim=True).float() / 448 for t in (x, weight)]
    codes = [(t / s).to(torch.float8_e4m3fn) for t, s in zip((x, weight), scales, strict=True)]
    return lambda: torch._scaled_mm(
        codes[0], codes[1].mT, scales[0], scales[1].mT.contiguous(), out_dtype=x.dtype
    )


def _torchao(linear: nn.Linear, weight: Tensor, config: str) -> Callable[[Tensor], Tensor] | None:
    """The layer as torchao quantizes and compiles it; None where this machine cannot run it."""
    try:
        from torchao import quantization
    except ImportError:
        print("torchao is not installed; its column is left out")
        return None
    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
    model = model.to(weight)
    model[0].weight.data.copy_(weight)
    try:
        quantization.quantize_(model, getattr(quantization, config)())
        compiled = torch.compile(model, mode="max-autotune-no-cudagraphs")
        compiled(torch.randn(32, linear.in_features).to(weight))
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError, ImportError) as why:
        print(f"torchao {config} does not run here: {str(why).splitlines()[0]}")
        return None
    return compiled


def _ours(
    bench: Bench, x: Tensor, shape: tuple[int, int]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for weight in FORMATS:
        record = layer(shape, weight)[1]
        for mode in possible_modes(weight, arch_of(bench)):
            if mode in ("reference", "dequantized") and not bench.smoke:
                continue  # the latter is the competitor
            module = _module(record, mode, bench)
            yield f"{weight} {mode}", lambda module=module: module(x)
    fused = _module(layer(shape, "int8")[1], "w8a8_int8", bench)
    yield "int8 w8a8_int8 unfused branch", lambda: _unfused(fused, x)


def _module(record: QuantizedLinear, mode: Mode, bench: Bench) -> SVDQuantLinear:
    return SVDQuantLinear.from_record(record, mode, device=bench.device, dtype=bench.dtype)


def _unfused(module: SVDQuantLinear, x: Tensor) -> Tensor:
    """The same layer with its branch as two products of their own."""
    from gesso_kernels.gemm_w8a8 import gemm_w8a8

    none = module.down[:0], module.up[:, :0]
    codes, scale, low_rank = quant_down(x, module.smooth, none[0], format="int8")
    y = gemm_w8a8(
        codes, scale, module.weight, module.row_scale, low_rank, none[1], None, out_dtype=x.dtype
    )
    return y + (x @ module.down.T[: x.shape[1]]) @ module.up.T


def quantizers(bench: Bench) -> Iterator[Row]:
    """The quantizer with its branch alone, against reading x and writing the codes."""
    copy = bench.ceilings()["copy_tb_per_s"]
    for tokens in SMOKE_TOKENS[1:] if bench.smoke else (2048, 8192):
        for shape in (SMOKE_LAYERS if bench.smoke else {k: LAYERS[k] for k in PRODUCED}).values():
            x = outlier_rows(tokens, shape[1], 2).to(bench.device, bench.dtype)
            m = _module(layer(shape, "int8")[1], "w8a8_int8", bench)
            for code_format in QUANTIZED:
                run = partial(quant_down, x, m.smooth, m.down, format=code_format)
                done = run()
                moved = x.nbytes + sum(tensor.nbytes for tensor in done)
                graph_us = bench.graph_microseconds(run)
                yield {
                    "format": code_format,
                    "tokens": tokens,
                    "columns": shape[1],
                    "us": bench.microseconds(run),
                    "graph_us": graph_us,
                    "times_floor": graph_us / (moved / copy / 1e6),
                }


def producers(bench: Bench) -> Iterator[Row]:
    """LayerNorm and gate in one kernel with the quantizer, against one after the other."""
    tokens, width = (64, 128) if bench.smoke else (8192, 2240)
    record = layer((width, width) if bench.smoke else LAYERS["out"], "int8")[1]
    module = _module(record, "w8a8_int8", bench)
    smooth, down = module.smooth, module.down
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(3))
    x = x.to(bench.device, bench.dtype)
    shift, scale = x[:, :1] * 0.1, x[:, 1:2] * 0.1
    gated = torch.cat([x, x], dim=-1)

    def norm_then_quantize() -> object:
        return quant_down(modulated_norm(x, shift, scale)[0], smooth, down, format="int8")

    def gate_then_quantize() -> object:
        value, gate = gated[0].chunk(2, dim=-1)
        return quant_down(value * F.silu(gate), smooth, down, format="int8")

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "norm + quantizer": (
            norm_then_quantize,
            lambda: norm_quant_down(x, shift, scale, 1e-6, smooth, down, format="int8"),
        ),
        "gate + quantizer": (
            gate_then_quantize,
            lambda: glu_quant_down(gated[0], smooth, down, format="int8"),
        ),
    }
    for name, (separate, fused) in pairs.items():
        before, after = bench.graph_microseconds(separate), bench.graph_microseconds(fused)
        yield {"producer": name, "separate_us": before, "fused_us": after, "times": before / after}


def attention(bench: Bench) -> Iterator[Row]:
    """ReLU linear attention against its eager form and against reading and writing alone."""
    tokens, heads = (64, 2) if bench.smoke else (4096, 70)
    qkv = torch.randn(2, tokens, 3 * heads * 32, generator=torch.Generator().manual_seed(4))
    parts = qkv.to(bench.device, bench.dtype).chunk(3, dim=-1)
    q, k, v = (part.reshape(2, tokens, heads, 32).permute(0, 2, 3, 1) for part in parts)
    ours = bench.graph_microseconds(lambda: relu_linear_attention(q, k, v))
    eager = bench.graph_microseconds(lambda: relu_linear_attention_ref(q, k, v))
    bytes_moved = 4 * q.numel() * q.element_size()
    floor = bytes_moved / bench.ceilings()["copy_tb_per_s"] / 1e6
    yield {"tokens": tokens, "us": ours, "times_eager": eager / ours, "times_floor": ours / floor}


def model(bench: Bench) -> Iterator[Row]:
    """One guided step of Sana-1.6B at 1024 px with random weights, and its memory.

    Launched by the host, served (as CUDA graphs), and with compiled blocks in a graph.
    """
    config = SANA_CONFIGS["sana-1.6b-1024"]
    if bench.smoke:
        config = replace(
            SANA_CONFIGS["sana-tiny"], depth=1, cross_heads=2, width=64, caption_channels=64
        )
    side = config.sample_size
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(2, config.in_channels, side, side, generator=generator)
    text = torch.randn(2, 300, config.caption_channels, generator=generator)
    time = torch.full((2,), 500.0)
    latent, time, text = (t.to(bench.device, bench.dtype) for t in (latent, time, text))
    exact: Tensor | None = None
    for label in ("bf16", *FORMATS):
        network = _network(config, bench)
        if label != "bf16":
            _quantize(network, cast(WeightFormat, label), bench, tokens=2 * side * side)
        context = network.encode_text(text).aligned()
        run = partial(network, latent, time, context)
        got = run().float()
        exact = got if exact is None else exact
        row: Row = {
            "model": label,
            "weight_bytes": sum(t.nbytes for t in (*network.parameters(), *network.buffers())),
            "error_to_bf16": relative_error(got, exact),
            "launched_us": bench.microseconds(run),
        }
        if not bench.smoke:
            row["served_us"] = bench.microseconds(
                partial(GraphedSana(network), latent, time, context)
            )
            for block in network.blocks:  # alike, so that they are compiled once
                block.compile()
            row["compiled_graph_us"] = bench.graph_microseconds(run)
        yield row


def _network(config: SanaConfig, bench: Bench) -> Sana:
    """Random weights; every block has those of the first, so that a layer is quantized once."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        network = Sana(config).to(bench.dtype).eval()
    for block in network.blocks[1:]:
        block.load_state_dict(network.blocks[0].state_dict())
    if not bench.smoke:
        network.lay_out_for_kernels()
    return network


def _quantize(network: Sana, weight: WeightFormat, bench: Bench, tokens: int) -> None:
    """Every layer of the map; the branch is made from one refit, λ from random inputs."""
    mode = choose_mode(weight, arch=arch_of(bench), tokens=tokens)
    records: dict[str, QuantizedLinear] = {}
    for name in find_layers(network, layer_map("sana")):
        of_first = re.sub(r"^blocks\.\d+", "blocks.0", name)
        if of_first not in records:
            matrix, bias = matrix_of(network.get_submodule(name), name)
            options = QuantOptions(
                weight=weight, activation=weight, rank=min(RANK, 16 if bench.smoke else RANK),
                grids=1, iterations=1,
            )  # fmt: skip
            x = torch.randn(64, matrix.shape[1], generator=torch.Generator().manual_seed(6))
            bias = None if bias is None else bias.float().cpu()
            records[of_first], _ = quantize_linear(matrix.float().cpu(), bias, x, options)
        network.set_submodule(name, _module(records[of_first], mode, bench))


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "quantizers": quantizers,
    "producers": producers,
    "attention": attention,
    "model": model,
    "layers": layers,
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU; not a result")
    arguments = parser.parse_args()
    bench = bench_of(arguments.smoke)
    result: dict[str, Any] = bench.about() | {"ceilings": bench.ceilings()}
    print(json.dumps(result))
    for name in arguments.only or PARTS:
        result[name] = []
        for row in PARTS[name](bench):
            result[name].append(row)
            print(name, json.dumps(row), flush=True)
            if not bench.smoke:
                RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
