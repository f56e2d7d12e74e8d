"""The Sana denoiser: its names, its numbers against diffusers, and what callers rely on."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gesso_core.errors import InvalidRequest
from gesso_core.layers.attention import ReLULinearAttention
from gesso_core.layers.linear import Linear, linear, replace_linear_layers
from gesso_core.models.keys.sana import sana_keys
from gesso_core.models.keys.translate import translate
from gesso_core.models.sana import (
    SANA_CONFIGS,
    Sana,
    SanaConfig,
    TextContext,
    initialize_weights,
)
from torch import nn

# Wide enough for the fast matrix products, and everything else small.
SMALL = SanaConfig(
    width=160,
    depth=2,
    cross_heads=4,
    cross_head_dim=40,
    caption_channels=48,
    sample_size=4,
    in_channels=6,
    out_channels=6,
)
VARIANTS = {
    "1.0": SMALL,
    "1.5": replace(SMALL, qk_norm=True),
    "sprint": replace(SMALL, qk_norm=True, guidance_embedding=True),
    "2k": replace(SMALL, interpolation_scale=1.0),
    "4k": replace(SMALL, interpolation_scale=2.0),
    "patches": replace(SMALL, patch_size=2),
    "biased": replace(SMALL, attention_bias=True, cross_head_dim=24),
}


def model_of(config: SanaConfig, seed: int = 0) -> Sana:
    model = Sana(config).eval()
    initialize_weights(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # at its start value of 0.01 the text would hardly count
        model.caption.norm.weight.fill_(1.0)
    return model


def random_inputs(
    config: SanaConfig, batch: int = 3, grid: tuple[int, int] = (4, 6), tokens: int = 7
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(batch):
        mask[row, 2 + row :] = 0
    inputs = {
        "latent_BCHW": torch.randn(batch, config.in_channels, *grid, generator=generator),
        "timestep_B": torch.linspace(1, 999, batch),
        "text_BLS": torch.randn(batch, tokens, config.caption_channels, generator=generator),
        "text_mask_BL": mask,
    }
    if config.guidance_embedding:
        inputs["guidance_B"] = torch.full((batch,), 0.45)
    return inputs


@pytest.fixture(scope="module")
def diffusers_sana() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import SanaTransformer2DModel
    return SanaTransformer2DModel


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_those_of_diffusers(variant: str, diffusers_sana: Any) -> None:
    config = VARIANTS[variant]
    torch.manual_seed(0)
    peer = diffusers_sana.from_config(config.to_diffusers()).eval()
    model = Sana(config).eval()
    state = peer.state_dict()
    model.load_state_dict(translate(state, sana_keys(state), expected=model.state_dict()))
    given = random_inputs(config)
    with torch.no_grad():
        want = peer(
            given["latent_BCHW"],
            given["text_BLS"],
            given["timestep_B"],
            guidance=given.get("guidance_B"),
            encoder_attention_mask=given["text_mask_BL"],
        ).sample
        got = model(**given)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("variant", ["1.0", "1.5"])
def test_gradients_are_those_of_plain_matrix_products(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VARIANTS[variant]
    gradients = []
    for fast in (True, False):
        monkeypatch.setattr("gesso_core.layers.linear._HAS_ONEDNN", fast)
        model = model_of(config)
        model(**random_inputs(config)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_of(SMALL)
        model.gradient_checkpointing = checkpointing
        model(**random_inputs(SMALL)).square().mean().backward()
        gradients.append(model.blocks[0].attention.qkv.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_text_encoded_once_gives_the_same_velocity() -> None:
    model, given = model_of(VARIANTS["1.5"]), random_inputs(SMALL)
    latent, time = given["latent_BCHW"], given["timestep_B"]
    with torch.no_grad():
        context = model.encode_text(given["text_BLS"], given["text_mask_BL"])
        assert torch.equal(model(latent, time, context), model(**given))


def test_texts_encoded_apart_can_share_a_forward() -> None:
    model, given = model_of(VARIANTS["1.5"]), random_inputs(SMALL)
    text, mask = given["text_BLS"], given["text_mask_BL"]
    with torch.no_grad():
        apart = [model.encode_text(text[i : i + 1], mask[i : i + 1]) for i in range(3)]
        assert [context.tokens for context in apart] == [2, 3, 4]
        joined = TextContext.concatenate(apart)
        got = model(given["latent_BCHW"], given["timestep_B"], joined)
        second = model(
            given["latent_BCHW"][1:2], given["timestep_B"][1:2], joined.select(slice(1, 2))
        )
    torch.testing.assert_close(got, model(**given), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second, got[1:2], atol=1e-5, rtol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model, given = model_of(VARIANTS["1.5"]), random_inputs(SMALL)
    with torch.no_grad():
        together = model(**given)
        for row in range(3):
            alone = model(**{name: tensor[row : row + 1] for name, tensor in given.items()})
            torch.testing.assert_close(alone[0], together[row], atol=5e-6, rtol=0)


def test_masked_tokens_do_not_count() -> None:
    model, given = model_of(SMALL), random_inputs(SMALL)
    changed = given["text_BLS"].where(given["text_mask_BL"].bool()[..., None], 100.0)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**{**given, "text_BLS": changed}), model(**given), atol=1e-6, rtol=0
        )


def test_a_text_without_a_valid_token_gives_finite_numbers() -> None:
    model, given = model_of(SMALL), random_inputs(SMALL)
    given["text_mask_BL"][0] = 0
    with torch.no_grad():
        assert model(**given).isfinite().all()


@pytest.mark.parametrize("chunks", [2, 3, 7])
def test_chunks_of_the_feed_forward_network_add_up(chunks: int) -> None:
    model, given = model_of(SMALL), random_inputs(SMALL)
    with torch.no_grad():
        whole = model(**given)
        model.chunk_ffn(chunks)
        torch.testing.assert_close(model(**given), whole, atol=1e-5, rtol=1e-5)


def test_the_position_table_tells_columns_from_rows() -> None:
    model = model_of(VARIANTS["2k"])
    table = model.positions(4, 6, like=torch.zeros(1))
    grid = table.view(4, 6, 160)
    assert torch.equal(grid[0, :, :80], grid[3, :, :80])  # the first half follows the column
    assert torch.equal(grid[:, 0, 80:], grid[:, 5, 80:])
    assert model.positions(4, 6, like=torch.zeros(1)) is table


def test_half_precision_stays_close_to_fp32() -> None:
    given = random_inputs(SMALL)
    with torch.no_grad():
        want = model_of(SMALL)(**given)
        got = model_of(SMALL).bfloat16()(**given)
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.999


def test_attention_in_fp16_is_clipped_rather_than_infinite() -> None:
    torch.manual_seed(0)
    attention = ReLULinearAttention(32, 8, qk_norm=False).half()
    with torch.no_grad():
        attention.out.weight.fill_(6e4)
        out = attention(10 * torch.ones(1, 5, 32, dtype=torch.float16))
    assert out.isfinite().all()
    assert out.abs().max() == 65_504


@pytest.mark.parametrize("shape", [(1, 160), (5, 160), (2, 7, 160)], ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_fast_linear_is_linear(shape: tuple[int, ...], activation: Any) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(128, 160), torch.randn(128)
    want = F.linear(x, weight, bias)
    want = F.silu(want) if activation == "silu" else want
    torch.testing.assert_close(linear(x, weight, bias, activation), want, atol=1e-4, rtol=1e-5)


def test_replaced_layers_keep_their_names_order_and_parameters() -> None:
    parts = {"out": nn.Linear(4, 2, bias=False), "inner": nn.Sequential(nn.Linear(3, 4), nn.ReLU())}
    model = nn.ModuleDict(parts)
    before = dict(model.named_parameters())
    replace_linear_layers(model)
    assert [type(layer) for layer in (model["out"], model["inner"][0])] == [Linear, Linear]
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_guidance_is_asked_for_where_it_is_an_input() -> None:
    given = random_inputs(SMALL)
    with pytest.raises(InvalidRequest, match="pass guidance"):
        model_of(VARIANTS["sprint"])(**given)
    with pytest.raises(InvalidRequest, match="classifier-free"):
        model_of(SMALL)(**given, guidance_B=torch.ones(3))


def test_a_latent_that_patches_do_not_tile_is_refused() -> None:
    config = VARIANTS["patches"]
    with pytest.raises(InvalidRequest, match="multiple of 2"):
        model_of(config)(**random_inputs(config, grid=(4, 5)))


@torch.no_grad()
def test_initial_weights_follow_the_recipe() -> None:
    model = Sana(VARIANTS["sprint"])
    initialize_weights(model, torch.Generator().manual_seed(3))
    block = model.blocks[0]
    bound = (6 / (160 + 480)) ** 0.5
    assert block.attention.qkv.weight.abs().max() <= bound
    assert block.attention.qkv.weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert model.modulation.weight.std() == pytest.approx(0.02, rel=0.02)
    assert model.time.out.weight.std() == pytest.approx(0.02, rel=0.02)
    assert block.table.std() == pytest.approx(160**-0.5, rel=0.1)
    assert block.ffn.depthwise.weight.abs().max() <= 1 / 3
    assert (model.caption.norm.weight == 0.01).all()
    assert (block.attention.q_norm.weight == 1).all()
    assert not model.guidance.out.weight.any()
    assert model.head.linear.weight.any()
    assert not block.attention.out.bias.any()


def test_initial_weights_follow_the_seed_alone() -> None:
    one, same, other = (model_of(SMALL, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.linear.weight"], other["head.linear.weight"])


def test_the_layout_for_kernels_leaves_every_number() -> None:
    model = Sana(replace(SANA_CONFIGS["sana-tiny"], depth=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.lay_out_for_kernels()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    weight = model.get_parameter("blocks.0.ffn.depthwise.weight")
    assert weight.stride(0) == 1
