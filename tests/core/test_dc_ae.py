"""DC-AE: configurations, shapes, agreement with diffusers, number formats, inference form."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderDC
from gesso_core.errors import ConfigError, InvalidRequest
from gesso_core.models.dc_ae import DC_AE_CONFIGS, DCAE, DCAEConfig, Stage
from gesso_core.models.dc_ae_blocks import GLUMBConv, LiteMLA, RMSNorm2d
from gesso_core.models.dc_ae_fused import fold_batch_norms, fuse_for_inference
from gesso_core.models.dc_ae_fused_conv import WinogradConv
from gesso_core.models.keys.dc_ae import diffusers_rules, translate_dc_ae
from gesso_core.models.keys.translate import untranslate
from torch import Tensor, nn

EVIT = Stage(width=64, depth=1, block="EfficientViTBlock")
SANA_LIKE = DCAEConfig(
    latent_channels=8,
    encoder=(Stage(width=16, depth=1), Stage(width=32, depth=1), replace(EVIT, scales=(5,))),
    decoder=(Stage(width=16, depth=1), Stage(width=32, depth=1), replace(EVIT, scales=(5,))),
    downsample="conv",
    upsample="interpolate",
    scaling_factor=0.41407,
)
BATCH_NORM = Stage(width=16, depth=0, norm="batch_norm", activation="relu")
IN_LIKE = DCAEConfig(
    latent_channels=8,
    encoder=(Stage(width=16, depth=0), Stage(width=32, depth=1), EVIT, EVIT),
    decoder=(BATCH_NORM, replace(BATCH_NORM, width=32, depth=2), EVIT, EVIT),
)
VARIANTS = {
    "sana": SANA_LIKE,
    "in": IN_LIKE,
    "no shortcuts": replace(
        SANA_LIKE,
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        decoder_out_activation="silu",
    ),
    "empty stem, strided": replace(
        SANA_LIKE,
        encoder=(replace(SANA_LIKE.encoder[0], depth=0), *SANA_LIKE.encoder[1:]),
        decoder=(replace(SANA_LIKE.decoder[0], depth=0), *SANA_LIKE.decoder[1:]),
    ),
    "shuffled, unusual ratios": replace(
        IN_LIKE,
        encoder=(Stage(width=8, depth=1), Stage(width=32, depth=1), EVIT, EVIT),
        decoder=(Stage(width=32, depth=1), Stage(width=8, depth=1), Stage(width=32, depth=1), EVIT),
    ),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15, torch.float16: 0.02}


def seeded(config: DCAEConfig) -> DCAE:
    """Random weights, with batch statistics and norms away from their start values."""
    torch.manual_seed(0)
    model = DCAE(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.BatchNorm2d | RMSNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def picture(height: int = 64, width: int = 48, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def peer_of(model: DCAE) -> AutoencoderDC:
    config = {k: v for k, v in model.config.to_diffusers().items() if not k.startswith("_")}
    peer = AutoencoderDC(**config).eval()
    peer.load_state_dict(untranslate(model.state_dict(), diffusers_rules()), strict=True)
    return peer


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_it_computes_what_diffusers_computes(name: str) -> None:
    model = seeded(VARIANTS[name])
    peer = peer_of(model)
    for x in (picture(), picture(16, 16)):
        z = model.encode(x)
        torch.testing.assert_close(z, peer.encode(x).latent, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.decode(z), peer.decode(z).sample, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_weights_of_diffusers_load_into_ours() -> None:
    peer = peer_of(seeded(IN_LIKE))
    model = DCAE(IN_LIKE).eval()
    model.load_state_dict(translate_dc_ae(peer.state_dict(), IN_LIKE, model.state_dict()))
    torch.testing.assert_close(
        model.encode(picture()), peer.encode(picture()).latent, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", DC_AE_CONFIGS)
def test_configurations_survive_the_way_through_diffusers(name: str) -> None:
    config = DC_AE_CONFIGS[name]
    assert DCAEConfig.from_diffusers(config.to_diffusers()) == config


@pytest.mark.parametrize(
    ("name", "ratio", "channels", "millions"),
    [
        ("dc-ae-f32c32-in-1.0", 32, 32, 323.36),
        ("dc-ae-f64c128-mix-1.0", 64, 128, 676.90),
        ("dc-ae-f128c512-in-1.0", 128, 512, 1120.68),
        ("dc-ae-f32c32-sana-1.1", 32, 32, 312.25),
    ],
)
def test_published_models_have_their_published_size(
    name: str, ratio: int, channels: int, millions: float
) -> None:
    config = DC_AE_CONFIGS[name]
    with torch.device("meta"):
        model = DCAE(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.01)
    assert (config.spatial_compression_ratio, config.latent_channels) == (ratio, channels)


@torch.inference_mode()
def test_the_small_model_is_small_and_compresses_sixteen_times() -> None:
    config = DC_AE_CONFIGS["dcae-tiny"]
    model = DCAE(config).eval()
    assert sum(p.numel() for p in model.parameters()) < 8e6
    z = model.encode(picture(64, 64))
    assert z.shape == (2, config.latent_channels, 4, 4)
    assert model(picture(64, 64)).shape == (2, 3, 64, 64)


def test_sides_that_are_no_multiple_are_refused_with_the_multiple() -> None:
    with pytest.raises(InvalidRequest, match=r"65x64 image.*multiples of 4"):
        DCAE(SANA_LIKE).encode(torch.zeros(1, 3, 64, 65))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"upsample": "bicubic"}, "upsample 'bicubic' is not one of"),
        ({"decoder": SANA_LIKE.decoder[:2]}, "same number of stages"),
        ({"head_dim": 128}, "has no head of 128"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(
    change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        replace(SANA_LIKE, **change)


def test_unknown_settings_and_uneven_lists_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown settings for a DC-AE: latent_chanels"):
        DCAEConfig.from_diffusers({"latent_chanels": 32})
    with pytest.raises(ConfigError, match="unequal length"):
        DCAEConfig.from_diffusers({"encoder_layers_per_block": (1, 1)})
    with pytest.raises(ConfigError, match="shortcut needs"):
        DCAE(replace(SANA_LIKE, latent_channels=24))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_attention_over_many_bright_pixels_stays_finite_in_16_bits(dtype: torch.dtype) -> None:
    """Sums over 64² tokens leave the range of fp16 unless the core is fp32."""
    torch.manual_seed(0)
    block = LiteMLA(64, 32, (5,)).eval()
    x = 60 * torch.randn(1, 64, 64, 64).abs()
    y = block.to(dtype)(x.to(dtype))
    exact = block.float()(x.to(dtype).float())
    assert y.isfinite().all()
    assert (y.float() - exact).abs().max() < 0.1 * exact.abs().max()


@torch.inference_mode()
def test_norms_of_large_activations_stay_finite_in_fp16() -> None:
    y = RMSNorm2d(64).half()(torch.full((1, 64, 4, 4), 3000.0, dtype=torch.float16))
    torch.testing.assert_close(y, torch.ones_like(y), atol=2e-3, rtol=0)


def test_the_gate_is_the_second_half() -> None:
    block = GLUMBConv(4, expand=1)
    with torch.no_grad():
        block.depthwise.weight.zero_()
        block.depthwise.bias.copy_(torch.tensor([1.0] * 4 + [-100.0] * 4))
        y = block(torch.randn(1, 4, 3, 3))
    torch.testing.assert_close(y, torch.zeros_like(y))


def test_gradients_reach_every_parameter() -> None:
    for config in (SANA_LIKE, IN_LIKE):
        model = DCAE(config).train()
        model(picture(16, 16)).square().mean().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


@torch.inference_mode()
def test_batch_norm_folds_into_the_convolution_before_it() -> None:
    model = seeded(IN_LIKE)
    z = torch.randn(1, 8, 4, 4)
    before = model.decode(z)
    fold_batch_norms(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model.decode(z), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_the_inference_form_gives_the_same_pictures(name: str, dtype: torch.dtype) -> None:
    plain = seeded(VARIANTS[name])
    fused = fuse_for_inference(seeded(VARIANTS[name]).to(dtype))
    for x in (picture(), picture(16, 16, batch=1)):
        x_kept, z = x.to(dtype), plain.encode(x)
        given = x_kept.clone()
        got_z, got_x = fused.encode(given).float(), fused.decode(z.to(dtype)).float()
        torch.testing.assert_close(got_z, z, atol=TOLERANCE[dtype], rtol=1e-3)
        torch.testing.assert_close(got_x, plain.decode(z), atol=TOLERANCE[dtype], rtol=1e-3)
        assert torch.equal(given, x_kept), "inputs are left alone"


@torch.inference_mode()
def test_convolutions_by_winograd_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are large enough for it, and one that is too small."""
    monkeypatch.setattr("gesso_core.models.dc_ae_fused_conv._WINOGRAD_MIN_CHANNELS", 16)
    fused = fuse_for_inference(seeded(SANA_LIKE))
    assert any(isinstance(module, WinogradConv) for module in fused.modules())
    plain = seeded(SANA_LIKE)
    for x in (picture(64, 64), picture(12, 20, batch=1)):
        z = plain.encode(x)
        torch.testing.assert_close(fused.encode(x), z, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(fused.decode(z), plain.decode(z), atol=5e-5, rtol=1e-4)
