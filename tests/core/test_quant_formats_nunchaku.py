"""Nunchaku's layouts: one layer packed and unpacked, names, metadata, the Lite folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.interchange.formats import detect_format, export_quantized, import_quantized
from gesso_core.interchange.nunchaku import packing
from gesso_core.interchange.nunchaku.linear import Sizes, pack_layer, unpack_layer
from gesso_core.interchange.nunchaku.names import to_classic, to_v2
from gesso_core.quant.canonical import QuantizedModel
from gesso_core.quant.record import QuantizedLinear, WeightFormat
from gesso_core.safe_files import read_header, read_tensors
from quantized_files import (
    CASES,
    assert_same_layer,
    assert_same_model,
    assert_same_tensors,
    leaves,
    random_layer,
    sana_config,
    sana_model,
)
from safetensors.torch import load_file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rank", [16, 20, 32])
@pytest.mark.parametrize("weight", ["int4", "nvfp4"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (160, 192), (96, 130), (300, 64)])
def test_a_layer_survives_the_nunchaku_layout_exactly(
    rows: int, columns: int, weight: WeightFormat, rank: int, bias: bool, dtype: torch.dtype
) -> None:
    scales = rows if weight == "nvfp4" and rank == 20 else 1
    layer = random_layer(rows, columns, rank, weight, dtype, bias=bias, tensor_scales=scales)
    tensors = pack_layer("x", layer)
    stored_rows, stored_bytes = tensors["qweight"].shape
    assert (stored_rows % 128, stored_bytes % 64) == (0, 0)
    assert_same_layer(unpack_layer("x", tensors, sizes=Sizes.of(layer)), layer)


def test_without_known_sizes_the_padded_layer_computes_the_same() -> None:
    layer = random_layer(96, 130)
    padded = unpack_layer("x", pack_layer("x", layer))
    assert padded.dense().shape == (128, 256)
    torch.testing.assert_close(padded.dense()[:96, :130], layer.dense(), atol=0, rtol=0)
    assert not padded.dense()[:96, 130:].any()


def test_zeros_in_a_published_smoothing_vector_read_as_one() -> None:
    tensors = pack_layer("x", random_layer(128, 64))
    smooth = packing.unpack_vector(tensors["smooth"])
    smooth[64:] = 0
    layer = unpack_layer("x", tensors | {"smooth": packing.pack_vector(smooth)})
    assert (layer.smooth[64:] == 1).all()
    assert layer.dense().isfinite().all()


@pytest.mark.parametrize(
    "case",
    ["nunchaku_pack_int4_padded", "nunchaku_pack_nvfp4_qkv", "nunchaku_linear_state_dict_shift"],
)
def test_a_file_read_and_written_again_is_the_same_outside_the_padding(case: str) -> None:
    stored = load_file(CASES / case / "tensors.safetensors")
    tensors = {n.removeprefix("output."): t for n, t in stored.items() if n.startswith("output.")}
    fp8 = torch.float8_e4m3fn
    tensors = {n: t.view(fp8) if t.dtype == torch.uint8 else t for n, t in tensors.items()}
    rows, columns = tensors["qweight"].shape[0], tensors["smooth"].shape[0]
    tensors.setdefault("lora_down", torch.zeros(columns, 16, dtype=torch.bfloat16))
    tensors.setdefault("lora_up", torch.zeros(rows, 16, dtype=torch.bfloat16))
    layer = unpack_layer(case, tensors, after_gelu="shift" in case)
    again = pack_layer(case, layer)
    assert_same_tensors({name: again[name] for name in tensors}, tensors)
    assert layer.shift == (0.171875 if "shift" in case else 0)


def test_the_bias_carries_what_the_shift_moves_into_the_branch() -> None:
    """Calibration shifts the branch's input too, the engine does not: one function, two biases."""
    given = load_file(CASES / "nunchaku_linear_state_dict_shift" / "tensors.safetensors")
    tensors = {n[7:]: t for n, t in given.items() if n.startswith("output.")}
    layer = unpack_layer("x", tensors, after_gelu=True)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    branch = (layer.up.double() @ layer.down.double()).T
    calibration = (x + layer.shift) @ branch + given["input.bias"].double()
    engine = x @ branch + layer.bias.double()
    error = (engine - calibration).abs().max()
    forgotten = (x @ branch + given["input.bias"].double() - calibration).abs().max()
    assert error < 0.02 * forgotten


def test_adaln_rows_interleave_and_return() -> None:
    x = torch.arange(12)
    assert packing.interleave_rows(x, 3).tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(packing.deinterleave_rows(packing.interleave_rows(x, 3), 3), x)


def test_8_bit_layers_are_refused_with_what_to_do() -> None:
    layer = replace(random_layer(128, 128), weight="nvfp4", activation="16bit")
    layer = replace(layer, scale=torch.ones(128, 8).to(torch.float8_e4m3fn))
    with pytest.raises(WeightsError, match="quantize again --to int4 or nvfp4"):
        pack_layer("blocks.0.ffn.expand", layer)


def test_v2_names_invert() -> None:
    for name in ("transformer_blocks.7.mlp_fc2.lora_up", "x_embedder.weight"):
        assert to_classic(to_v2(name)) == name
    assert to_classic("layers.0.attn.to_q.proj_up", modules=False) == "layers.0.attn.to_q.lora_up"


def test_the_metadata_names_precision_and_rank(tmp_path: Path) -> None:
    export_quantized(sana_model("nvfp4"), tmp_path / "x.safetensors", config=sana_config())
    metadata = read_header(tmp_path / "x.safetensors")["__metadata__"]
    claims = json.loads(metadata["quantization_config"])
    assert claims["weight"]["dtype"] == "fp4_e2m1_all"
    assert claims["weight"]["group_size"] == 16
    assert claims["rank"] == 32
    assert metadata["model_class"] == "NunchakuSanaTransformer2DModel"
    assert json.loads(metadata["config"])["mlp_ratio"] > 1.6


def lite_model(weight: WeightFormat) -> QuantizedModel:
    layers = {
        "layers.0.self_attention.to_q": random_layer(128, 128, 32, weight),
        "layers.0.feed_forward.down": random_layer(128, 256, 32, weight, seed=1),
        "final_linear": weight_only_record(),
    }
    plain = {"x_embedder.weight": torch.ones(4, 4).bfloat16()}
    return QuantizedModel(layers=layers, plain=plain, made_by={"model": "z", "rank": 32})


def weight_only_record() -> QuantizedLinear:
    layer = random_layer(128, 128)
    empty = {"down": layer.down[:0], "up": layer.up[:, :0]}
    ones = torch.ones_like(layer.smooth)
    return replace(layer, zero=-7 * layer.scale, activation="16bit", smooth=ones, **empty)


@pytest.mark.parametrize("weight", ["int4", "nvfp4"])
def test_a_lite_folder_has_what_its_loader_declares_and_returns(
    tmp_path: Path, weight: WeightFormat
) -> None:
    model = lite_model(weight)
    export_quantized(model, tmp_path / "lite", format="nunchaku-lite", config={"depth": 1})
    assert detect_format(tmp_path / "lite") == "nunchaku-lite"
    config = json.loads((tmp_path / "lite" / "config.json").read_text())
    claims = config["quantization_config"]
    assert claims["svdq_w4a4"]["precision"] == weight
    assert claims["svdq_w4a4"]["rank"] == 32
    assert claims["awq_w4a16"]["targets"] == ["final_linear"]
    tensors = read_tensors(tmp_path / "lite" / "diffusion_pytorch_model.safetensors")
    found = set(leaves(tensors, "layers.0.self_attention.to_q"))
    wanted = {"qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "bias"}
    assert found == wanted | ({"wcscales", "wtscale"} if weight == "nvfp4" else set())
    assert tensors["final_linear.wscales"].shape == (2, 128)
    again = import_quantized(tmp_path / "lite")
    assert_same_model(again, model)
    assert again.made_by["config"] == {"depth": 1}


def test_lite_refuses_what_diffusers_has_as_separate_layers(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="export this model as nunchaku-v1"):
        export_quantized(sana_model(), tmp_path / "x", format="nunchaku-lite")


def test_exporting_layers_of_two_formats_is_refused(tmp_path: Path) -> None:
    model = lite_model("int4")
    layers = {**model.layers, "other": random_layer(128, 128, 32, "nvfp4")}
    with pytest.raises(WeightsError, match="differ in precision"):
        export_quantized(QuantizedModel(layers=layers, plain={}), tmp_path / "x.safetensors")
