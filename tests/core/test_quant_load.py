"""Quantized Sana from a folder: what was written is what runs, and what does not fit is refused."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gesso_core.errors import ConfigError, GessoError, WeightsError
from gesso_core.hub import load_sana, resolve_parts, trained_dtype, verify, weights_hash
from gesso_core.hub.manifest import write_manifest
from gesso_core.hub.quantized import load_quantized_sana, quantized_summary, weight_bytes
from gesso_core.hub.store import SHIPPED
from gesso_core.layers.linear import PointwiseConv
from gesso_core.models.sana import SANA_CONFIGS, Sana
from gesso_core.pipelines.load import load_denoiser
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_core.quant.canonical import (
    CANONICAL_FILE,
    METADATA_KEY,
    QuantizedModel,
    read_canonical,
    write_canonical,
)
from gesso_core.quant.layer_map import (
    LAYER_MAPS,
    LayerRule,
    find_layers,
    layer_map,
    matrix_of,
    planned_bytes,
)
from gesso_core.quant.modules import SVDQuantLinear
from gesso_core.quant.quantizers import fake_quantize_input
from gesso_core.quant.record import QuantizedLinear
from gesso_core.registry import MODELS, ModelEntry
from gesso_kernels.modes import Mode
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Change = Callable[[QuantizedModel], QuantizedModel]


@pytest.fixture
def folder(quantized_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the quantized transformer that a test may damage."""
    return Path(shutil.copytree(quantized_pipeline / "transformer", tmp_path / "copy"))


def rewrite(folder: Path, change: Change) -> None:
    write_canonical(folder / CANONICAL_FILE, change(read_canonical(folder / CANONICAL_FILE)))


@torch.no_grad()
def forward(model: Sana) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    latent = torch.randn(2, 8, 4, 4, generator=generator)
    text = torch.randn(2, 5, 576, generator=generator)
    velocity: Tensor = model(latent, torch.tensor([100.0, 700.0]), text)
    return velocity


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class FakeQuantized(nn.Module):
    """A layer as calibration computes it: everything dequantized, in fp32."""

    def __init__(self, record: QuantizedLinear) -> None:
        super().__init__()
        self.record, self.residual = record, record.residual()
        self.branch = record.up.float() @ record.down.float()

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        record = self.record
        rows = F.pad(x.flatten(0, -2), (0, record.padded_in - record.in_features))
        h = fake_quantize_input(rows / record.smooth.float(), record.activation)
        y = h @ self.residual.T + rows @ self.branch.T
        y = y if record.bias is None else y + record.bias.float()
        y = F.silu(y) if activation == "silu" else y
        return y.view(*x.shape[:-1], -1)


def calibrated_model(pipeline: Path, content: QuantizedModel) -> Sana:
    """The 16-bit model with every quantized layer replaced by its calibration-time form."""
    model = load_sana(pipeline / "transformer")
    model.load_state_dict(dict(content.plain), strict=False)
    for name, record in content.layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FakeQuantized(record))
    return model


def test_the_loaded_model_computes_what_calibration_computed(
    tiny_pipeline: Path, quantized_pipeline: Path
) -> None:
    content = read_canonical(quantized_pipeline / "transformer" / CANONICAL_FILE)
    expected = forward(calibrated_model(tiny_pipeline, content))
    loaded = load_quantized_sana(quantized_pipeline / "transformer", mode="reference")
    assert distance(forward(loaded), expected) < 1e-3


def test_quantization_changes_the_velocity_by_a_few_percent(
    tiny_pipeline: Path, quantized_pipeline: Path
) -> None:
    exact = forward(load_sana(tiny_pipeline / "transformer"))
    folder = quantized_pipeline / "transformer"
    weights, both = (forward(load_quantized_sana(folder, mode=mode)) for mode in MODES)
    assert 0.02 < distance(weights, exact) < distance(both, exact) < 0.2


MODES: tuple[Mode, ...] = ("dequantized", "reference")


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_complete_and_says_what_it_is(quantized_pipeline: Path, mode: Mode) -> None:
    model = load_quantized_sana(quantized_pipeline / "transformer", mode=mode)
    assert not model.training
    assert all(not parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    summary = quantized_summary(model)
    assert summary is not None
    assert str(summary) == f"svdquant-int4-r8 ({mode})"
    assert summary.layers == {mode: 14}
    assert summary.weight_bytes == weight_bytes(model)
    # Both are fp32; rank 8 is a large part of layers this small.
    assert summary.ratio == pytest.approx(2.0 if mode == "dequantized" else 2.2, rel=0.05)


def test_an_unquantized_model_has_no_summary(tiny_pipeline: Path) -> None:
    assert quantized_summary(load_sana(tiny_pipeline / "transformer")) is None


def test_on_a_cpu_the_dense_weights_are_used_by_default(quantized_pipeline: Path) -> None:
    model = load_quantized_sana(quantized_pipeline / "transformer")
    layers = [module for module in model.modules() if isinstance(module, SVDQuantLinear)]
    assert {layer.mode for layer in layers} == {"dequantized"}
    assert {layer.weight.dtype for layer in layers} == {torch.float32}


def test_chunks_of_the_ffn_are_for_dense_layers_only(quantized_pipeline: Path) -> None:
    model = load_quantized_sana(quantized_pipeline / "transformer")
    expected = forward(model)
    model.chunk_ffn(4)
    assert torch.equal(forward(model), expected)


def test_a_mode_that_the_device_has_not_is_refused_with_the_best_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"w8a8_fp8 cannot run int4 .* is dequantized,") as told:
        load_quantized_sana(folder, mode="w8a8_fp8")
    assert told.value.field == "mode"


def test_a_number_format_that_breaks_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="trained for bfloat16 and cannot be used in float16"):
        load_quantized_sana(folder, dtype=torch.float16)


def without_layer(content: QuantizedModel) -> QuantizedModel:
    layers = {k: v for k, v in content.layers.items() if k != "blocks.1.cross.q"}
    return replace(content, layers=layers)


def renamed(content: QuantizedModel, name: str) -> QuantizedModel:
    layers = dict(content.layers)
    layers[name] = layers.pop("blocks.1.cross.q")
    return replace(content, layers=layers)


def with_foreign_layer(content: QuantizedModel) -> QuantizedModel:
    return renamed(content, "blocks.7.cross.q")


def with_a_layer_in_the_place_of_a_norm(content: QuantizedModel) -> QuantizedModel:
    return renamed(content, "blocks.1.cross.q_norm")


def with_swapped_layers(content: QuantizedModel) -> QuantizedModel:
    names = ("blocks.0.attention.qkv", "blocks.0.attention.out")
    swapped = dict(zip(names, (content.layers[name] for name in reversed(names)), strict=True))
    return replace(content, layers={**content.layers, **swapped})


def without_bias(content: QuantizedModel) -> QuantizedModel:
    record = replace(content.layers["blocks.0.cross.q"], bias=None)
    return replace(content, layers={**content.layers, "blocks.0.cross.q": record})


def without_table(content: QuantizedModel) -> QuantizedModel:
    plain = {k: v for k, v in content.plain.items() if k != "blocks.0.table"}
    return replace(content, plain=plain)


def with_extra_tensor(content: QuantizedModel) -> QuantizedModel:
    return replace(content, plain={**content.plain, "lora.weight": torch.zeros(2)})


def with_another_table(content: QuantizedModel) -> QuantizedModel:
    return replace(content, plain={**content.plain, "blocks.0.table": torch.zeros(3, 64)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_layer, r"missing: blocks\.1\.cross\.q\.bias, blocks\.1\.cross\.q\.weight"),
        (with_foreign_layer, r"quantizes blocks\.7\.cross\.q, which is no linear layer"),
        (with_a_layer_in_the_place_of_a_norm, r"quantizes blocks\.1\.cross\.q_norm, which is no"),
        (with_swapped_layers, r"out has 192 rows of 64 columns in the file, .* 64 of 64;"),
        (without_bias, r"blocks\.0\.cross\.q lacks its bias"),
        (without_table, r"missing: blocks\.0\.table"),
        (with_extra_tensor, r"not in the model: lora\.weight"),
        (with_another_table, r"mis-shaped: blocks\.0\.table \[3, 64\], expected \[6, 64\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_does_not_fit_the_model_is_refused(
    folder: Path, change: Change, told: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(WeightsError, match=told):
        load_quantized_sana(folder)


def test_a_missing_configuration_is_told(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no config\.json beside gesso_quantized"):
        load_quantized_sana(folder)


def test_a_configuration_of_another_depth_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(WeightsError, match=r"missing: blocks\.2\."):
        load_quantized_sana(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / CANONICAL_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        load_quantized_sana(folder)


def test_a_file_of_another_version_is_refused(folder: Path) -> None:
    file = folder / CANONICAL_FILE
    about = {"version": 2, "layers": {}, "made_by": {}}
    save_file(load_file(file), file, {METADATA_KEY: json.dumps(about)})
    with pytest.raises(WeightsError, match="version 2, this gesso reads 1"):
        load_quantized_sana(folder)


def test_quantized_and_dense_weights_in_one_folder_are_refused(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match="quantized weights and diffusion_pytorch_model"):
        weights_hash(folder)


def test_the_loader_of_dense_weights_names_the_right_one(folder: Path) -> None:
    with pytest.raises(WeightsError, match="holds quantized weights; load them with"):
        load_sana(folder)


def test_a_folder_is_hashed_and_verified(folder: Path) -> None:
    assert weights_hash(folder) == weights_hash(folder / CANONICAL_FILE)
    assert trained_dtype(folder) == torch.bfloat16
    write_manifest(folder)
    assert all(report.ok for report in verify(folder, deep=True))
    rewrite(folder, without_layer)
    assert [r.name for r in verify(folder) if not r.ok] == [CANONICAL_FILE]


def test_verify_reads_the_layers_of_a_folder_without_a_manifest(folder: Path) -> None:
    file = folder / CANONICAL_FILE
    tensors = load_file(file)
    header = read_canonical(file)
    about = {"version": 1, "layers": {"blocks.0.cross.q": {}}, "made_by": dict(header.made_by)}
    save_file(tensors, file, {METADATA_KEY: json.dumps(about)})
    (bad,) = (report for report in verify(folder) if not report.ok)
    assert "blocks.0.cross.q" in (bad.problem or "")


def test_the_number_format_of_a_file_that_does_not_state_it_is_that_of_its_scales(
    folder: Path,
) -> None:
    rewrite(folder, lambda content: replace(content, made_by={}))
    assert trained_dtype(folder) == torch.bfloat16


def test_a_pipeline_is_drawn_with_and_says_so(quantized_pipeline: Path) -> None:
    pipeline = TextToImage.load(quantized_pipeline)
    request = GenerationRequest(prompt="a red apple", width=64, height=64, seed=7, steps=2)
    (picture,) = pipeline(request)
    assert picture.pixels_HWC.shape == (64, 64, 3)
    assert picture.provenance.quantization == "svdquant-int4-r8 (dequantized)"
    assert picture.provenance.weights_sha256 == weights_hash(quantized_pipeline / "transformer")
    identity = pipeline.denoiser.identity
    assert identity.weight_bytes == weight_bytes(pipeline.denoiser.model)


def test_the_mode_of_a_pipeline_can_be_chosen(quantized_pipeline: Path) -> None:
    denoiser = load_denoiser(quantized_pipeline, quantized_mode="reference")
    assert denoiser.identity.quantization == "svdquant-int4-r8 (reference)"


def test_records_are_let_go_layer_by_layer(
    quantized_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[QuantizedLinear]] = []
    most_alive = 0
    real = SVDQuantLinear.from_record

    def watched(record: QuantizedLinear, mode: Mode, **options: Any) -> SVDQuantLinear:
        nonlocal most_alive
        made.append(weakref.ref(record))
        most_alive = max(most_alive, sum(one() is not None for one in made))
        return real(record, mode, **options)

    monkeypatch.setattr(SVDQuantLinear, "from_record", watched)
    load_quantized_sana(quantized_pipeline / "transformer")
    assert len(made) == 14
    assert most_alive == 1
    assert all(one() is None for one in made)


def test_a_mode_changes_nothing_for_a_dense_model(tiny_pipeline: Path) -> None:
    assert load_denoiser(tiny_pipeline, quantized_mode="w8a8_int8").identity.quantization == "none"


def test_a_foreign_autoencoder_is_refused(quantized_pipeline: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(quantized_pipeline, tmp_path / "copy", symlinks=True))
    rewrite(copy / "transformer", lambda c: replace(c, made_by={"autoencoder_sha256": "0" * 64}))
    with pytest.raises(WeightsError, match="was trained with the autoencoder 000000000000"):
        load_denoiser(copy)


def made_from(folder: Path, model: str) -> Path:
    rewrite(folder, lambda content: replace(content, made_by={"model": model}))
    return folder


def test_a_bare_folder_takes_the_rest_from_the_model_it_was_made_from(folder: Path) -> None:
    parts = resolve_parts(made_from(folder, "sana-tiny"))
    assert (parts.transformer, parts.base) == (folder, SHIPPED / "sana-tiny")
    assert (parts.autoencoder, parts.text_encoder) == (
        SHIPPED / "dcae-tiny",
        SHIPPED / "smollm2-l6",
    )


def test_a_bare_folder_of_an_unknown_model_must_be_completed(folder: Path) -> None:
    with pytest.raises(WeightsError, match="has no folder 'vae'"):
        resolve_parts(made_from(folder, "something"))


def test_a_registered_quantized_model_knows_what_its_base_knows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry: ModelEntry = replace(
        MODELS["sana-tiny"], name="sana-tiny-int4", shipped=str(folder), base="sana-tiny"
    )
    monkeypatch.setitem(MODELS, entry.name, entry)
    parts = resolve_parts("sana-tiny-int4")
    assert (parts.transformer, parts.base) == (folder, SHIPPED / "sana-tiny")


@contextmanager
def refused(told: str) -> Iterator[None]:
    with pytest.raises(GessoError, match=told):
        yield


def test_a_map_finds_the_layers_of_every_sana() -> None:
    for name, config in SANA_CONFIGS.items():
        with torch.device("meta"):
            model = Sana(config)
        assert len(find_layers(model, layer_map("sana"))) == 7 * config.depth, name
        assert len(find_layers(model, layer_map("sana-nunchaku"))) == 6 * config.depth, name


def test_keys_and_values_of_the_text_keep_their_input() -> None:
    with torch.device("meta"):
        found = find_layers(Sana(SANA_CONFIGS["sana-tiny"]), layer_map("sana"))
    weight_only = {name for name, rule in found.items() if rule.activation == "16bit"}
    assert weight_only == {f"blocks.{i}.cross.kv" for i in range(8)}


def test_a_map_that_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 3))
    with refused("does not fit this Sequential: nothing is called"):
        find_layers(model, layer_map("sana"))
    with refused("1 is a Conv2d; only nn.Linear and 1x1"):
        find_layers(model, (LayerRule(pattern="1"),))
    with refused("names 0 twice"):
        find_layers(model, (LayerRule(pattern="0"), LayerRule(pattern="*", shift=1.0)))
    with refused("no layer map 'sonata'; known are sana, sana-nunchaku"):
        layer_map("sonata")
    assert set(LAYER_MAPS) >= {"sana", "sana-nunchaku"}


@pytest.mark.parametrize(
    "module", [nn.Linear(3, 2), PointwiseConv(3, 2), nn.Conv2d(3, 2, 1)], ids=lambda m: repr(m)[:9]
)
def test_linear_layers_and_pointwise_convolutions_are_matrices(module: nn.Module) -> None:
    weight, bias = matrix_of(module, "layer")
    assert (weight.shape, bias is not None and bias.shape) == ((2, 3), (2,))


def test_sana_1600m_takes_a_third_of_its_16_bit_bytes() -> None:
    with torch.device("meta"):
        model = Sana(SANA_CONFIGS["sana-1.6b-1024"])
    quantized, dense = planned_bytes(model, layer_map("sana"), weight="int4", rank=32)
    assert dense == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert quantized / dense <= 0.33


def test_the_planned_bytes_are_those_of_the_file(
    tiny_pipeline: Path, quantized_pipeline: Path
) -> None:
    model = load_sana(tiny_pipeline / "transformer")
    planned, _ = planned_bytes(model, layer_map("sana"), rank=8)
    content = read_canonical(quantized_pipeline / "transformer" / CANONICAL_FILE)
    layers = sum(record.nbytes for record in content.layers.values())
    assert planned == layers + sum(tensor.nbytes for tensor in content.plain.values())
