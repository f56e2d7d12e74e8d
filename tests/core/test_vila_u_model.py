"""VILA-U's parts: depth transformer, choice of codes, splicing, packing, templates, names."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest
from gesso_core.models.keys.translate import translate, untranslate
from gesso_core.models.keys.vila_u import DEPTH_TRANSFORMER
from gesso_core.models.keys.vila_u_tower import DEPTH_PREFIX
from gesso_core.models.vila_u.code_sampling import (
    guided,
    inverse_cdf,
    probabilities,
    top_k_filter,
    top_p_filter,
    uniforms,
)
from gesso_core.models.vila_u.depth_transformer import DepthConfig, DepthTransformer
from gesso_core.models.vila_u.drawing import Rows
from gesso_core.models.vila_u.losses import training_losses
from gesso_core.models.vila_u.packing import block_diagonal_mask, pack_rows
from gesso_core.models.vila_u.splice import IGNORED, IMAGE_PLACEHOLDER, Picture, pad_rows, splice
from gesso_core.models.vila_u.template import (
    SHORT,
    SYSTEM,
    VICUNA_V1,
    Template,
    Turn,
    conversation_text,
    tokenize,
    training_ids,
)
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.train.vila_u_tokenizer import load_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

LAYOUT = Path(__file__).parents[1] / "golden" / "key_layouts" / "vila_u_7b_256.json"
DEPTH = DepthConfig(depth=5, codebook=11, code_width=8, state_width=12, width=16, heads=2, layers=2)


@pytest.fixture
def depth_transformer() -> DepthTransformer:
    torch.manual_seed(0)
    model = DepthTransformer(DEPTH)
    torch.nn.init.normal_(model.position_1DE)
    return model.eval().requires_grad_(False)


def layout() -> dict[str, dict[str, list[int]]]:
    values: dict[str, dict[str, list[int]]] = json.loads(LAYOUT.read_text())
    return values


def test_the_cache_changes_no_logits(depth_transformer: DepthTransformer) -> None:
    states, sums = torch.randn(6, 12), torch.randn(6, 5, 8)
    taught = depth_transformer(states, sums)
    logits, cache = depth_transformer.begin(states)
    for depth in range(DEPTH.depth):
        torch.testing.assert_close(logits, taught[:, depth])
        torch.testing.assert_close(
            depth_transformer.recomputed(states, sums[:, :depth]), taught[:, depth]
        )
        if depth + 1 < DEPTH.depth:
            logits = depth_transformer.extend(sums[:, depth], cache)


def test_no_code_sees_itself_or_a_later_one(depth_transformer: DepthTransformer) -> None:
    states, sums = torch.randn(1, 12), torch.randn(1, 5, 8)
    changed = sums.clone()
    changed[:, 2] += 1
    before, after = depth_transformer(states, sums), depth_transformer(states, changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])
    changed[:, 4] += 1  # the last sum predicts nothing
    assert torch.equal(after, depth_transformer(states, changed))


def test_a_row_has_the_same_logits_in_any_batch(depth_transformer: DepthTransformer) -> None:
    states, sums = torch.randn(9, 12), torch.randn(9, 8)
    for count in (4, 5, 9):
        first, cache = depth_transformer.begin(states[:count])
        second = depth_transformer.extend(sums[:count], cache)
        alone, cache = depth_transformer.begin(states[:4])
        assert torch.equal(first[:4], alone)
        assert torch.equal(second[:4], depth_transformer.extend(sums[:4], cache))


def test_ties_with_the_kth_logit_stay_and_the_crossing_code_too() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 0.0]])
    kept = top_k_filter(logits, torch.tensor([3]))
    assert kept.isfinite().tolist() == [[True, True, True, True, False]]
    probs = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    torch.testing.assert_close(
        top_p_filter(probs, torch.tensor([0.6])), torch.tensor([[0.625, 0.0, 0.375, 0.0]])
    )
    assert top_p_filter(probs, torch.tensor([0.1]))[0].tolist() == [1, 0, 0, 0]


def test_filters_of_a_batch_are_those_of_each_row() -> None:
    logits = torch.randn(4, 30)
    top_k, top_p = torch.tensor([1, 5, 900, 30]), torch.tensor([0.9, 0.5, 1.0, 0.96])
    together = probabilities(logits, top_k, top_p)
    for row in range(4):
        alone = probabilities(logits[row : row + 1], top_k[row : row + 1], top_p[row : row + 1])
        assert torch.equal(together[row], alone[0])
    assert int((together[0] > 0).sum()) == 1
    in_turn = top_p_filter(top_k_filter(logits, top_k).softmax(dim=-1), top_p)
    torch.testing.assert_close(together, in_turn)


def test_a_draw_follows_the_probabilities_and_never_takes_what_was_filtered() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(2000, -1)
    drawn = inverse_cdf(probs, torch.linspace(0, 1 - 1e-12, 2000, dtype=torch.float64))
    counts = drawn.bincount(minlength=5).tolist()
    assert counts[0] == counts[2] == counts[4] == 0
    assert abs(counts[1] - 500) <= 1
    assert inverse_cdf(probs[:1], torch.tensor([1.0], dtype=torch.float64)).tolist() == [3]


def test_random_numbers_come_from_the_seed_alone() -> None:
    assert torch.equal(uniforms(3, 4, 2), uniforms(3, 4, 2))
    assert torch.equal(uniforms(3, 8, 2)[:4], uniforms(3, 4, 2))
    assert not torch.equal(uniforms(4, 4, 2), uniforms(3, 4, 2))


def test_guidance_moves_away_from_the_unconditional_row() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    rows = Rows(((0, 2), (1, 1)), torch.device("cpu"))
    moved = guided(logits, rows.conditional, rows.unconditional, torch.tensor([3.0, 3.0]))
    assert moved.tolist() == [[3.0, -2.0], [0.5, 0.5]]


def test_a_flag_decides_which_picture_is_the_target(vila_u: VilaUPipeline) -> None:
    vocabulary = vila_u.model.config.vocabulary
    seen, wanted = torch.randint(20, (4, 3)), torch.randint(20, (4, 3))
    ids = [0, IMAGE_PLACEHOLDER, 7, IMAGE_PLACEHOLDER, 9]
    pictures = [Picture(codes_ND=seen), Picture(codes_ND=wanted, answer=True)]
    row = splice(ids, pictures, depth=3, vocabulary=vocabulary, labels=[IGNORED, 0, 7, 0, 9])
    assert len(row) == 11
    assert row.labels_LD[1:5].unique().tolist() == [IGNORED]
    assert torch.equal(row.labels_LD[6:10], wanted + vocabulary)
    assert row.labels_LD[5].tolist() == [7, 7, 7]
    assert torch.equal(row.codes_LD[1:5], seen)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_pictures_is_refused(count: int) -> None:
    pictures = [Picture(codes_ND=torch.zeros(4, 3, dtype=torch.int64))] * count
    with pytest.raises(InvalidRequest, match=f"1 places for pictures, but {count}") as caught:
        splice([0, IMAGE_PLACEHOLDER], pictures, depth=3, vocabulary=9)
    assert caught.value.field == "images"


def rows_of(vila_u: VilaUPipeline) -> list:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, answer in ((5, False), (3, True), (9, False), (2, True)):
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        codes = torch.randint(20, (4, 3), generator=generator)
        rows.append(
            splice(
                [0, *ids, IMAGE_PLACEHOLDER, 7],
                [Picture(codes_ND=codes, answer=answer)],
                depth=3,
                vocabulary=vila_u.model.config.vocabulary,
                labels=[IGNORED, *ids, 0, 7],
            )
        )
    return rows


def test_packed_rows_do_not_see_each_other(vila_u: VilaUPipeline) -> None:
    rows = rows_of(vila_u)
    packed = pack_rows(rows, 32)
    assert packed.ids_BL.shape[0] < len(rows)
    states = vila_u.model.states(packed)
    longest = max(rows, key=len)
    alone = vila_u.model.states(pad_rows([longest]))
    torch.testing.assert_close(states[0, : len(longest)], alone[0])
    second = states[packed.segments_BL == 2][0]
    first_token = vila_u.model.states(pad_rows([rows[0]]))[0, 0]
    torch.testing.assert_close(second, first_token)


def test_packing_and_padding_side_change_no_loss(vila_u: VilaUPipeline) -> None:
    rows = rows_of(vila_u)
    padded = training_losses(vila_u.model, pad_rows(rows))
    for other in (pack_rows(rows, 64), pack_rows(rows), pad_rows(rows, left=True)):
        losses = training_losses(vila_u.model, other)
        torch.testing.assert_close(losses.text, padded.text)
        torch.testing.assert_close(losses.image, padded.image)


def test_every_row_of_the_mask_sees_something(vila_u: VilaUPipeline) -> None:
    mask = block_diagonal_mask(torch.tensor([[1, 1, 2, 0, 0]]))
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_a_row_over_the_capacity_is_refused(vila_u: VilaUPipeline) -> None:
    with pytest.raises(ConfigError, match="does not fit into 8"):
        pack_rows(rows_of(vila_u), 8)


def test_a_batch_without_pictures_or_without_words_has_a_loss(vila_u: VilaUPipeline) -> None:
    words = splice([0, 5, 6], [], depth=3, vocabulary=400, labels=[IGNORED, 5, 6])
    losses = training_losses(vila_u.model, pad_rows([words]))
    assert float(losses.image) == 0
    assert float(losses.text) > 0


def test_the_templates_are_those_of_the_published_models() -> None:
    turns = [Turn(role="user", text="hi"), Turn(role="assistant", text="ho")]
    asked = [*turns, Turn(role="user", text="<image>\nwhat?")]
    assert conversation_text(VICUNA_V1, asked) == (
        f"{SYSTEM} USER: hi ASSISTANT: ho</s>USER: <image>\nwhat? ASSISTANT:"
    )
    assert conversation_text(SHORT, turns) == "USER: hi ASSISTANT: ho</s>"
    with pytest.raises(InvalidRequest, match="message 2 is from the user"):
        conversation_text(SHORT, [turns[0], turns[0]])


def test_another_system_sentence_needs_another_hash() -> None:
    with pytest.raises(ConfigError, match="trained with another one"):
        replace(VICUNA_V1, system=f"{SYSTEM} ")
    assert Template(system="Be brief.").system == "Be brief."


def test_training_and_use_read_the_same_tokens(vila_u_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(vila_u_tokenizer)
    turns = [
        Turn(role="user", text="<image>\nwhat is it?"),
        Turn(role="assistant", text="a red disc"),
        Turn(role="user", text="describe"),
        Turn(role="assistant", text="yes"),
    ]
    ids, labels = training_ids(tokenizer, SHORT, turns)
    asked = tokenize(tokenizer, conversation_text(SHORT, turns[:1]))
    assert ids[: len(asked)] == asked
    assert asked.count(IMAGE_PLACEHOLDER) == 1
    again = tokenize(tokenizer, conversation_text(SHORT, turns[:3]))
    assert ids[: len(again)] == again
    said = [token for token in labels if token != IGNORED]
    assert tokenizer.decode(said) == " a red disc</s> yes</s>"


def test_every_published_name_has_a_home() -> None:
    published = layout()
    sizes = published["_meta"]["constructor"]
    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig(**sizes["llm"]))
        depth = DepthTransformer(DepthConfig.from_original(sizes["rqtransformer"]))
    shapes = {name: list(tensor.shape) for name, tensor in llm.state_dict().items()}
    assert shapes == published["llm"]
    state = {
        name.removeprefix(DEPTH_PREFIX): torch.empty(shape, device="meta")
        for name, shape in published["vision_tower"].items()
        if name.startswith(DEPTH_PREFIX)
    }
    translate(state, DEPTH_TRANSFORMER, expected=depth.state_dict())
    back = untranslate(depth.state_dict(), DEPTH_TRANSFORMER)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    assert sum(tensor.numel() for tensor in depth.parameters()) == 527_145_984


def test_parts_of_different_models_are_refused(vila_u: VilaUPipeline) -> None:
    config = vila_u.model.config
    with pytest.raises(ConfigError, match="codes per position is 4, that of its neighbour 3"):
        replace(config, depth=replace(config.depth, depth=4))
    with pytest.raises(ConfigError, match="draws from 21 codes, the vision tower has 20"):
        replace(config, depth=replace(config.depth, codebook=21))
    with pytest.raises(ConfigError, match="multiple of 3 heads"):
        replace(config.depth, heads=3)
