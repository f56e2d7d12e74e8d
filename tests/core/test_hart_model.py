"""HART's transformer: configuration, names of the weights, and what a slot can see."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest
from gesso_core.layers.kv_cache import KVRows
from gesso_core.layers.lone_rows import like_in_a_batch
from gesso_core.models.hart.config import HART_CONFIGS, HARTConfig, read_scales, scales_for
from gesso_core.models.hart.initialization import initialize_weights
from gesso_core.models.hart.transformer import HART
from gesso_core.models.keys.hart import HART_BUFFERS, HART_ORIGINAL
from gesso_core.models.keys.translate import translate, untranslate
from torch import Tensor

LAYOUT = Path(__file__).parents[1] / "golden" / "key_layouts" / "hart_0_7b.json"
SMALL = HARTConfig(
    scales=(1, 2, 3),
    vocabulary=20,
    latent_channels=4,
    context_tokens=6,
    context_channels=8,
    width=32,
    depth=2,
    heads=2,
    diffusion_width=16,
    diffusion_depth=1,
)


def model_of(config: HARTConfig) -> HART:
    model = HART(config)
    initialize_weights(model, torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_published_layout_fills_the_model_exactly() -> None:
    layout = json.loads(LAYOUT.read_text())
    with torch.device("meta"):
        model = HART(HART_CONFIGS["hart-0.7b-1024px"])
        stored = {name: torch.empty(shape) for name, shape in layout["llm"].items()}
    ours = translate(stored, HART_ORIGINAL, model.state_dict())
    assert ours.keys() == model.state_dict().keys()
    back = untranslate(model.state_dict(), HART_ORIGINAL)
    buffers = {key for key in layout["llm"] if key in HART_BUFFERS or "zero_k_bias" in key}
    assert {key: list(t.shape) for key, t in back.items()} == {
        key: shape for key, shape in layout["llm"].items() if key not in buffers
    }


def test_the_full_model_has_as_many_parameters_as_published() -> None:
    # Without the two optional parts, whose flags nobody has confirmed.
    plain = replace(HART_CONFIGS["hart-0.7b-1024px"], attention_norm=False, context_norm=False)
    with torch.device("meta"):
        model = HART(plain)
    counted = sum(p.numel() for p in model.parameters())
    optional = 24 * 24 + 1536
    assert 732_399_744 - counted in (0, optional, 24 * 24, 1536)
    assert sum(p.numel() for p in model.residual.parameters()) == 36_585_536


def test_every_flag_is_read_from_the_published_configuration() -> None:
    theirs = json.loads(LAYOUT.read_text())["_meta"]["constructor"]["llm"]
    config = HARTConfig.from_original(theirs, vocabulary=4096, latent_channels=32)
    assert config == HART_CONFIGS["hart-0.7b-1024px"]
    flipped = theirs | {"attn_l2_norm": False, "use_context_norm": False, "shared_aln": True}
    other = HARTConfig.from_original(flipped, vocabulary=4096, latent_channels=32)
    assert (other.attention_norm, other.context_norm, other.modulation) == (False, False, "shared")


@pytest.mark.parametrize("name", HART_CONFIGS)
def test_a_configuration_survives_being_written_and_read(name: str) -> None:
    config = HART_CONFIGS[name]
    written = json.loads(json.dumps(config.to_original()))
    read = HARTConfig.from_original(
        written, vocabulary=config.vocabulary, latent_channels=config.latent_channels
    )
    assert read == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_type": "gpt2"}, "mlp_type is 'gpt2'"),
        ({"a_new_flag": 1}, "unknown fields.*a_new_flag"),
        ({"patch_nums": [2, 3]}, "the first of 1"),
        ({"num_heads": 5}, "heads must be equal"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_a_configuration_that_cannot_be_computed_is_refused(
    change: dict[str, object], message: str
) -> None:
    values = SMALL.to_original() | change
    with pytest.raises(ConfigError, match=message):
        HARTConfig.from_original(values, vocabulary=20, latent_channels=4)


def test_the_configuration_of_something_else_is_not_taken_for_a_hart() -> None:
    with pytest.raises(ConfigError, match="not the configuration of a HART"):
        HARTConfig.from_original({"model_type": "qwen2"}, vocabulary=1, latent_channels=1)


def test_scales_are_known_for_three_sizes_and_otherwise_refused() -> None:
    sequences = {size: 300 + sum(p * p for p in scales_for(size)) - 1 for size in (256, 512, 1024)}
    assert sequences == {256: 979, 512: 2539, 1024: 9750}
    with pytest.raises(InvalidRequest, match="no list of scales for 768"):
        scales_for(768)
    assert read_scales("1_2_3") == (1, 2, 3)


def test_a_slot_sees_its_own_scale_and_the_ones_before_and_no_later_one() -> None:
    model = model_of(SMALL)
    text = model.encode_text(numbers(1, 6, 8), torch.ones(1, 6))
    teacher = numbers(1, SMALL.visual_slots, 4, seed=1)
    changed = teacher.clone()
    changed[:, 4:] += 1.0  # scale 3
    before, after = model(text, teacher), model(text, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    changed = teacher.clone()
    changed[:, 3] += 1.0  # the last token of scale 2 is seen by the first one
    assert not torch.allclose(before[:, 1], model(text, changed)[:, 1])


def test_gradient_checkpoints_change_nothing() -> None:
    model = model_of(SMALL).requires_grad_(True)
    teacher = numbers(2, SMALL.visual_slots, 4)

    def gradient() -> Tensor:
        model.zero_grad()
        text = model.encode_text(numbers(2, 6, 8), torch.ones(2, 6))
        model(text, teacher).square().sum().backward()
        grad = model.blocks[0].attention.qkv.weight.grad
        assert grad is not None
        return grad.clone()

    plain = gradient()
    model.checkpoint_blocks = True
    torch.testing.assert_close(gradient(), plain)


def test_a_text_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"this model reads \(6, 8\)"):
        model_of(SMALL).encode_text(numbers(1, 5, 8), torch.ones(1, 5))


def test_the_cache_of_a_row_grows_by_as_much_as_the_configuration_says() -> None:
    full = HART_CONFIGS["hart-0.7b-1024px"]
    assert full.cache_bytes(2) == 24 * 2 * 1536 * 9750 * 2


def rows_of(count: int, length: int, seed: int) -> KVRows:
    empty = KVRows.empty(
        layers=2, rows=count, heads=2, head_dim=4, capacity=length, like=torch.zeros(1)
    )
    writer = empty.writer(length)
    for layer in range(2):
        keys = numbers(count, 2, length, 4, seed=seed + layer)
        writer.append(layer, keys, keys + 1)
    return writer.rows


def test_gathering_the_same_rows_in_order_copies_nothing() -> None:
    rows = rows_of(3, 5, 0)
    assert KVRows.gather([(rows, 0), (rows, 1), (rows, 2)]) is rows
    assert KVRows.gather([(rows, 1), (rows, 0), (rows, 2)]) is not rows


def test_rows_of_different_values_come_together() -> None:
    one, other = rows_of(2, 5, 0), rows_of(1, 5, 7)
    both = KVRows.gather([(one, 1), (other, 0)], capacity=9)
    assert (both.rows, both.length) == (2, 5)
    for layer in range(2):
        for got, first, second in zip(
            both.layer(layer), one.layer(layer), other.layer(layer), strict=True
        ):
            assert torch.equal(got, torch.stack([first[1], second[0]]))


def test_a_step_may_be_repeated_from_where_it_began() -> None:
    start = KVRows.gather([(rows_of(1, 3, 0), 0)], capacity=8)
    first, second = numbers(1, 2, 2, 4, seed=3), numbers(1, 2, 2, 4, seed=4)

    def extended(new: Tensor) -> KVRows:
        writer = start.writer(2)
        for layer in range(2):
            writer.append(layer, new, new)
        return writer.rows

    one, two = extended(first), extended(second)
    assert torch.equal(one.layer(0)[0][:, :, 3:], first)  # the repetition did not overwrite it
    assert torch.equal(two.layer(0)[0][:, :, 3:], second)
    assert start.layer(0)[0].shape[2] == 3


def test_a_cache_without_room_takes_more() -> None:
    rows = KVRows.empty(layers=1, rows=1, heads=1, head_dim=4, capacity=1, like=torch.zeros(1))
    new = numbers(1, 1, 3, 4)
    writer = rows.writer(3)
    keys, values = writer.append(0, new, new)
    assert torch.equal(keys, new)
    assert torch.equal(values, new)


def test_a_lone_row_is_rounded_as_in_a_batch() -> None:
    weight, rows = numbers(512, 192), numbers(32, 192, seed=1)
    batch = rows @ weight.T
    for count in (1, 2, 3, 5):
        alone = like_in_a_batch(lambda x: x @ weight.T, rows[:count])
        assert torch.equal(alone, batch[:count])
