"""A Sana in Nunchaku's formats: what returns, what the engine reads, what it cannot hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.interchange.formats import detect_format, export_quantized, import_quantized
from gesso_core.interchange.nunchaku.linear import unpack_layer
from gesso_core.models.keys.sana import SANA_DIFFUSERS
from gesso_core.quant.canonical import QuantizedModel
from gesso_core.quant.record import WeightFormat
from gesso_core.safe_files import read_header, read_tensors
from quantized_files import (
    assert_same_model,
    assert_same_tensors,
    leaves,
    random_layer,
    sana_config,
    sana_model,
    written_without,
)
from safetensors.torch import save_file


@pytest.mark.parametrize("kind", ["nunchaku-v1", "nunchaku-v2", "nunchaku-legacy"])
@pytest.mark.parametrize("weight", ["int4", "nvfp4"])
def test_a_sana_returns_from_a_nunchaku_file_exactly(
    tmp_path: Path, weight: WeightFormat, kind: str
) -> None:
    model = sana_model(weight, qk_norm=True)
    path = tmp_path / ("out" if kind == "nunchaku-legacy" else "out.safetensors")
    export_quantized(model, path, format=kind, config=sana_config())
    assert detect_format(path) == kind
    again = import_quantized(path)
    assert_same_model(again, model)
    assert again.made_by == {**model.made_by, "config": sana_config()}


def test_the_engine_layout_of_sana_is_the_published_one(tmp_path: Path) -> None:
    model = sana_model()
    export_quantized(model, tmp_path / "x.safetensors", config=sana_config())
    tensors = read_tensors(tmp_path / "x.safetensors")
    block = "transformer_blocks.1"
    qkv = unpack_layer("qkv", leaves(tensors, f"{block}.attn.qkv_proj"))
    ours = model.layers["blocks.1.attention.qkv"]
    assert qkv.out_features == 3 * 128  # 96 channels are padded to 4 heads of 32
    assert torch.equal(qkv.codes[:96, :64], ours.codes[:96])
    for head in range(3):
        k, v = 96 + 32 * head, 192 + 32 * head
        start = 128 + 64 * head
        assert torch.equal(qkv.codes[start : start + 32, :64], ours.codes[k : k + 32])
        assert torch.equal(qkv.codes[start + 32 : start + 64, :64], ours.codes[v : v + 32])
    expand = unpack_layer("expand", leaves(tensors, f"{block}.ff.inverted_conv"))
    mine = model.layers["blocks.1.ffn.expand"]
    assert expand.out_features == 2 * 256
    assert torch.equal(expand.codes[0:320:2, :64], mine.codes[:160])  # values
    assert torch.equal(expand.codes[1:320:2, :64], mine.codes[160:])  # gates
    depthwise = tensors[f"{block}.ff.depth_conv.weight"]
    assert depthwise.shape == (2 * 256, 3, 3, 1)
    kernel = model.plain["blocks.1.ffn.depthwise.weight"]
    assert torch.equal(depthwise[7, :, :, 0], kernel[160 + 3, 0])
    assert f"{block}.attn.qkv_proj.bias" not in tensors
    assert tensors[f"{block}.cross_attn.kv_linear.weight"].dtype == torch.bfloat16
    assert tensors["patch_embed.proj.weight"].shape == (96, 4, 1, 1)


def test_a_foreign_sana_file_is_cut_to_its_configuration(tmp_path: Path) -> None:
    """Without our own entry the sizes come from the configuration; the branch keeps whole tiles."""
    model = sana_model()
    path = written_without(tmp_path, model, "gesso_layers", "gesso_made_by")
    again = import_quantized(path)
    assert again.made_by["imported_from"] == "nunchaku-v1"
    for name, layer in model.layers.items():
        assert again.layers[name].rank == 32  # 20 in one layer is stored as 32 in all
        assert again.layers[name].in_features == layer.in_features
        torch.testing.assert_close(again.layers[name].dense(), layer.dense())
    assert_same_tensors(dict(again.plain), dict(model.plain))


def test_a_hidden_width_that_was_padded_before_quantizing_is_cut_if_unused(tmp_path: Path) -> None:
    """The published file has 5632 hidden channels for a model of 5600."""
    for used in (False, True):
        model = sana_model(hidden=192)
        depthwise = dict(model.plain)
        if not used:
            for name in [n for n in depthwise if ".depthwise." in n]:
                depthwise[name][160:192], depthwise[name][352:] = 0, 0
        model = QuantizedModel(layers=model.layers, plain=depthwise)
        path = written_without(tmp_path, model, "gesso_layers", "gesso_made_by")
        again = import_quantized(path)
        hidden = 192 if used else 160
        assert again.layers["blocks.0.ffn.project"].in_features == hidden
        assert again.plain["blocks.0.ffn.depthwise.weight"].shape == (2 * hidden, 1, 3, 3)
        assert int(again.made_by["config"]["mlp_ratio"] * 96) == hidden


def test_pag_weights_of_a_sana_file_are_left_out(tmp_path: Path) -> None:
    path = written_without(tmp_path, sana_model())
    metadata = read_header(path)["__metadata__"]
    extra = {"transformer_blocks.0.attn.pag_to_v.weight": torch.zeros(4, 4)}
    save_file(read_tensors(path) | extra, path, metadata)
    assert not any("pag" in name for name in import_quantized(path).plain)


def test_a_layer_that_the_engine_has_in_16_bit_is_refused(tmp_path: Path) -> None:
    model = sana_model()
    layers = {**model.layers, "blocks.0.ffn.gate": random_layer(192, 96)}
    with pytest.raises(WeightsError, match=r"ffn\.gate in 16 bit; leave that layer out"):
        export_quantized(QuantizedModel(layers=layers, plain=model.plain), tmp_path / "x")


def test_keys_and_values_of_the_text_are_written_in_16_bit(tmp_path: Path) -> None:
    model, path = sana_model(), tmp_path / "x.safetensors"
    plain = {n: t for n, t in model.plain.items() if not n.startswith("blocks.0.cross.kv")}
    text = replace(random_layer(192, 96, seed=8), activation="16bit")
    quantized = QuantizedModel(layers={**model.layers, "blocks.0.cross.kv": text}, plain=plain)
    export_quantized(quantized, path, config=sana_config())
    back = import_quantized(path)
    assert back.layers.keys() == model.layers.keys()
    assert back.plain.keys() == model.plain.keys()
    weight = back.plain["blocks.0.cross.kv.weight"]
    assert torch.equal(weight, text.dense().to(text.smooth.dtype))
    assert text.bias is not None
    assert torch.equal(back.plain["blocks.0.cross.kv.bias"], text.bias)


def test_a_block_with_a_layer_in_16_bit_is_refused(tmp_path: Path) -> None:
    model = sana_model()
    layers = {n: x for n, x in model.layers.items() if n != "blocks.1.cross.q"}
    with pytest.raises(WeightsError, match=r"blocks\.1\.cross\.q is missing"):
        export_quantized(QuantizedModel(layers=layers, plain=model.plain), tmp_path / "x")


def test_the_plain_names_of_sana_are_those_of_diffusers(tmp_path: Path) -> None:
    export_quantized(sana_model(), tmp_path / "x.safetensors", config=sana_config())
    outside = {n for n in read_header(tmp_path / "x.safetensors") if "transformer_blocks" not in n}
    foreign = {str(rule.foreign).split(".{")[0] for rule in SANA_DIFFUSERS}
    assert all(any(n.startswith(f) for f in foreign) for n in outside - {"__metadata__"})
