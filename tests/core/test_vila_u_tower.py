"""VILA-U's vision tower: quantizer, encoder, decoder, projector, names, folders."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest, WeightsError
from gesso_core.hub.load_vila_u_tower import (
    build_tower,
    load_vila_u_projector,
    load_vila_u_tower,
    tower_config,
)
from gesso_core.models.keys.translate import translate, untranslate
from gesso_core.models.keys.vila_u_tower import (
    DEPTH_PREFIX,
    PROJECTOR,
    TOWER_PREFIX,
    read_tower,
    tower_aliases,
    write_tower,
)
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.residual_quantizer import (
    Codebook,
    ResidualQuantizer,
    straight_through,
)
from gesso_core.models.vila_u.tower_config import (
    TOWERS,
    VILA_U_256,
    VILA_U_384,
    TowerConfig,
    decoder_config,
)
from gesso_core.models.vila_u.vision_tower import VisionTower, preprocess, siglip_vision_config
from gesso_core.pipelines.autoencoder import Autoencoder
from gesso_core.train.publish_vila_u_tower import publish_projector, publish_tower
from small_towers import small_tower
from torch import Generator, Tensor
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel

LAYOUT = Path(__file__).parents[1] / "golden" / "key_layouts" / "vila_u_7b_256.json"
TINY = small_tower(size=32, patch=8, codes=3, entries=24, attention=(4,))
SEPARATE = replace(TINY, shared_codebook=False, codebook_size=(8, 12, 16))


@pytest.fixture
def tower() -> VisionTower:
    return new_tower(TINY)


def new_tower(config: TowerConfig) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(config).eval().requires_grad_(False)


def pictures(count: int, side: int = 32) -> Tensor:
    return torch.rand((count, 3, side, side), generator=Generator().manual_seed(1)) * 2 - 1


def new_quantizer(**changes: object) -> ResidualQuantizer:
    torch.manual_seed(3)
    sizes = {"latent_shape": (2, 2, 6), "code_shape": (2, 2, 3), "entries": 5, "decay": 0.9}
    return ResidualQuantizer(**{**sizes, **changes})


def latents(count: int, seed: int = 2) -> Tensor:
    return torch.randn((count, 2, 2, 6), generator=Generator().manual_seed(seed))


def published(part: str) -> dict[str, list[int]]:
    return json.loads(LAYOUT.read_text())[part]


def on_meta(config: TowerConfig) -> VisionTower:
    with torch.device("meta"):
        return VisionTower(config)


def meta_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


# Names of the published files


def test_every_published_name_and_shape_has_a_home() -> None:
    expected = on_meta(VILA_U_256).state_dict()
    state = meta_state(published("vision_tower"))
    assert read_tower(state, VILA_U_256, expected).keys() == expected.keys()


def test_our_names_go_back_to_exactly_the_published_ones() -> None:
    back = write_tower(on_meta(VILA_U_256).state_dict(), VILA_U_256)
    text = TOWER_PREFIX + "siglip_model.text_model."
    expected = {
        key: shape
        for key, shape in published("vision_tower").items()
        if not key.startswith((DEPTH_PREFIX, text))
    }
    assert {key: list(tensor.shape) for key, tensor in back.items()} == expected


def test_the_published_projector_has_a_home_and_goes_back() -> None:
    with torch.device("meta"):
        projector = Projector("mlp2x_gelu", 1024, 4096)
    shapes = published("mm_projector")
    ours = translate(meta_state(shapes), PROJECTOR, projector.state_dict())
    back = untranslate(ours, PROJECTOR)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == shapes


def test_the_siglip_of_transformers_takes_the_published_encoder() -> None:
    prefix = TOWER_PREFIX + "siglip_model."
    shapes = {
        key.removeprefix(prefix): shape
        for key, shape in published("vision_tower").items()
        if key.startswith(prefix)
    }
    sizes = json.loads(LAYOUT.read_text())["_meta"]["constructor"]["siglip"]
    text = {**sizes["text_config"], "projection_size": sizes["text_config"]["hidden_size"]}
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=sizes["vision_config"]))
    model.load_state_dict(meta_state(shapes), strict=True, assign=True)
    vision = {
        key.removeprefix("vision_model."): shape
        for key, shape in shapes.items()
        if key.startswith("vision_model.")
    }
    with torch.device("meta"):
        alone = SiglipVisionModel(siglip_vision_config(VILA_U_256))
    alone.load_state_dict(meta_state(vision), strict=True, assign=True)


def test_features_and_pooling_are_those_of_transformers_siglip(tower: VisionTower) -> None:
    siglip = SiglipVisionModel(siglip_vision_config(TINY)).eval()
    state = write_tower(tower.state_dict(), TINY)
    prefix = TOWER_PREFIX + "siglip_model.vision_model."
    siglip.load_state_dict(
        {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}, strict=True
    )
    x = pictures(2)
    with torch.no_grad():
        expected = siglip(x, output_hidden_states=True)
    features = tower.features(x)
    torch.testing.assert_close(features.flatten(1, 2), expected.hidden_states[-2])
    torch.testing.assert_close(tower.pooled(features), expected.pooler_output)


@pytest.mark.parametrize("config", [TINY, SEPARATE], ids=["one table", "a table per depth"])
def test_second_names_may_be_there_or_not(config: TowerConfig) -> None:
    tower = new_tower(config)
    every = write_tower(tower.state_dict(), config)
    once = {k: t for k, t in every.items() if k not in tower_aliases(config)}
    first_name = dict(tower_aliases(config))
    only_second = dict(once)
    alias = TOWER_PREFIX + "logit_scale"
    only_second[alias] = only_second.pop(first_name[alias])
    assert len(once) < len(every)
    for state in (every, once, only_second):
        read = read_tower(state, config, tower.state_dict())
        assert all(torch.equal(read[key], tensor) for key, tensor in tower.state_dict().items())


def test_tables_that_differ_are_not_taken_for_a_shared_one() -> None:
    sizes = replace(TINY, shared_codebook=False)
    state = write_tower(new_tower(sizes).state_dict(), sizes)
    with pytest.raises(WeightsError, match="shared_codebook"):
        read_tower(state, TINY)


def test_weights_for_inference_alone_see_and_paint_but_do_not_pool(tower: VisionTower) -> None:
    branch = ("layers.2.", "post_layernorm", ".head.", "logit", "cluster_size", "embed_ema")
    state = write_tower(tower.state_dict(), TINY)
    fewer = {k: t for k, t in state.items() if not any(part in k for part in branch)}
    assert len(fewer) < len(state)
    read = build_tower(fewer, TINY)
    x = pictures(2)
    assert torch.equal(read.encode(x).codes_BhwD, tower.encode(x).codes_BhwD)
    with pytest.raises(WeightsError, match="without the last encoder layer"):
        read.pooled(read.encode(x).features_BhwC)


def test_a_missing_layer_is_named(tower: VisionTower) -> None:
    state = write_tower(tower.state_dict(), TINY)
    del state[TOWER_PREFIX + "siglip_model.vision_model.encoder.layers.1.mlp.fc1.bias"]
    del state[TOWER_PREFIX + "decoder.mid.attn_1.k.weight"]
    with pytest.raises(WeightsError, match=r"decoder\.mid\.attn_1\.k\.weight") as caught:
        read_tower(state, TINY, tower.state_dict())
    assert "encoder.encoder.layers.1.mlp.fc1.bias" in caught.value.message


def test_a_codebook_of_another_size_is_refused(tower: VisionTower) -> None:
    state = write_tower(tower.state_dict(), TINY)
    larger = replace(TINY, codebook_size=25)
    with pytest.raises(WeightsError, match=r"codebooks\.0\.table_VC \[25, 32\], expected \[26"):
        read_tower(state, larger, on_meta(larger).state_dict())


# Folders


def test_a_published_folder_gives_the_tower_back(tmp_path: Path, tower: VisionTower) -> None:
    projector = Projector("mlp2x_gelu", 32, 20)
    extra = {DEPTH_PREFIX + "pos_emb_d": torch.zeros(1, 3, 8)}
    publish_tower(tower, tmp_path, extra=extra, extra_config={"rqtransformer": {"n_layer": 1}})
    publish_projector(projector, tmp_path)
    values = json.loads((tmp_path / "vision_tower" / "config.json").read_text())
    assert values["model_type"] == "rqvaesigliptransformer_model"
    assert values["rqtransformer"] == {"n_layer": 1}
    assert tower_config(tmp_path / "vision_tower") == TINY
    loaded = load_vila_u_tower(tmp_path)
    for key, tensor in tower.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.half().float())
    codes = loaded.encode(pictures(2))
    assert loaded.decode(codes.features_BhwC).shape == (2, 3, 32, 32)
    again = load_vila_u_projector(tmp_path)
    torch.testing.assert_close(
        again(codes.features_BhwC), projector(codes.features_BhwC), atol=1e-2, rtol=1e-2
    )


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="without a config"):
        load_vila_u_tower(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="rqvaesiglip"):
        tower_config(tmp_path)


def test_a_tower_in_bfloat16_keeps_its_distances_in_float32(tower: VisionTower) -> None:
    half = new_tower(TINY).to(torch.bfloat16)
    found = half.encode(pictures(2).to(torch.bfloat16))
    left = half.quantizer.to_code_shape(half.features(pictures(2).to(torch.bfloat16)))
    table = half.quantizer.tables[0].table_VC[:-1].float()
    expected = torch.cdist(left.reshape(-1, 32).float(), table).argmin(dim=1)
    assert torch.equal(found.codes_BhwD[..., 0].flatten(), expected)
    assert found.features_BhwC.dtype == torch.bfloat16
    assert half.decode(found.features_BhwC).isfinite().all()


def test_the_autoencoder_service_paints_from_a_published_folder(
    tmp_path: Path, tower: VisionTower
) -> None:
    publish_tower(tower, tmp_path)
    autoencoder = Autoencoder.load(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    latent = autoencoder.encode(picture)
    loaded = load_vila_u_tower(tmp_path)
    codes = loaded.encode(preprocess(picture, 32)[None])
    torch.testing.assert_close(latent, codes.features_BhwC[0].permute(2, 0, 1))
    painted = loaded.decode(codes.features_BhwC)[0].permute(1, 2, 0)
    expected = ((painted + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(autoencoder.decode(latent) - expected).max() <= 1


# Configurations


@pytest.mark.parametrize("name", TOWERS)
def test_a_configuration_survives_being_written(name: str) -> None:
    written = json.loads(json.dumps(TOWERS[name].to_original()))
    assert TowerConfig.from_original(written) == TOWERS[name]


def test_the_encoder_may_be_named_as_the_published_configuration_does() -> None:
    values = json.loads(LAYOUT.read_text())["_meta"]["constructor"]["rqvaesiglip"]
    assert TowerConfig.from_original(values) == VILA_U_256
    assert (VILA_U_256.positions, VILA_U_256.depth) == (256, 4)


def test_the_384_px_tower_resizes_its_latent_so_that_384_px_come_out() -> None:
    assert (VILA_U_384.positions, VILA_U_384.depth) == (729, 16)
    assert VILA_U_384.decoded_size == (384, 384)
    with torch.device("meta"):
        tower = VisionTower(VILA_U_384)
        assert tower.decode(torch.empty(1, 27, 27, 1152)).shape == (1, 3, 384, 384)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pretrained_model": "google/siglip-base-patch16-224"}, "is not known"),
        ({"pretrained_model": 7}, "neither a name nor"),
        ({"latent_shape": [4, 4, 64]}, "the encoder gives"),
        ({"n_embed": None}, "n_embed"),
        ({"ddconfig": {"double_z": True, "zebra": 1}}, "zebra"),
        ({"ddconfig": 5}, "expected an object"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    change: dict[str, object], complaint: str
) -> None:
    values = {**TINY.to_original(), **change}
    if values["n_embed"] is None:
        del values["n_embed"]
    with pytest.raises(ConfigError, match=complaint):
        TowerConfig.from_original(values)


def test_a_variational_decoder_is_refused() -> None:
    values = {**TINY.to_original()["ddconfig"], "double_z": True}
    with pytest.raises(ConfigError, match="double_z"):
        decoder_config(values)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "conv", ""])
def test_an_unknown_kind_of_projector_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="known are"):
        Projector(kind, 4, 4)


# Pictures


def test_the_same_picture_gives_the_same_codes_alone_and_in_a_batch(tower: VisionTower) -> None:
    x = pictures(5)
    together = tower.encode(x)
    alone = torch.cat([tower.encode(x[i : i + 1]).codes_BhwD for i in range(5)])
    assert torch.equal(together.codes_BhwD, alone)
    assert torch.equal(tower.encode(x).features_BhwC, together.features_BhwC)
    assert together.codes_BhwD.shape == (5, 4, 4, 3)
    assert together.codes_BhwD.unique().numel() > 3


def test_features_are_the_sum_of_the_rows_of_the_codes(tower: VisionTower) -> None:
    found = tower.encode(pictures(2))
    torch.testing.assert_close(tower.embed(found.codes_BhwD), found.features_BhwC)
    partial = tower.embed_partial(found.codes_BhwD)
    assert partial.shape == (2, 4, 4, 3, 32)
    torch.testing.assert_close(partial[..., -1, :], found.features_BhwC)
    one = tower.embed(torch.tensor([[[3, 24, 24]]]))
    torch.testing.assert_close(one[0, 0], tower.quantizer.tables[0].table_VC[3])


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_constant_pictures_give_finite_codes_and_pictures(tower: VisionTower, value: float) -> None:
    codes = tower.encode(torch.full((2, 3, 32, 32), value))
    assert codes.features_BhwC.isfinite().all()
    assert tower.decode(codes.features_BhwC).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 1, 32, 32), (1, 4, 32, 32), (3, 32, 32)])
def test_pictures_of_another_shape_are_refused(tower: VisionTower, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="preprocess"):
        tower.encode(torch.zeros(shape))


def test_any_picture_is_resized_to_the_square_of_the_tower() -> None:
    picture = np.zeros((20, 50, 3), np.uint8)
    picture[:, 25:] = 255
    x = preprocess(picture, 32)
    assert x.shape == (3, 32, 32)
    assert x[:, :, 0].eq(-1).all()
    assert x[:, :, -1].eq(1).all()
    exact = preprocess(np.full((32, 32, 3), 51, np.uint8), 32)
    torch.testing.assert_close(exact, torch.full((3, 32, 32), 51 / 127.5 - 1))


@pytest.mark.parametrize(
    "picture",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)],
    ids=["gray", "alpha", "float"],
)
def test_a_picture_that_is_not_rgb_of_8_bits_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match="send RGB"):
        preprocess(picture, 32)


# Quantizer


def test_each_code_is_the_row_nearest_to_what_is_left() -> None:
    quantizer, x = new_quantizer(), latents(3)
    found = quantizer.encode(x)
    rows = quantizer.tables[0].table_VC[:-1]
    left = x.reshape(-1, 6)
    for d in range(3):
        expected = torch.cdist(left, rows).argmin(dim=1)
        assert torch.equal(found.codes_BhwD[..., d].flatten(), expected)
        left = left - rows[expected]


def test_codes_move_no_table_unless_it_is_asked_for() -> None:
    quantizer = new_quantizer()
    before = {k: t.clone() for k, t in quantizer.state_dict().items()}
    quantizer.train().encode(latents(3))
    assert all(torch.equal(before[k], t) for k, t in quantizer.state_dict().items())


def test_gradients_pass_the_quantizer_and_commitment_pulls_the_latent_alone() -> None:
    quantizer, x = new_quantizer(), latents(2).requires_grad_()
    found = quantizer.encode(x)
    through = straight_through(x, found.z_q_BHWC)
    torch.testing.assert_close(through, found.z_q_BHWC)
    (through * 3).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(3).all()
    assert found.commitment_loss(x).requires_grad
    assert not any(tensor.requires_grad for tensor in found.partial_sums)


def test_training_that_is_stopped_and_continued_ends_where_it_would_have(tmp_path: Path) -> None:
    whole, first = new_quantizer(), new_quantizer()
    draws = Generator().manual_seed(5)
    for step in range(4):
        whole.update(latents(4, step), generator=draws)
    draws = Generator().manual_seed(5)
    for step in range(2):
        first.update(latents(4, step), generator=draws)
    torch.save({"tables": first.state_dict(), "draws": draws.get_state()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    second, draws = new_quantizer(), Generator()
    second.load_state_dict(saved["tables"])
    draws.set_state(saved["draws"])
    for step in range(2, 4):
        second.update(latents(4, step), generator=draws)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], tensor)


def test_rows_move_towards_the_vectors_that_chose_them() -> None:
    book = Codebook(2, 1, decay=0.5, restart=False)
    book.table_VC[:] = torch.tensor([[0.0], [10.0], [0.0]])
    book.counts_V.fill_(1.0)
    book.sums_VC[:] = torch.tensor([[0.0], [10.0]])
    x = torch.tensor([[2.0], [2.0], [9.0]])
    codes = book.nearest(x)
    assert codes.tolist() == [0, 0, 1]
    book.update(x, codes)
    torch.testing.assert_close(book.counts_V, torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(
        book.table_VC[:-1], torch.tensor([[2 / 1.5], [9.5]]), rtol=1e-4, atol=0
    )
    assert book.table_VC[-1] == 0


def test_unused_rows_are_restarted_even_from_a_batch_smaller_than_the_table() -> None:
    quantizer = new_quantizer(entries=40, code_shape=(2, 2, 1))
    quantizer.tables[0].table_VC[:-1] += 100.0
    x = latents(1)
    quantizer.update(x, generator=Generator().manual_seed(0))
    rows = quantizer.tables[0].table_VC[:-1]
    assert rows.isfinite().all()
    assert (rows.abs() < 50).float().mean() > 0.9
    same = torch.zeros(2, 2, 2, 6)
    quantizer.update(same, generator=Generator().manual_seed(0))
    assert quantizer.tables[0].table_VC.isfinite().all()


RANK = """
import sys, torch, torch.distributed as ranks
from gesso_core.models.vila_u.residual_quantizer import ResidualQuantizer
rank, folder = int(sys.argv[1]), sys.argv[2]
ranks.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(3)
quantizer = ResidualQuantizer(
    latent_shape=(2, 2, 6), code_shape=(2, 2, 1), entries=5, decay=0.9, restart_below=0.3
)
x = torch.randn((4, 2, 2, 6), generator=torch.Generator().manual_seed(2))
quantizer.update(x[rank::2], generator=torch.Generator().manual_seed(7))
torch.save(quantizer.state_dict(), f"{folder}/{rank}")
ranks.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_of_a_training_keep_the_same_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    one, other = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())
    alone = new_quantizer(code_shape=(2, 2, 1), restart_below=0.3)
    alone.update(latents(4), generator=Generator().manual_seed(7))
    used = alone.tables[0].counts_V != 1.0
    assert used.any()
    for name in ("counts_V", "sums_VC"):
        expected = alone.state_dict()[f"codebooks.0.{name}"][used]
        torch.testing.assert_close(one[f"codebooks.0.{name}"][used], expected)


def test_space_to_depth_is_undone() -> None:
    quantizer = new_quantizer(latent_shape=(4, 6, 5), code_shape=(2, 2, 3))
    x = torch.randn(2, 4, 6, 5)
    gathered = quantizer.to_code_shape(x)
    assert gathered.shape == (2, 2, 2, 2 * 3 * 5)
    assert torch.equal(quantizer.to_latent_shape(gathered), x)
    assert quantizer.encode(x).z_q_BHWC.shape == x.shape


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"code_shape": (2, 3, 1)}, "multiples"),
        ({"entries": [5, 6, 7]}, "one shared table"),
        ({"entries": [5, 6], "shared": False}, "table sizes"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        new_quantizer(**changes)


@pytest.mark.parametrize("codes", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3)])
def test_codes_of_another_depth_or_type_are_refused(codes: Tensor) -> None:
    with pytest.raises(InvalidRequest, match="3 codes of type int64"):
        new_quantizer().embed(codes)
