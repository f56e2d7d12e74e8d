"""LoRA at run time: what a file says, and what it does to the numbers."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gesso_core.layers.adapters import active_low_rank, adapters
from gesso_core.layers.linear import Linear, PointwiseConv
from gesso_core.lora.adapter import read_adapter
from gesso_core.lora.stack import AppliedLora, LoraStack, make_stack
from gesso_core.lora.targets import LayerMap
from gesso_core.models.keys.sana import SANA_DIFFUSERS, SANA_ORIGINAL
from gesso_core.models.keys.translate import translate, untranslate
from gesso_core.models.sana import Sana, SanaConfig, initialize_weights
from gesso_core.quant.layer import QuantOptions, quantize_linear
from gesso_core.quant.modules import SVDQuantLinear
from safetensors.torch import save_file
from torch import Tensor, nn

SMALL = SanaConfig(
    width=64,
    depth=2,
    cross_heads=2,
    cross_head_dim=32,
    caption_channels=48,
    sample_size=4,
    in_channels=6,
    out_channels=6,
)
Q = "transformer_blocks.0.attn1.to_q"
Factors = dict[str, tuple[Tensor, Tensor]]


def sana(dtype: torch.dtype = torch.float32) -> Sana:
    model = Sana(SMALL).eval()
    initialize_weights(model, torch.Generator().manual_seed(0))
    nn.init.ones_(model.caption.norm.weight)
    return model.to(dtype).requires_grad_(False)


def layers_of(model: Sana) -> LayerMap:
    return LayerMap(model, (SANA_DIFFUSERS, SANA_ORIGINAL))


def outputs_of(model: Sana, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(rows, 6, 4, 6, generator=generator)
    text = torch.randn(rows, 5, 48, generator=generator)
    times = torch.linspace(100, 900, rows)
    with torch.no_grad():
        return model(latent, times, text).float()


def random_factors(model: Sana, seed: int, rank: int = 4, words: str = "") -> Factors:
    """Factors for every layer that takes any and has ``words`` in its name, as diffusers names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, target.columns, generator=generator) / target.columns**0.5,
            torch.randn(target.rows, rank, generator=generator) / rank**0.5 / 4,
        )
        for name, target in layers_of(model).targets.items()
        if not name.startswith(("blocks.", "x_", "y_", "t_", "final")) and words in name
    }


def peft(factors: Factors, prefix: str = "transformer.") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.lora_{half}.weight": tensor
        for name, pair in factors.items()
        for half, tensor in zip("AB", pair, strict=True)
    }


def merged(model: Sana, scaled: list[tuple[Factors, float]]) -> Sana:
    """The same network with the products added to its weights, under the names of diffusers."""
    state = untranslate(model.state_dict(), SANA_DIFFUSERS)
    for factors, scale in scaled:
        for name, (down, up) in factors.items():
            weight = state[name + ".weight"]
            change = (scale * (up @ down)).reshape(weight.shape)
            state[name + ".weight"] = weight + change.to(weight.dtype)
    other = Sana(SMALL).eval().to(next(model.parameters()).dtype)
    other.load_state_dict(translate(state, SANA_DIFFUSERS))
    return other


def stack_of(
    path: Path, model: Sana, strength: float = 1.0, dtype: torch.dtype = torch.float32
) -> LoraStack:
    adapter = read_adapter(path)
    use = AppliedLora(name=path.stem, sha256=adapter.sha256, strength=strength)
    return make_stack([(use, adapter)], layers_of(model), dtype=dtype)


def written(folder: Path, tensors: Mapping[str, Tensor], name: str = "ink", **facts: Any) -> Path:
    path = folder / f"{name}.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps(facts)} if facts else None
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)
    return path


def with_adapters(model: Sana, stack: LoraStack) -> Tensor:
    with adapters(stack):
        return outputs_of(model)


def test_ranks_beside_the_weights_give_what_merged_weights_give(tmp_path: Path) -> None:
    model = sana()
    ink, oil = random_factors(model, 1), random_factors(model, 2, rank=7)
    wanted = []
    for name, factors, strength in (("ink", ink, 0.7), ("oil", oil, -1.5)):
        adapter = read_adapter(written(tmp_path, peft(factors), name))
        wanted.append((AppliedLora(name=name, sha256=adapter.sha256, strength=strength), adapter))
    got = with_adapters(model, make_stack(wanted, layers_of(model), dtype=torch.float32))
    want = outputs_of(merged(model, [(ink, 0.7), (oil, -1.5)]))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - outputs_of(model)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bit_they_are_as_near_to_the_exact_ones_as_merged_weights_are(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    exact, model = sana(), sana(dtype)
    factors = random_factors(exact, 1)
    stack = stack_of(written(tmp_path, peft(factors)), model, 1.0, dtype)
    want = outputs_of(merged(exact, [(factors, 1.0)]))
    got, folded = with_adapters(model, stack), outputs_of(merged(model, [(factors, 1.0)]))
    error, folded_error, effect = (
        (a - want).norm() / want.norm() for a in (got, folded, outputs_of(exact))
    )
    assert error < 1.5 * folded_error
    assert error < 0.03 < 0.2 < effect


def test_a_feed_forward_worked_through_in_parts_adds_them_too(tmp_path: Path) -> None:
    model = sana()
    stack = stack_of(written(tmp_path, peft(random_factors(model, 3, words=".ff."))), model)
    whole = with_adapters(model, stack)
    model.chunk_ffn(3)
    torch.testing.assert_close(with_adapters(model, stack), whole, atol=1e-5, rtol=1e-5)
    assert (outputs_of(model) - whole).abs().max() > 1e-3


def kohya(factors: Factors) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in factors.items():
        flat = "lora_unet_" + name.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = down, up
        tensors[f"{flat}.alpha"] = torch.tensor(2.0)  # half of the rank
    return tensors


STYLES = {
    "peft": (peft, 1.0),
    "bare": (lambda factors: peft(factors, ""), 1.0),
    "base_model": (lambda factors: peft(factors, "base_model.model."), 1.0),
    "adapter name": (
        lambda f: {k.replace(".weight", ".default.weight"): v for k, v in peft(f).items()},
        1.0,
    ),
    "older diffusers": (
        lambda f: {
            k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v
            for k, v in peft(f).items()
        },
        1.0,
    ),
    "kohya": (kohya, 0.5),
    "convolutions": (
        lambda f: {
            k: v[..., None, None] if "conv" in k else v for k, v in peft(f).items()
        },
        1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_every_way_of_writing_keys_means_the_same(tmp_path: Path, style: str) -> None:
    model = sana()
    factors = random_factors(model, 1)
    write, scale = STYLES[style]
    got = with_adapters(model, stack_of(written(tmp_path, write(factors)), model))
    torch.testing.assert_close(
        got, outputs_of(merged(model, [(factors, scale)])), atol=1e-4, rtol=1e-4
    )


def test_names_of_the_authors_reach_the_fused_layers(tmp_path: Path) -> None:
    model = sana()
    down, up = torch.randn(4, 64), torch.randn(192, 4) / 8
    rows = dict(zip("qkv", up.chunk(3), strict=True))
    parts = {f"transformer_blocks.0.attn1.to_{n}": (down, part) for n, part in rows.items()}
    fused = written(tmp_path, peft({"blocks.0.attn.qkv": (down, up)}, ""), "fused")
    apart = written(tmp_path, peft(parts), "apart")
    one, other = (with_adapters(model, stack_of(path, model)) for path in (fused, apart))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("facts", "scale"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
    ],
    ids=["alpha", "rank stabilized", "by layer"],
)
def test_the_scale_is_read_from_the_metadata_of_diffusers(
    tmp_path: Path, facts: dict[str, Any], scale: float
) -> None:
    factors = random_factors(sana(), 1, words=Q)
    (pair,) = read_adapter(written(tmp_path, peft(factors), **facts)).pairs.values()
    assert pair.scale == scale


def test_queries_keys_and_values_share_rows_that_are_equal(tmp_path: Path) -> None:
    model = sana()
    qkv = model.blocks[0].attention.qkv
    factors = random_factors(model, 1, rank=16, words="transformer_blocks.0.attn1.to_")
    del factors["transformer_blocks.0.attn1.to_out.0"]
    apart = stack_of(written(tmp_path, peft(factors)), model).low_rank(qkv)
    down = factors[Q][0]
    shared = {name: (down.clone(), up) for name, (_, up) in factors.items()}
    together = stack_of(written(tmp_path, peft(shared)), model).low_rank(qkv)
    assert apart is not None
    assert together is not None
    assert (apart[0].shape, apart[1].shape) == ((48, 64), (192, 48))
    assert (together[0].shape, together[1].shape) == ((16, 64), (192, 16))
    torch.testing.assert_close(together[1][:64], factors[Q][1])


def test_a_file_reaches_quantized_layers_as_well(tmp_path: Path) -> None:
    model = sana()
    path = written(tmp_path, peft(random_factors(model, 1, words="transformer_blocks")))
    samples = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
    options = QuantOptions(weight="int4", activation="int4", rank=8, grids=2, iterations=1)
    for block in model.blocks:
        for parent, name in ((block.attention, "qkv"), (block.cross, "kv"), (block.ffn, "expand")):
            dense = getattr(parent, name)
            weight = dense.weight.flatten(1)
            record, _ = quantize_linear(weight, dense.bias, samples, options)
            setattr(parent, name, SVDQuantLinear.from_record(record, "dequantized"))
    plain, stack = outputs_of(model), stack_of(path, model)
    got = with_adapters(model, stack)
    for module in model.modules():
        if (factors := stack.low_rank(module)) is not None:
            change = factors[1] @ factors[0]
            module.weight += change.reshape(module.weight.shape)
    torch.testing.assert_close(got, outputs_of(model), atol=1e-4, rtol=1e-4)
    assert (got - plain).abs().max() > 0.1


def test_strength_0_is_no_lora_to_the_last_bit(tmp_path: Path) -> None:
    model = sana()
    stack = stack_of(written(tmp_path, peft(random_factors(model, 1))), model, strength=0.0)
    assert torch.equal(with_adapters(model, stack), outputs_of(model))
    assert stack.key == ()
    assert [use.strength for use in stack.uses] == [0.0]


def test_the_activation_comes_after_the_sum() -> None:
    conv = PointwiseConv(16, 16).requires_grad_(False)
    x, down, up = torch.randn(3, 16), torch.randn(16, 16), torch.randn(16, 16)
    stack = LoraStack([], {conv: (down, up)})
    with adapters(stack):
        got = conv(x, "silu")
    whole = torch.nn.functional.linear(x, conv.weight.flatten(1) + up @ down, conv.bias)
    torch.testing.assert_close(got, torch.nn.functional.silu(whole), atol=1e-4, rtol=1e-4)


def test_what_is_active_in_one_thread_is_not_in_another() -> None:
    layer = Linear(16, 16, bias=False).requires_grad_(False)
    nn.init.zeros_(layer.weight)
    x, barrier = torch.ones(1, 16), threading.Barrier(3, timeout=10)
    seen: dict[float | None, set[float]] = {}

    def run(value: float | None) -> None:
        factors = {layer: (torch.ones(1, 16) / 16, torch.full((16, 1), value or 0.0))}
        with adapters(None if value is None else LoraStack([], factors)):
            barrier.wait()
            seen[value] = {float(layer(x).max()) for _ in range(200)}
            barrier.wait()

    threads = [threading.Thread(target=run, args=(value,)) for value in (1.0, 2.0, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1.0: {1.0}, 2.0: {2.0}, None: {0.0}}
    assert active_low_rank(layer) is None


def test_an_inner_choice_ends_with_its_block() -> None:
    layer = Linear(4, 4)
    outer, inner = (
        LoraStack([], {layer: (torch.full((1, 4), value), torch.ones(4, 1))})
        for value in (1.0, 2.0)
    )
    with adapters(outer):
        with adapters(inner):
            assert active_low_rank(layer) is inner.low_rank(layer)
        with adapters(None):
            assert active_low_rank(layer) is None
        assert active_low_rank(layer) is outer.low_rank(layer)
    assert active_low_rank(layer) is None


def test_a_compiled_layer_does_not_ignore_adapters() -> None:
    layer = Linear(8, 8).requires_grad_(False)
    stack = LoraStack([], {layer: (torch.randn(2, 8), torch.randn(8, 2))})
    x = torch.randn(3, 8)
    compiled = torch.compile(layer, backend="eager")
    plain = compiled(x)
    torch.testing.assert_close(plain, layer(x))
    with adapters(stack):
        got, want = compiled(x), layer(x)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, plain)
