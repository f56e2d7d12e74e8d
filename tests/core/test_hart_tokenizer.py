"""HART's tokenizer: the quantizer's rules, the autoencoder and its files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest, WeightsError
from gesso_core.hub import resolve
from gesso_core.hub.load_hart_tokenizer import TokenizerParts, load_hart_tokenizer
from gesso_core.hub.store import SHIPPED
from gesso_core.metrics import psnr
from gesso_core.models.hart.autoencoder import HARTAutoencoder
from gesso_core.models.hart.quantizer import MultiScaleQuantizer, phi_of_scale
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.hart.tokenizer_losses import PatchDiscriminator
from gesso_core.models.keys.hart_tokenizer import tokenizer_keys
from gesso_core.models.keys.translate import translate, untranslate
from gesso_core.pipelines.autoencoder import Autoencoder
from gesso_core.train.compose import composite, sprites_to_float
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

LAYOUT = Path(__file__).parents[1] / "golden" / "key_layouts" / "hart_0_7b.json"
SMALL = HARTTokenizerConfig(
    vocabulary=16,
    channels=8,
    scales=(1, 2, 4),
    width=32,
    multipliers=(1, 2),
    residual_blocks=1,
)


def latents(count: int = 3, side: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, side, side, generator=Generator().manual_seed(seed))


@pytest.fixture
def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    return SMALL.build_quantizer().eval().requires_grad_(False)


@pytest.fixture
def model() -> HARTAutoencoder:
    torch.manual_seed(1)
    return HARTAutoencoder(SMALL)


def test_the_three_rules_agree_on_codes_and_differ_in_what_the_last_scale_adds(
    quantizer: MultiScaleQuantizer,
) -> None:
    f = latents()
    plain, hybrid = quantizer.encode(f), quantizer.encode_hybrid(f)
    assert all(torch.equal(a, b) for a, b in zip(plain, hybrid.indices, strict=True))
    before_last = quantizer.partial_sums(plain[:-1], phi_at_last=True)[-1]
    codes = quantizer.embed(plain[-1])
    bare, smoothed = (quantizer.contribution(2, codes, phi=phi) for phi in (False, True))
    assert not torch.allclose(bare, smoothed, atol=1e-3)
    for phi, last in ((True, smoothed), (False, bare)):
        decoded = quantizer.decode(plain, phi_at_last=phi)
        torch.testing.assert_close(decoded, before_last + last)


def test_the_rest_completes_the_latent_and_contains_the_last_code(
    quantizer: MultiScaleQuantizer,
) -> None:
    f = latents()
    codes = quantizer.encode_hybrid(f)
    residual_BNC = codes.rest_BNC - quantizer.embed(codes.indices[-1])
    discrete = quantizer.decode(codes.indices, phi_at_last=False)
    hybrid = discrete + residual_BNC.mT.reshape(f.shape)
    torch.testing.assert_close(hybrid, f, atol=1e-5, rtol=1e-5)
    assert (discrete - f).abs().max() > 0.1


def test_rows_of_the_rest_and_of_token_maps_run_along_the_picture_s_rows(
    quantizer: MultiScaleQuantizer,
) -> None:
    f = latents(1)
    rest_BNC = quantizer.encode_hybrid(f).rest_BNC
    before_last = quantizer.partial_sums(quantizer.encode(f)[:-1], phi_at_last=True)[-1]
    torch.testing.assert_close(rest_BNC[0, 4 * 1 + 3], (f - before_last)[0, :, 1, 3])


def test_teacher_inputs_are_what_generation_would_be_fed(quantizer: MultiScaleQuantizer) -> None:
    indices = quantizer.encode(latents())
    total, fed = torch.zeros(3, 8, 4, 4), []
    for scale in range(2):
        total = total + quantizer.contribution(scale, quantizer.embed(indices[scale]))
        fed.append(quantizer.next_input(total, scale + 1))
    assert quantizer.teacher_inputs(indices).shape == (3, 4 + 16, 8)
    torch.testing.assert_close(quantizer.teacher_inputs(indices), torch.cat(fed, dim=1))


def test_a_latent_has_the_same_codes_alone_and_in_a_batch(quantizer: MultiScaleQuantizer) -> None:
    f = latents(7)
    together = quantizer.encode_hybrid(f)
    for row in range(7):
        alone = quantizer.encode_hybrid(f[row : row + 1])
        assert all(
            torch.equal(a[0], b[row]) for a, b in zip(alone.indices, together.indices, strict=True)
        )


def test_of_equally_near_codes_the_first_is_taken(quantizer: MultiScaleQuantizer) -> None:
    quantizer.codebook_VC[9] = quantizer.codebook_VC[4]
    assert quantizer.nearest(quantizer.codebook_VC[[9, 4, 2]]).tolist() == [4, 4, 2]


def test_distances_do_not_depend_on_how_many_rows_are_measured_at_once(
    quantizer: MultiScaleQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(50, 8, generator=Generator().manual_seed(3))
    expected = torch.cdist(rows, quantizer.codebook_VC).argmin(1)
    monkeypatch.setattr("gesso_core.models.hart.quantizer.ROWS_AT_ONCE", 7)
    assert torch.equal(quantizer.nearest(rows), expected)


@pytest.mark.parametrize(
    ("scales", "count", "expected"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, 4, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (5, 4, [0, 1, 2, 2, 3]),
        (4, 4, [0, 1, 2, 3]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (3, 1, [0, 0, 0]),
        (1, 4, [0]),
        (3, 0, []),
    ],
)
def test_shared_convolutions_are_spread_over_the_scales(
    scales: int, count: int, expected: list[int]
) -> None:
    assert phi_of_scale(scales, count) == expected


@pytest.mark.parametrize("shape", [(1, 8, 5, 5), (1, 7, 4, 4), (8, 4, 4), (1, 8, 4, 2)])
def test_a_latent_of_another_size_is_refused(
    quantizer: MultiScaleQuantizer, shape: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidRequest, match=r"need \(batch, 8, 4, 4\)") as caught:
        quantizer.encode(torch.zeros(shape))
    assert caught.value.field == "latent"


def test_token_maps_of_other_sizes_or_another_codebook_are_refused(
    quantizer: MultiScaleQuantizer,
) -> None:
    indices = quantizer.encode(latents(1))
    with pytest.raises(InvalidRequest, match=r"token maps of sizes \[1, 4, 9\].*have \[1, 4, 16\]"):
        quantizer.decode([*indices[:2], indices[2][:, :9]], phi_at_last=False)
    with pytest.raises(InvalidRequest, match="no token maps"):
        quantizer.decode([], phi_at_last=False)
    indices[1][0, 0] = 16
    with pytest.raises(InvalidRequest, match="to 16, but the codebook has 16 codes"):
        quantizer.teacher_inputs(indices)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"v_patch_nums": [1, 3, 2]}, r"scale list \(1, 3, 2\)"),
        ({"v_patch_nums": []}, "scale list"),
        ({"patch_nums": [1, 2]}, "unknown settings.*patch_nums"),
        ({"double_decoder": True}, "double_decoder is True"),
        ({"quantizer_type": "fsq"}, "quantizer_type is 'fsq'"),
        ({"ch": 100}, "width 100"),
        ({"vocab_size": 0}, "vocabulary is 0"),
        ({"vocab_size": "many"}, "vocabulary is 'many'"),
        ({"quant_conv_ks": 2}, "kernel 2 odd"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_computed_are_refused(
    settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        HARTTokenizerConfig.from_original(settings)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, autoencoder="dcae-tiny", phi_sharing=0)])
def test_a_configuration_survives_its_file(config: HARTTokenizerConfig) -> None:
    written = json.loads(json.dumps(config.to_original()))
    assert HARTTokenizerConfig.from_original(written) == config


def published() -> tuple[HARTTokenizerConfig, dict[str, Tensor]]:
    layout = json.loads(LAYOUT.read_text())
    config = HARTTokenizerConfig.from_original(layout["_meta"]["constructor"]["tokenizer"])
    state = {k: torch.empty(v, device="meta") for k, v in layout["tokenizer"].items()}
    return config, state


def test_the_published_tokenizer_has_exactly_these_parameters() -> None:
    config, state = published()
    with torch.device("meta"):
        parts = TokenizerParts(config)
    expected, rules = parts.state_dict(), tokenizer_keys(config.phi_sharing)
    assert translate(state, rules, expected).keys() == expected.keys()
    dropped = {k for k in state if k.startswith("disc.") or k.endswith("ema_vocab_hit_SV")}
    back = untranslate(expected, rules)
    assert {k: t.shape for k, t in back.items()} == {
        k: t.shape for k, t in state.items() if k not in dropped
    }


def test_parameter_counts_are_the_published_ones() -> None:
    config, _ = published()
    with torch.device("meta"):
        parts = TokenizerParts(config)
    assert parts.autoencoder is not None
    counts = [
        sum(p.numel() for p in part.parameters())
        for part in (parts, parts.autoencoder.encoder, parts.autoencoder.decoder)
    ]
    assert counts[0] == 108_948_355
    assert [round(count / 1e6, 1) for count in counts[1:]] == [44.1, 64.7]


def test_the_discriminator_is_the_published_one() -> None:
    _, state = published()
    with torch.device("meta"):
        own = PatchDiscriminator().state_dict()
    stored = {k.removeprefix("disc."): t.shape for k, t in state.items() if k.startswith("disc.")}
    assert {k: t.shape for k, t in own.items()} == stored


def write_tokenizer(folder: Path, config: HARTTokenizerConfig, **more: Tensor) -> TokenizerParts:
    torch.manual_seed(5)
    parts = TokenizerParts(config)
    state = untranslate(parts.state_dict(), tokenizer_keys(config.phi_sharing))
    folder.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in (state | more).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_original()))
    return parts


def test_a_published_folder_loads_without_what_only_training_needed(tmp_path: Path) -> None:
    more = {
        "vae.quantize.ema_vocab_hit_SV": torch.zeros(3, 16),
        "disc.main.3.num_batches_tracked": torch.zeros((), dtype=torch.int64),
        "disc.main.3.weight": torch.zeros(8),
    }
    written = write_tokenizer(tmp_path / "release" / "tokenizer", SMALL, **more)
    config, quantizer, autoencoder = load_hart_tokenizer(tmp_path / "release", torch.bfloat16)
    assert config == SMALL
    assert torch.equal(quantizer.codebook_VC, written.quantizer.codebook_VC)
    assert autoencoder is not None
    assert next(autoencoder.parameters()).dtype == torch.bfloat16
    assert quantizer.codebook_VC.dtype == torch.float32


def test_a_file_with_another_codebook_or_other_scales_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a", SMALL)
    wrong = replace(SMALL, vocabulary=32)
    (tmp_path / "a" / "config.json").write_text(json.dumps(wrong.to_original()))
    with pytest.raises(WeightsError, match=r"codebook_VC \[16, 8\], expected \[32, 8\]"):
        load_hart_tokenizer(tmp_path / "a")
    hits = {"vae.quantize.ema_vocab_hit_SV": torch.zeros(10, 16)}
    write_tokenizer(tmp_path / "b", SMALL, **hits)
    with pytest.raises(WeightsError, match=r"10 scales and 16 codes.*3 scales \(1, 2, 4\)"):
        load_hart_tokenizer(tmp_path / "b")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC"}))
    with pytest.raises(WeightsError, match="holds no HART tokenizer"):
        load_hart_tokenizer(tmp_path)


def test_the_autoencoder_service_s_door_opens_a_hart_tokenizer(tmp_path: Path) -> None:
    written = write_tokenizer(tmp_path / "tokenizer", SMALL)
    autoencoder = Autoencoder.load(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (13, 16, 3), dtype=np.uint8)
    latent = autoencoder.encode(picture)
    assert latent.shape == (8, 7, 8)
    assert autoencoder.decode(latent, 13, 16).shape == (13, 16, 3)
    assert written.autoencoder is not None
    even = torch.tensor(picture[:12]).permute(2, 0, 1)[None] / 127.5 - 1
    expected = written.autoencoder.eval().encode(even)[0]
    torch.testing.assert_close(autoencoder.encode(picture[:12]), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(InvalidRequest, match=r"decodes \(8, height, width\)"):
        autoencoder.decode(torch.zeros(4, 8, 8))


def test_a_tokenizer_without_an_autoencoder_names_the_one_that_makes_its_pictures(
    tmp_path: Path,
) -> None:
    write_tokenizer(tmp_path / "tokenizer", replace(SMALL, autoencoder="dcae-tiny"))
    assert load_hart_tokenizer(tmp_path).autoencoder is None
    with pytest.raises(WeightsError, match="latents of dcae-tiny, which decodes them"):
        Autoencoder.load(tmp_path)


def test_a_picture_that_is_not_of_whole_cells_is_refused(model: HARTAutoencoder) -> None:
    with pytest.raises(InvalidRequest, match=r"15x8 image cannot be encoded: .*multiples of 2"):
        model.encode(torch.zeros(1, 3, 8, 15))


def test_decoded_pictures_are_clamped_and_reconstructions_are_not(model: HARTAutoencoder) -> None:
    latent = latents(1)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(50)
        picture, raw = model.decode(latent), model.reconstruct(latent)
    assert raw.abs().max() > 1
    assert torch.equal(picture, raw.clamp(-1, 1))


def test_the_shipped_tokenizer_s_residual_is_worth_more_than_two_decibels() -> None:
    config, quantizer, _ = load_hart_tokenizer(SHIPPED / "hart-tiny")
    assert config.autoencoder is not None
    folder = resolve(config.autoencoder)
    autoencoder = Autoencoder.load(folder)
    scaling = json.loads((folder / "config.json").read_text())["scaling_factor"]
    sprites = load_file(folder / "held_out_sprites.safetensors")["pixels"][::6]
    pictures = composite(sprites_to_float(sprites), torch.full((len(sprites), 3), 0.8))
    with torch.no_grad():
        model = autoencoder.codec
        f = model.encode(pictures) * scaling
        codes = quantizer.encode_hybrid(f)
        discrete = quantizer.decode(codes.indices, phi_at_last=False)
        quality = [float(psnr(model.decode(z / scaling), pictures).mean()) for z in (discrete, f)]
    assert quality[0] > 17
    assert quality[1] - quality[0] > 2
