"""Foreign quantized formats: exact round trips, names, metadata, and every way a file is bad."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from gesso_core.errors import UnsafeFile, WeightsError
from gesso_core.interchange.formats import detect_format, export_quantized, import_quantized
from gesso_core.interchange.nunchaku import packing
from gesso_core.interchange.nunchaku.linear import Sizes, pack_layer, unpack_layer
from gesso_core.interchange.nunchaku.names import to_classic, to_v2
from gesso_core.models.keys.sana import SANA_DIFFUSERS
from gesso_core.quant.canonical import QuantizedModel
from gesso_core.quant.record import QuantizedLinear, WeightFormat
from gesso_core.safe_files import read_header, read_tensors
from gesso_kernels.number_formats import e2m1_values, pack_consecutive
from safetensors.torch import load_file, save_file
from torch import Tensor

CASES = Path(__file__).parents[1] / "golden" / "cases" / "svdquant"
SANA_LAYERS = (
    "attention.qkv", "attention.out", "cross.q", "cross.out", "ffn.expand", "ffn.project",
)  # fmt: skip


def random_layer(
    rows: int,
    columns: int,
    rank: int = 16,
    weight: WeightFormat = "int4",
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = True,
    tensor_scales: int = 1,
    seed: int = 0,
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    padded = -(-columns // 64) * 64
    group = 64 if weight == "int4" else 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    low, high = (-7, 8) if weight == "int4" else (0, 16)
    codes = torch.randint(low, high, (rows, padded), generator=generator)
    codes[:, columns:] = 0
    scale = (normal(rows, padded // group).abs() + 0.1).to(dtype)
    smooth, down = normal(padded).abs() + 0.5, normal(rank, padded)
    smooth[columns:], down[:, columns:] = 1, 0
    return QuantizedLinear(
        weight=weight,
        activation=weight,
        in_features=columns,
        codes=pack_consecutive(codes),
        scale=scale if weight == "int4" else scale.to(torch.float8_e4m3fn),
        tensor_scale=None if weight == "int4" else normal(tensor_scales).abs() + 0.1,
        smooth=smooth,
        down=down,
        up=normal(rows, rank),
        bias=normal(rows) if bias else None,
    )


def assert_same_layer(got: QuantizedLinear, want: QuantizedLinear) -> None:
    for fact in ("weight", "activation", "in_features", "shift"):
        assert getattr(got, fact) == getattr(want, fact)
    assert_same_tensors(got.tensors(), want.tensors())


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        same = got[name].contiguous().view(torch.uint8) == tensor.contiguous().view(torch.uint8)
        assert same.all(), name


def assert_same_model(got: QuantizedModel, want: QuantizedModel) -> None:
    assert got.layers.keys() == want.layers.keys()
    for name, layer in want.layers.items():
        assert_same_layer(got.layers[name], layer)
    assert_same_tensors(dict(got.plain), dict(want.plain))


# --- one layer ---------------------------------------------------------------------------------


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


# --- SANA --------------------------------------------------------------------------------------


def sana_model(
    weight: WeightFormat = "int4", width: int = 96, hidden: int = 160, *, qk_norm: bool = False
) -> QuantizedModel:
    """Two blocks of a Sana with 16-bit random tensors; only shapes that matter are realistic."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    shapes = {
        "attention.qkv": (3 * width, width),
        "attention.out": (width, width),
        "cross.q": (width, width),
        "cross.out": (width, width),
        "ffn.expand": (2 * hidden, width),
        "ffn.project": (width, hidden),
    }
    layers: dict[str, QuantizedLinear] = {}
    plain: dict[str, Tensor] = {}
    for block in (f"blocks.{i}" for i in range(2)):
        for number, (name, (rows, columns)) in enumerate(shapes.items()):
            bias = name not in ("attention.qkv", "ffn.project")
            rank = 20 if name == "ffn.expand" else 16
            layers[f"{block}.{name}"] = random_layer(
                rows, columns, rank, weight, bias=bias, seed=number,
                tensor_scales=rows if name == "attention.qkv" else 1,
            )  # fmt: skip
        plain[f"{block}.table"] = normal(6, width)
        plain[f"{block}.cross.kv.weight"] = normal(2 * width, width)
        plain[f"{block}.cross.kv.bias"] = normal(2 * width)
        plain[f"{block}.ffn.depthwise.weight"] = normal(2 * hidden, 1, 3, 3)
        plain[f"{block}.ffn.depthwise.bias"] = normal(2 * hidden)
        if qk_norm:
            plain[f"{block}.attention.q_norm.weight"] = normal(width)
            plain[f"{block}.cross.k_norm.weight"] = normal(width)
    plain["patch.weight"], plain["head.table"] = normal(width, 4, 1, 1), normal(2, width)
    plain["caption.norm.weight"] = normal(width)
    return QuantizedModel(layers=layers, plain=plain, made_by={"model": "sana", "rank": 16})


def sana_config(width: int = 96, ratio: float = 160 / 96 + 1e-6) -> dict[str, object]:
    return {
        "_class_name": "SanaTransformer2DModel", "num_attention_heads": width // 32,
        "attention_head_dim": 32, "num_cross_attention_heads": width // 32,
        "cross_attention_head_dim": 32, "mlp_ratio": ratio,
    }  # fmt: skip


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


def leaves(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == layer}


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


def written_without(tmp_path: Path, model: QuantizedModel, *entries: str) -> Path:
    path = tmp_path / "x.safetensors"
    export_quantized(model, path, config=sana_config())
    metadata = read_header(path)["__metadata__"]
    kept = {name: value for name, value in metadata.items() if name not in entries}
    save_file(read_tensors(path), path, kept)
    return path


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


# --- FLUX, names, metadata ---------------------------------------------------------------------


def flux_inputs() -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "scale": {}, "smooth": {}, "branch": {}}
    for case in ("nunchaku_flux_single_block", "nunchaku_flux_double_block"):
        for name, tensor in load_file(CASES / case / "tensors.safetensors").items():
            kind, _, rest = name.partition(".")
            if kind == "input":
                part, _, key = rest.partition(".")
                parts[part][key] = tensor
    return parts


def intermediate_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    parts: dict[str, object] = dict(flux_inputs())
    branch: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parts["branch"].items():
        module, factor = name[: -len(".a.weight")], name[-len("a.weight") :]
        branch.setdefault(module, {})[factor] = tensor
    parts["branch"] = branch
    parts["smooth"] |= {"proj.fuse_when_possible": False}
    for name, content in (parts | changes).items():
        torch.save(content, folder / f"{name}.pt")
    return folder


def flux_outputs() -> dict[str, Tensor]:
    outputs = {}
    for case in ("nunchaku_flux_single_block", "nunchaku_flux_double_block"):
        for name, tensor in load_file(CASES / case / "tensors.safetensors").items():
            kind, _, rest = name.partition(".")
            if kind == "output":
                outputs[rest.partition(".")[2]] = tensor
    return outputs


def test_a_deepcompressor_folder_becomes_the_file_its_own_exporter_makes(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run")
    assert detect_format(folder) == "deepcompressor"
    model = import_quantized(folder)
    assert model.made_by["rank"] == 16
    export_quantized(model, tmp_path / "flux.safetensors")
    assert_same_tensors(read_tensors(tmp_path / "flux.safetensors"), flux_outputs())


def test_lambda_folded_into_the_values_is_kept_beside_the_layer(tmp_path: Path) -> None:
    smooth = flux_inputs()["smooth"] | {"proj.fuse_when_possible": True}
    model = import_quantized(intermediate_folder(tmp_path / "run", smooth=smooth))
    name = "single_transformer_blocks.0.out_proj"
    assert (model.layers[name].smooth == 1).all()
    wanted = smooth["single_transformer_blocks.0.proj_out.linears.0"]
    assert torch.equal(model.plain[f"{name}.smooth_orig"], wanted)
    export_quantized(model, tmp_path / "x.safetensors")
    assert_same_model(import_quantized(tmp_path / "x.safetensors"), model)


@pytest.mark.parametrize("kind", ["nunchaku-v1", "nunchaku-v2", "nunchaku-legacy"])
def test_a_flux_model_returns_from_every_nunchaku_format(tmp_path: Path, kind: str) -> None:
    model = import_quantized(intermediate_folder(tmp_path / "run"))
    path = tmp_path / "flux.safetensors"
    export_quantized(model, path, format=kind)
    assert detect_format(path) == kind
    again = import_quantized(path)
    assert_same_model(again, model)
    shifted = again.layers["transformer_blocks.0.mlp_context_fc2"]
    assert (shifted.activation, shifted.shift) == ("uint4", 0.171875)
    assert again.layers["transformer_blocks.0.norm1.linear"].activation == "16bit"


def test_v2_files_have_the_names_of_the_python_models(tmp_path: Path) -> None:
    model = import_quantized(intermediate_folder(tmp_path / "run"))
    export_quantized(model, tmp_path / "x.safetensors", format="nunchaku-v2")
    names = set(read_header(tmp_path / "x.safetensors"))
    assert "single_transformer_blocks.0.attn.to_out.proj_down" in names
    assert "transformer_blocks.0.attn.add_qkv_proj.smooth_factor" in names
    assert "transformer_blocks.0.attn.norm_added_q.weight" in names
    assert not any("lora_" in name or "mlp_fc2.lora" in name for name in names)


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


# --- ModelOpt ----------------------------------------------------------------------------------


def modelopt_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    m = "blocks.0.attn1.to_q"
    return {
        f"{m}.weight": pack_consecutive(torch.randint(0, 16, (48, 80), generator=generator)),
        f"{m}.weight_scale": (normal(48, 5).abs() + 0.1).to(torch.float8_e4m3fn),
        f"{m}.weight_scale_2": torch.tensor(0.03),
        f"{m}.pre_quant_scale": (normal(80).abs() + 0.5).to(dtype),
        f"{m}.svdquant_lora_a": normal(8, 80).to(dtype),
        f"{m}.svdquant_lora_b": normal(48, 8).to(dtype),
        f"{m}.input_scale": torch.tensor(0.005),
        f"{m}.bias": normal(48).to(dtype),
        "proj_out.weight": normal(4, 4).to(dtype),
    }


def modelopt_folder(folder: Path, tensors: dict[str, Tensor], algorithm: str = "NVFP4_SVD") -> Path:
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    claims = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["proj_out"]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": claims}))
    return folder


def test_a_modelopt_layer_stands_for_the_same_weight(tmp_path: Path) -> None:
    tensors = modelopt_tensors()
    folder = modelopt_folder(tmp_path / "m", tensors)
    assert detect_format(folder) == "modelopt"
    model = import_quantized(folder)
    layer = model.layers["blocks.0.attn1.to_q"]
    assert (layer.in_features, layer.padded_in, layer.rank) == (80, 128, 8)
    parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if "to_q" in n}
    low, high = parts["weight"] & 15, parts["weight"] >> 4
    values = e2m1_values(torch.stack([low, high], -1).flatten(1)).double()
    scales = parts["weight_scale"].double().repeat_interleave(16, 1) * 0.03
    smoothed = parts["pre_quant_scale"].double()
    a, b = parts["svdquant_lora_a"].double(), parts["svdquant_lora_b"].double()
    wanted = (values * scales + b @ a) * smoothed
    # λ = 1/pre_quant_scale and the down factor are rounded to bfloat16, by 2⁻⁸ at most.
    bound = ((values * scales).abs() + b.abs() @ a.abs()) * smoothed * 1.01 * 2**-8
    assert ((layer.dense().double() - wanted).abs() <= bound + 1e-6).all()
    assert torch.equal(model.plain["proj_out.weight"], tensors["proj_out.weight"])


def test_a_modelopt_file_alone_is_recognised(tmp_path: Path) -> None:
    save_file(modelopt_tensors(), tmp_path / "x.safetensors")
    assert detect_format(tmp_path / "x.safetensors") == "modelopt"
    assert set(import_quantized(tmp_path / "x.safetensors").layers) == {"blocks.0.attn1.to_q"}


def modelopt_sana(*, other_scale: bool = False) -> dict[str, Tensor]:
    """q, k and v of one block and its table; k has the scale of another input if asked for."""
    tensors = {"transformer_blocks.0.scale_shift_table": torch.ones(6, 80)}
    for number, part in enumerate("qkv"):
        for name, tensor in modelopt_tensors().items():
            if name.startswith("blocks.0.attn1.to_q."):
                leaf = name.rpartition(".")[2]
                changes = leaf.startswith("svdquant") or (leaf == "pre_quant_scale" and other_scale)
                moved = tensor + number if changes else tensor
                tensors[f"transformer_blocks.0.attn1.to_{part}.{leaf}"] = moved
    return tensors


def test_a_modelopt_sana_gets_our_names_with_q_k_and_v_fused(tmp_path: Path) -> None:
    tensors = modelopt_sana()
    save_file(tensors, tmp_path / "x.safetensors")
    model = import_quantized(tmp_path / "x.safetensors")
    assert set(model.layers) == {"blocks.0.attention.qkv"}
    assert set(model.plain) == {"blocks.0.table"}
    layer = model.layers["blocks.0.attention.qkv"]
    assert (layer.out_features, layer.rank) == (3 * 48, 3 * 8)
    branch = layer.up.double() @ layer.down.double()[:, :80]
    m = "transformer_blocks.0.attn1.to_v"
    scale, a = tensors[f"{m}.pre_quant_scale"].double(), tensors[f"{m}.svdquant_lora_a"].double()
    wanted = tensors[f"{m}.svdquant_lora_b"].double() @ (a * scale)
    torch.testing.assert_close(branch[96:], wanted, atol=0.1, rtol=2**-8)


def test_modelopt_layers_with_different_scales_of_one_input_are_refused(tmp_path: Path) -> None:
    save_file(modelopt_sana(other_scale=True), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="scale the same input differently"):
        import_quantized(tmp_path / "x.safetensors")


def test_another_modelopt_algorithm_is_refused(tmp_path: Path) -> None:
    folder = modelopt_folder(tmp_path / "m", modelopt_tensors(), "FP8")
    with pytest.raises(WeightsError, match="quantized as FP8"):
        import_quantized(folder)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("svdquant_lora_b", None, "one factor of its branch"),
        ("weight_scale_2", None, "lacks weight_scale_2"),
        ("weight_scale", torch.ones(128, 8).to(torch.float8_e4m3fn), "padded or swizzled"),
        ("weight_scale", torch.ones(48, 5), "expected uint8 with"),
        ("weight_scale", None, "lacks its weight_scale"),
    ],
)
def test_a_damaged_modelopt_layer_is_named(
    tmp_path: Path, leaf: str, change: Tensor | None, message: str
) -> None:
    tensors = modelopt_tensors()
    name = f"blocks.0.attn1.to_q.{leaf}"
    tensors = {n: t for n, t in tensors.items() if n != name}
    tensors |= {} if change is None else {name: change}
    with pytest.raises(WeightsError, match=message):
        import_quantized(modelopt_folder(tmp_path / "m", tensors))


# --- bad files ---------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "whole numbers": Tensor.long,
    "float64": Tensor.double,
    "8 bit": lambda t: t.to(torch.int8),
    "flat": Tensor.flatten,
    "a row less": lambda t: t[:-1] if t.ndim else t,
    "empty": lambda t: t[:0] if t.ndim else t,
    "one number": lambda t: t.flatten()[0],
    "transposed": lambda t: t.T if t.ndim == 2 else t[None],
    "infinite": lambda t: t / 0 if t.is_floating_point() and t.element_size() > 1 else t.float(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["nunchaku-v1", "modelopt", "deepcompressor"])
def test_a_damaged_tensor_is_refused_or_makes_a_layer_that_can_run(
    tmp_path: Path, kind: str, damage: str
) -> None:
    for number, write in enumerate(files_with_each_tensor(kind)):
        path = tmp_path / str(number)
        write(path, DAMAGES[damage])
        try:
            model = import_quantized(path)
        except WeightsError:
            continue
        for layer, record in model.layers.items():
            record.require_valid(layer)


Write = Callable[[Path, Callable[[Tensor], Tensor]], object]


def files_with_each_tensor(kind: str) -> Iterator[Write]:
    """A writer of a file per tensor, in which that tensor is changed."""
    if kind == "deepcompressor":
        for part, tensors in flux_inputs().items():
            if part != "branch":
                for name in [n for n in tensors if n.startswith("transformer_blocks.0.")][::3]:
                    yield partial(changed_intermediate, part, name)
        return
    if kind == "modelopt":
        tensors, metadata = modelopt_tensors(), None
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder, "x.safetensors")
            export_quantized(sana_model(), path, config=sana_config())
            tensors, metadata = load_file(path), read_header(path)["__metadata__"]
    for name in [n for n in tensors if "_blocks.1." not in n]:
        yield partial(changed_file, tensors, metadata, name)


def changed_file(
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None,
    name: str,
    path: Path,
    damage: Callable[[Tensor], Tensor],
) -> None:
    save_file(tensors | {name: damage(tensors[name]).contiguous()}, path, metadata)


def changed_intermediate(
    part: str, name: str, path: Path, damage: Callable[[Tensor], Tensor]
) -> None:
    tensors: dict[str, object] = dict(flux_inputs()[part])
    tensors[name] = damage(flux_inputs()[part][name])
    extra = {"proj.fuse_when_possible": False} if part == "smooth" else {}
    intermediate_folder(path, **{part: tensors | extra})


@pytest.mark.parametrize("key", ["gesso_layers", "config", "quantization_config", "gesso_made_by"])
def test_damaged_metadata_of_a_nunchaku_file_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.safetensors"
    export_quantized(sana_model(), path, config=sana_config())
    tensors, metadata = load_file(path), read_header(path)["__metadata__"]
    for text in ("{", "[]", "5", "null", "[" * 50_000):
        save_file(tensors, path, metadata | {key: text})
        with pytest.raises(WeightsError, match=f"metadata entry {key!r} is not"):
            import_quantized(path)


@pytest.mark.parametrize("value", [-1, "x", 65, 10**9, 2.5, True, None])
def test_sizes_of_a_nunchaku_file_that_cannot_be_are_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.safetensors"
    export_quantized(sana_model(), path, config=sana_config())
    tensors, metadata = load_file(path), read_header(path)["__metadata__"]
    for count in ("out_features", "columns", "rank"):
        sizes = json.loads(metadata["gesso_layers"])
        sizes["transformer_blocks.0.attn.out_proj"][count] = value
        save_file(tensors, path, metadata | {"gesso_layers": json.dumps(sizes)})
        if (count, value) != ("out_features", 65):  # a layer may have any number of rows
            with pytest.raises(WeightsError):
                import_quantized(path)


@pytest.mark.parametrize("value", [-1, "x", [1], 1e308, float("nan"), True])
@pytest.mark.parametrize("key", ["num_attention_heads", "attention_head_dim", "mlp_ratio"])
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "x.safetensors"
    export_quantized(sana_model(), path, config=sana_config())
    tensors, metadata = load_file(path), read_header(path)["__metadata__"]
    config = sana_config() | {key: value}
    save_file(tensors, path, metadata | {"config": json.dumps(config)})
    with pytest.raises(WeightsError, match=f"has {key} .*expected a number from 0"):
        import_quantized(path)


def good_file(tmp_path: Path) -> Path:
    return written_without(tmp_path, sana_model())


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    tensors, metadata = read_tensors(path), read_header(path)["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = good_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        import_quantized(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is missing"):
        detect_format(tmp_path / "absent.safetensors")


def test_classic_and_v2_names_in_one_file_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        name = "transformer_blocks.0.attn.out_proj.lora_down"
        tensors[name.replace("lora_down", "proj_down")] = tensors.pop(name)

    with pytest.raises(WeightsError, match=r"classic names .* beside those of v2"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_fp4_tensors_with_int4_metadata_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        claims = json.loads(metadata["quantization_config"])
        claims["weight"]["dtype"] = "fp4_e2m1_all"
        metadata["quantization_config"] = json.dumps(claims)

    with pytest.raises(WeightsError, match="says fp4_e2m1_all weights, the tensors are int4"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_another_rank_in_the_metadata_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        claims = json.loads(metadata["quantization_config"])
        metadata["quantization_config"] = json.dumps(claims | {"rank": 128})

    with pytest.raises(WeightsError, match="says rank 128, the layers have rank 32"):
        import_quantized(rewritten(good_file(tmp_path), change))


@pytest.mark.parametrize("what", ["rank", "precision"])
def test_layers_that_differ_in_rank_or_precision_are_refused(tmp_path: Path, what: str) -> None:
    other = random_layer(96, 96, 64) if what == "rank" else random_layer(96, 96, 32, "nvfp4")

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        layer = "transformer_blocks.1.cross_attn.q_linear"
        tensors |= {f"{layer}.{leaf}": t for leaf, t in pack_layer(layer, other).items()}

    with pytest.raises(WeightsError, match=f"differ in {what}"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_exporting_layers_of_two_formats_is_refused(tmp_path: Path) -> None:
    model = lite_model("int4")
    layers = {**model.layers, "other": random_layer(128, 128, 32, "nvfp4")}
    with pytest.raises(WeightsError, match="differ in precision"):
        export_quantized(QuantizedModel(layers=layers, plain={}), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("lora_up", r"lacks \['lora_up'\]"),
        ("wscales", r"lacks \['wscales'\]"),
        ("qweight", "qweight is missing"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, leaf: str, message: str) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        del tensors[f"transformer_blocks.0.attn.out_proj.{leaf}"]

    with pytest.raises(WeightsError, match=message):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        name = "transformer_blocks.0.attn.out_proj.smooth"
        tensors[name] = tensors[name].repeat(2)

    with pytest.raises(WeightsError, match=r"transformer_blocks\.0\.attn\.out_proj"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_an_unknown_layer_of_a_sana_file_is_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        layer = "transformer_blocks.0.attn.gate_proj"
        packed = pack_layer(layer, random_layer(96, 96, 32))
        tensors |= {f"{layer}.{leaf}": t for leaf, t in packed.items()}

    with pytest.raises(WeightsError, match=r"gate_proj is no 4-bit layer of SANA"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_a_file_without_quantized_layers_is_refused(tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="no quantized layers of a known format"):
        import_quantized(tmp_path / "x.safetensors")


def test_sizes_larger_than_the_tensors_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        sizes = json.loads(metadata["gesso_layers"])
        sizes["transformer_blocks.0.cross_attn.q_linear"]["columns"] = 4096
        metadata["gesso_layers"] = json.dumps(sizes)

    with pytest.raises(WeightsError, match="smaller than the 96x4096"):
        import_quantized(rewritten(good_file(tmp_path), change))


@pytest.mark.parametrize("kind", ["deepcompressor", "modelopt", "gguf"])
def test_formats_that_are_import_only_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(WeightsError, match="use one of canonical, nunchaku-v1"):
        export_quantized(sana_model(), tmp_path / "x", format=kind)


def test_a_legacy_folder_with_one_file_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "legacy"
    export_quantized(sana_model(), folder, format="nunchaku-legacy", config=sana_config())
    rest = read_tensors(folder / "unquantized_layers.safetensors")
    rest["transformer_blocks.0.scale_shift_table"] = torch.zeros(6, 96)
    save_file(rest, folder / "unquantized_layers.safetensors")
    with pytest.raises(WeightsError, match="both hold transformer_blocks"):
        import_quantized(folder)
    (folder / "unquantized_layers.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"unquantized_layers\.safetensors is missing"):
        import_quantized(folder)


def test_a_deepcompressor_folder_names_what_it_lacks(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run")
    (folder / "branch.pt").unlink()
    with pytest.raises(WeightsError, match=r"branch\.pt is missing"):
        import_quantized(folder)


def test_a_deepcompressor_folder_must_say_where_lambda_is(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run", smooth=flux_inputs()["smooth"])
    with pytest.raises(WeightsError, match=r"proj\.fuse_when_possible"):
        import_quantized(folder)


def test_scales_of_another_run_are_noticed(tmp_path: Path) -> None:
    scale = flux_inputs()["scale"]
    name = "single_transformer_blocks.0.proj_mlp.weight.scale.0"
    scale[name] = scale[name] * 1.37
    folder = intermediate_folder(tmp_path / "run", scale=scale)
    with pytest.raises(WeightsError, match="do not lie on the grid"):
        import_quantized(folder)


def test_a_missing_weight_of_a_deepcompressor_run_is_named(tmp_path: Path) -> None:
    model = flux_inputs()["model"]
    del model["transformer_blocks.0.attn.to_k.weight"]
    folder = intermediate_folder(tmp_path / "run", model=model)
    with pytest.raises(WeightsError, match=r"transformer_blocks\.0\.attn\.to_k\.weight is missing"):
        import_quantized(folder)


def test_another_model_than_flux_is_refused_from_deepcompressor(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run", model={"blocks.0.weight": torch.ones(2, 2)})
    with pytest.raises(WeightsError, match="only FLUX transformers"):
        import_quantized(folder)


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("opened",)


def test_a_deepcompressor_pickle_that_holds_code_stays_closed(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run", scale={"x": Malicious()})
    with pytest.raises(UnsafeFile, match="more than tensors"):
        import_quantized(folder)


def test_a_pickle_given_as_a_file_stays_closed(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(UnsafeFile, match="is a pickle"):
        detect_format(tmp_path / "x.pt")
