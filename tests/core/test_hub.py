"""Loading weights: strict about keys, shapes, shards and number formats, deaf to pickles."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, UnsafeFile, WeightsError
from gesso_core.hub import (
    load_dc_ae,
    load_sana,
    load_state_dict,
    require_its_autoencoder,
    trained_dtype,
    weights_hash,
    write_manifest,
)
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_config import DCAEConfig, Stage
from gesso_core.models.keys.dc_ae import diffusers_rules
from gesso_core.models.keys.sana import SANA_DIFFUSERS, SANA_ORIGINAL
from gesso_core.models.keys.translate import untranslate
from gesso_core.models.sana import Sana
from gesso_core.models.sana_config import SanaConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SANA = SanaConfig(
    width=32,
    depth=2,
    cross_heads=2,
    cross_head_dim=16,
    caption_channels=24,
    sample_size=4,
    in_channels=8,
    out_channels=8,
)
DC_AE = DCAEConfig(
    latent_channels=8,
    encoder=(Stage(width=8, depth=0), Stage(width=16, depth=1), Stage(width=32, depth=1)),
    decoder=(
        Stage(width=8, depth=0),
        Stage(width=16, depth=1, norm="batch_norm", activation="relu"),
        Stage(width=32, depth=1, block="EfficientViTBlock"),
    ),
)


def random_state(module: torch.nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for key, t in module.state_dict().items()
    }


def write_folder(folder: Path, state: dict[str, Tensor], config: object, **metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(contiguous, folder / WEIGHTS, {"format": "pt", **metadata})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def sana_state() -> dict[str, Tensor]:
    return untranslate(random_state(Sana(SANA)), SANA_DIFFUSERS)


@pytest.fixture
def sana_folder(tmp_path: Path, sana_state: dict[str, Tensor]) -> Path:
    return write_folder(tmp_path / "sana", sana_state, SANA.to_diffusers())


@pytest.fixture
def dc_ae_folder(tmp_path: Path) -> Path:
    state = untranslate(random_state(DCAE(DC_AE)), diffusers_rules())
    return write_folder(tmp_path / "dc-ae", state, DC_AE.to_diffusers())


def test_a_sana_comes_back_with_every_weight_in_eval_mode(sana_folder: Path) -> None:
    model = load_sana(sana_folder)
    want = random_state(Sana(SANA))
    assert not model.training
    assert model.config == SANA
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[key]), key


def test_a_dc_ae_comes_back_from_its_folder_and_from_a_pipeline(
    dc_ae_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "pipeline").mkdir()
    dc_ae_folder.rename(tmp_path / "pipeline" / "vae")
    model = load_dc_ae(tmp_path / "pipeline", torch.bfloat16)
    want = random_state(DCAE(DC_AE))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), want[key].bfloat16().float()), key


def test_a_missing_batch_counter_starts_at_zero(dc_ae_folder: Path) -> None:
    state = load_file(dc_ae_folder / WEIGHTS)
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    assert counters
    kept = {key: tensor for key, tensor in state.items() if key not in counters}
    save_file(kept, dc_ae_folder / WEIGHTS)
    buffers = dict(load_dc_ae(dc_ae_folder).named_buffers())
    assert all(int(t) == 0 for key, t in buffers.items() if key.endswith("num_batches_tracked"))


def test_an_original_checkpoint_needs_only_a_configuration(tmp_path: Path) -> None:
    state = untranslate(random_state(Sana(SANA)), SANA_ORIGINAL)
    state["y_embedder.y_embedding"] = torch.zeros(300, 24)
    file = tmp_path / "sana.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    with pytest.raises(WeightsError, match="say which model it is"):
        load_sana(file)
    model = load_sana(file, config=SANA)
    assert torch.equal(model.state_dict()["patch.weight"], state["x_embedder.proj.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("proj_out.weight"), r"missing: .*head\.linear\.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "unknown: .*extra"),
        (lambda s: s.update({"proj_out.bias": torch.ones(3)}), r"mis-shaped: .*head\.linear\.bias"),
        (lambda s: s.update({"proj_out.bias": torch.ones(8).int()}), r"proj_out\.bias .* is I32"),
    ],
    ids=["missing", "unknown", "mis-shaped", "not float"],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(
    sana_folder: Path,
    sana_state: dict[str, Tensor],
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    change(sana_state)
    write_folder(sana_folder, sana_state, SANA.to_diffusers())
    with pytest.raises(WeightsError, match=message):
        load_sana(sana_folder)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shorter_than_its_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def web_page(path: Path) -> None:
    path.write_text("<!doctype html><title>404</title>" * 10)


def absurd_header(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    "damage", [truncated, shorter_than_its_header, empty, web_page, absurd_header, lfs_pointer]
)
def test_a_damaged_file_is_refused(sana_folder: Path, damage: Callable[[Path], None]) -> None:
    damage(sana_folder / WEIGHTS)
    with pytest.raises(WeightsError, match=r"download it again|git lfs pull"):
        load_sana(sana_folder)


def test_a_pickle_named_safetensors_stays_closed(sana_folder: Path) -> None:
    torch.save({"weight": torch.ones(2)}, sana_folder / WEIGHTS)
    with pytest.raises(UnsafeFile, match="Convert it once: gesso models convert"):
        load_sana(sana_folder)


def test_a_folder_with_only_a_pickle_says_how_to_convert_it(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"convert model\.pth once"):
        load_state_dict(tmp_path)


def test_missing_things_are_named(tmp_path: Path, sana_folder: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        load_sana(tmp_path / "nowhere")
    (sana_folder / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=WEIGHTS):
        load_sana(sana_folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "nonsense"])
def test_an_invalid_config_is_refused(sana_folder: Path, text: str) -> None:
    (sana_folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_sana(sana_folder)


def test_a_config_of_another_class_is_refused(sana_folder: Path, dc_ae_folder: Path) -> None:
    with pytest.raises(ConfigError, match="AutoencoderDC, expected SanaTransformer2DModel"):
        load_sana(dc_ae_folder)
    with pytest.raises(ConfigError, match="SanaTransformer2DModel, expected AutoencoderDC"):
        load_dc_ae(sana_folder)


def shard(folder: Path) -> dict[str, object]:
    """Split the weights in two and return the index."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, half = ("a.safetensors", "b.safetensors"), len(state) // 2
    parts = (dict(list(state.items())[:half]), dict(list(state.items())[half:]))
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_joined(sana_folder: Path, sana_state: dict[str, Tensor]) -> None:
    shard(sana_folder)
    assert load_state_dict(sana_folder).keys() == sana_state.keys()
    load_sana(sana_folder)


def test_a_missing_shard_is_named(sana_folder: Path) -> None:
    shard(sana_folder)
    (sana_folder / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"b\.safetensors is missing"):
        load_sana(sana_folder)


def test_an_index_that_contradicts_its_shards_is_refused(sana_folder: Path) -> None:
    weight_map = dict(shard(sana_folder)["weight_map"])
    moved = {**weight_map, next(iter(weight_map)): "b.safetensors"}
    (sana_folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(WeightsError, match="which the index"):
        load_sana(sana_folder)
    (sana_folder / INDEX).write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(WeightsError, match="weight_map"):
        load_sana(sana_folder)


@pytest.mark.parametrize(
    "name", ["../sana/a.safetensors", "/etc/passwd", "a\0b", "..\\x", "sub/../../x", ""]
)
def test_an_index_cannot_lead_out_of_its_folder(sana_folder: Path, name: str) -> None:
    index = shard(sana_folder)
    first = next(iter(index["weight_map"]))
    (sana_folder / INDEX).write_text(json.dumps({"weight_map": {first: name}}))
    with pytest.raises(UnsafeFile, match="not a file name inside"):
        load_sana(sana_folder)


def test_a_link_cannot_lead_out_of_its_folder(sana_folder: Path, tmp_path: Path) -> None:
    (sana_folder / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (sana_folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UnsafeFile, match="outside its folder"):
        load_sana(sana_folder)


def test_links_of_the_hub_cache_are_allowed(sana_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    snapshot = sana_folder.rename(repository / "snapshots" / "abc")
    (snapshot / WEIGHTS).rename(repository / "blobs" / "123")
    (snapshot / WEIGHTS).symlink_to("../../blobs/123")
    load_sana(snapshot)


def test_weights_trained_in_float16_are_not_run_in_bfloat16(
    tmp_path: Path, sana_state: dict[str, Tensor]
) -> None:
    half = {key: tensor.half() for key, tensor in sana_state.items()}
    folder = write_folder(tmp_path / "half", half, SANA.to_diffusers())
    assert trained_dtype(folder) == torch.float16
    with pytest.raises(WeightsError, match=r"cannot be used in bfloat16.*allow_any_dtype=True"):
        load_sana(folder, torch.bfloat16)
    allowed = load_sana(folder, torch.bfloat16, allow_any_dtype=True)
    assert allowed.patch.weight.dtype == torch.bfloat16
    assert load_sana(folder, torch.float32).patch.weight.dtype == torch.float32


def test_weights_trained_in_bfloat16_are_not_run_in_float16(
    tmp_path: Path, sana_state: dict[str, Tensor]
) -> None:
    config = SANA.to_diffusers()
    folder = write_folder(tmp_path / "b", sana_state, config, trained_dtype="bfloat16")
    with pytest.raises(WeightsError, match="trained for bfloat16"):
        load_sana(folder, torch.float16)


def test_an_autoencoder_is_not_run_in_float16(dc_ae_folder: Path) -> None:
    with pytest.raises(WeightsError, match="overflow float16"):
        load_dc_ae(dc_ae_folder, torch.float16)


def test_the_intended_format_is_read_from_the_most_explicit_place(
    sana_folder: Path, sana_state: dict[str, Tensor]
) -> None:
    assert trained_dtype(sana_folder) == torch.float32
    (sana_folder / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert trained_dtype(sana_folder) == torch.float16
    write_folder(sana_folder, sana_state, SANA.to_diffusers(), trained_dtype="bfloat16")
    assert trained_dtype(sana_folder) == torch.bfloat16
    write_manifest(sana_folder, trained_dtype="float32")
    assert trained_dtype(sana_folder) == torch.float32


def test_two_variants_need_a_choice(sana_folder: Path) -> None:
    data = (sana_folder / WEIGHTS).read_bytes()
    (sana_folder / WEIGHTS).unlink()
    for variant in ("fp16", "bf16"):
        (sana_folder / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="choose one with variant"):
        load_sana(sana_folder)
    load_sana(sana_folder, variant="bf16")


def test_a_denoiser_refuses_a_foreign_autoencoder(
    tmp_path: Path, sana_state: dict[str, Tensor], dc_ae_folder: Path, sana_folder: Path
) -> None:
    digest = weights_hash(dc_ae_folder)
    config = SANA.to_diffusers()
    own = write_folder(tmp_path / "own", sana_state, config, autoencoder_sha256=digest)
    foreign = write_folder(tmp_path / "foreign", sana_state, config, autoencoder_sha256="0" * 64)
    require_its_autoencoder(sana_folder, dc_ae_folder)
    require_its_autoencoder(own, dc_ae_folder)
    with pytest.raises(WeightsError, match="trained with the autoencoder 000000000000"):
        require_its_autoencoder(foreign, dc_ae_folder)
