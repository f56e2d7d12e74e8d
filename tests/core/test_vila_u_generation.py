"""Drawing with a VILA-U: batches, seeds, pictures in the prompt, kept rows, videos, refusals."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.step_batcher import StepBatcher
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_draft import DrawDraft
from gesso_core.pipelines.vila_u_room import drawing_bytes


def asked(prompt: str = "a red disc", **options: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, width=16, height=16, **options)


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return values.astype(np.uint8)


def finished(pipeline: VilaUPipeline, *drafts: DrawDraft) -> list[DrawDraft]:
    going = list(drafts)
    while not all(draft.done for draft in going):
        open_ones = [draft for draft in going if not draft.done]
        moved = dict(zip(map(id, open_ones), pipeline.advance(open_ones), strict=True))
        going = [moved.get(id(draft), draft) for draft in going]
    return going


def fed(pipeline: VilaUPipeline, request: GenerationRequest, *image: np.ndarray) -> DrawDraft:
    """A draft whose prompt is fed and that has nothing drawn yet."""
    (draft,) = pipeline.advance([pipeline.begin(pipeline.recipe(request), *image)])
    return draft


def drawn(pipeline: VilaUPipeline, *requests: GenerationRequest) -> list[DrawDraft]:
    return finished(pipeline, *(pipeline.begin(pipeline.recipe(r)) for r in requests))


REQUESTS = (
    asked("a red disc", seed=1),
    asked("hello there, who are you", seed=2, guidance_scale=1.0),
    asked("a", seed=3, guidance_scale=7.5, top_k=4),
    asked("describe the picture " * 5, seed=1, top_p=0.5),
    asked("a red disc", seed=9),
)


def test_a_seed_gives_the_same_codes_alone_and_in_a_mixed_batch(vila_u: VilaUPipeline) -> None:
    together = drawn(vila_u, *REQUESTS)
    for request, draft in zip(REQUESTS, together, strict=True):
        (alone,) = drawn(vila_u, request)
        assert torch.equal(alone.codes_TD, draft.codes_TD)
        assert torch.equal(alone.streams[0].state_S, draft.streams[0].state_S)
    assert not torch.equal(together[0].codes_TD, together[4].codes_TD)


def test_drafts_may_join_at_different_rows(vila_u: VilaUPipeline) -> None:
    early, late = (vila_u.begin(vila_u.recipe(request)) for request in REQUESTS[:2])
    for _ in range(2):  # its prompt, then a row
        (early,) = vila_u.advance([early])
    both = finished(vila_u, early, late)
    assert [draft.steps_done for draft in both] == [2, 2]
    for request, draft in zip(REQUESTS[:2], both, strict=True):
        assert torch.equal(drawn(vila_u, request)[0].codes_TD, draft.codes_TD)


def test_prompts_are_fed_together_and_those_that_draw_wait_for_them(vila_u: VilaUPipeline) -> None:
    (ahead,) = vila_u.advance([fed(vila_u, REQUESTS[0])])
    late = [vila_u.begin(vila_u.recipe(request), picture(0)) for request in REQUESTS[1:]]
    waited, *moved = vila_u.advance([ahead, *late])
    assert waited is ahead
    assert [draft.steps_done for draft in moved] == [0] * len(late)
    for request, draft in zip(REQUESTS[1:], moved, strict=True):
        alone = fed(vila_u, request, picture(0))
        for stream, other in zip(alone.streams, draft.streams, strict=True):
            assert torch.equal(stream.state_S, other.state_S)


def test_a_repeated_step_repeats_its_codes(vila_u: VilaUPipeline) -> None:
    (draft,) = vila_u.advance([fed(vila_u, REQUESTS[0])])
    first, second = vila_u.advance([draft])[0], vila_u.advance([draft])[0]
    assert torch.equal(first.codes_TD, second.codes_TD)
    assert draft.steps_done == 1


def test_guidance_changes_the_picture_and_one_means_a_single_row(vila_u: VilaUPipeline) -> None:
    plain, strong = drawn(vila_u, asked(guidance_scale=1.0), asked(guidance_scale=9.0))
    assert len(plain.streams) == 1
    assert len(strong.streams) == 2
    assert not torch.equal(plain.codes_TD, strong.codes_TD)


def test_the_picture_grows_row_by_row(vila_u: VilaUPipeline) -> None:
    draft = fed(vila_u, asked())
    assert float(vila_u.latent(draft).abs().sum()) == 0
    (half,) = vila_u.advance([draft])
    latent = vila_u.latent(half)
    assert latent.shape == (32, 2, 2) == half.recipe.latent_shape
    assert float(latent[:, 0].abs().min(dim=1).values.max()) > 0
    assert float(latent[:, 1].abs().max()) == 0
    (done,) = vila_u.advance([half])
    assert done.done
    assert torch.equal(vila_u.latent(done)[:, 0], latent[:, 0])
    codes = done.codes_TD.view(1, 2, 2, 3)
    expected = vila_u.model.tower.embed(codes)[0].permute(2, 0, 1)
    torch.testing.assert_close(vila_u.latent(done), expected)


def test_kept_rows_are_those_of_the_picture_and_the_rest_follows_from_them(
    vila_u: VilaUPipeline,
) -> None:
    image = picture(0, 40, 30)
    recipe = vila_u.recipe(asked(keep=1, top_k=1))
    draft = vila_u.begin(recipe, image)
    assert draft.steps_done == 1
    (done,) = finished(vila_u, draft)
    (coded,) = vila_u.prompter.encode([image])
    assert torch.equal(done.codes_TD[:2], coded.codes_ND[:2])
    other = finished(vila_u, vila_u.begin(recipe, picture(7)))[0]
    assert not torch.equal(other.codes_TD[2:], done.codes_TD[2:])


def test_a_fitted_picture_is_seen_as_the_large_one_is(vila_u: VilaUPipeline) -> None:
    large = picture(3, 70, 45)
    fitted = vila_u.prompter.fitted(large)
    assert fitted.shape == (16, 16, 3)
    whole, small = vila_u.prompter.encode([large, fitted])
    assert torch.equal(whole.codes_ND, small.codes_ND)


def test_a_picture_in_the_prompt_counts(vila_u: VilaUPipeline) -> None:
    plain = asked(top_k=1, guidance_scale=1.0)
    before = fed(vila_u, plain, picture(0))
    placed = fed(vila_u, replace(plain, prompt="<image>\na red disc"), picture(0))
    without = fed(vila_u, plain)
    assert torch.equal(before.streams[0].state_S, placed.streams[0].state_S)
    assert before.streams[0].length == without.streams[0].length + 6  # a space, 4, a line end
    assert not torch.equal(before.streams[0].state_S, without.streams[0].state_S)


def test_a_video_is_one_stream_of_frames(vila_u: VilaUPipeline) -> None:
    recipe = vila_u.video_recipe(asked(seed=4))
    assert (recipe.frames, recipe.steps) == (2, 4)
    (draft,) = finished(vila_u, vila_u.begin(recipe))
    frames = vila_u.frames(draft)
    assert [tuple(frame.shape) for frame in frames] == [(32, 2, 2)] * 2
    assert not torch.equal(frames[0], frames[1])
    assert torch.equal(vila_u.latent(draft), frames[1])
    mixed = finished(vila_u, vila_u.begin(recipe), vila_u.begin(vila_u.recipe(asked(seed=8))))
    assert torch.equal(mixed[0].codes_TD, draft.codes_TD)


def test_the_step_batcher_runs_them(vila_u: VilaUPipeline) -> None:
    batcher = StepBatcher()
    rows: list[int] = []
    tickets = [
        batcher.add(
            vila_u,
            vila_u.begin(vila_u.recipe(request)),
            on_step=lambda draft: rows.append(draft.steps_done),
        )
        for request in REQUESTS
    ]
    assert batcher.step() == len(REQUESTS)
    while batcher.step():
        pass
    assert sorted(rows) == [1] * 5 + [2] * 5  # nothing is told of a step that feeds prompts
    assert all(ticket.outcome.result().done for ticket in tickets)


def test_memory_is_known_before_it_is_taken(vila_u: VilaUPipeline) -> None:
    for request in REQUESTS[:2]:
        recipe = vila_u.recipe(request)
        assert drawing_bytes(vila_u, recipe) == vila_u.kv_bytes(fed(vila_u, request))
        draft = fed(vila_u, request, picture(0))
        assert drawing_bytes(vila_u, recipe, shown=True) == vila_u.kv_bytes(draft)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"negative_prompt": "red"}, "negative_prompt", "no use for negative_prompt"),
        ({"steps": 4}, "steps", "leave it out"),
        ({"sampler": "flow-euler"}, "sampler", "leave it out"),
        ({"prompt": " "}, "prompt", "empty"),
        ({"seed": -1}, "seed", "0..2"),
        ({"guidance_scale": 31.0}, "guidance_scale", "0 to 30"),
        ({"top_k": 0}, "top_k", "20 are all"),
        ({"top_p": 0.0}, "top_p", "over 0 up to 1"),
        ({"keep": 2}, "keep", "0 to 1 of its 2 rows"),
        ({"width": 1000}, "width", "longer than 4 to 1"),
    ],
)
def test_what_it_cannot_do_is_refused_by_field(
    vila_u: VilaUPipeline, options: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        vila_u.recipe(replace(asked(), **options))
    assert caught.value.field == field


def test_prompts_that_do_not_fit_are_refused_with_both_numbers(vila_u: VilaUPipeline) -> None:
    recipe = vila_u.recipe(asked("word " * 100))
    with pytest.raises(InvalidRequest, match="at most 124 in the prompt") as caught:
        vila_u.begin(recipe)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("prompt", ["a </s> b", "<im_start>", "x<vi_end>"])
def test_marks_of_the_model_are_not_words(vila_u: VilaUPipeline, prompt: str) -> None:
    with pytest.raises(InvalidRequest, match="mark of the model"):
        vila_u.begin(vila_u.recipe(asked(prompt)))


def test_pictures_and_their_places_must_agree(vila_u: VilaUPipeline) -> None:
    places = "<image> in red", "<image> and <image>"
    for recipe, shown, words in (
        (vila_u.recipe(asked(places[0])), None, "1 <image>, but 0 pictures .* leave <image> out"),
        (vila_u.recipe(asked(places[1])), picture(0), "2 <image>, but 1 pictures"),
        (vila_u.recipe(asked(places[0], keep=1)), picture(0), "1 <image>, but 0 pictures"),
        (vila_u.video_recipe(asked(places[0])), None, "1 <image>, but 0 pictures"),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            vila_u.begin(recipe, shown)
        assert caught.value.field == "prompt"
    with pytest.raises(InvalidRequest, match="of which picture"):
        vila_u.begin(vila_u.recipe(asked(keep=1)))
    with pytest.raises(InvalidRequest, match="send RGB") as caught:
        vila_u.begin(vila_u.recipe(asked()), picture(0)[..., 0])
    assert caught.value.field == "image"


def test_a_model_without_videos_says_so(
    vila_u: VilaUPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(vila_u.model.config, video_frames=0)
    monkeypatch.setattr(vila_u.model, "config", config)
    with pytest.raises(InvalidRequest, match="no videos"):
        vila_u.video_recipe(asked())


def test_numbers_that_are_none_are_noticed(vila_u: VilaUPipeline) -> None:
    sick, sound = (fed(vila_u, asked(seed=seed)) for seed in (0, 1))
    stream = sick.streams[0]._replace(state_S=torch.full((32,), torch.nan))
    with torch.inference_mode():
        stream.cache.both_2LHTe[1, :, :, : stream.length] = torch.nan
    moved = vila_u.advance([replace(sick, streams=(stream, sick.streams[1])), sound])
    assert [draft.finite for draft in moved] == [False, True]
    assert torch.equal(moved[1].codes_TD, vila_u.advance([sound])[0].codes_TD)
    assert "NaN" in moved[0].describe_failure("not finite")


@pytest.mark.parametrize("part", ["classifier", "unconditional"])
def test_numbers_that_are_not_finite_are_seen_wherever_they_arise(
    vila_u: VilaUPipeline, part: str
) -> None:
    draft = fed(vila_u, asked(guidance_scale=3.0))
    bias_K = vila_u.model.depth_transformer.classifier.bias
    kept = bias_K[0].item()
    if part == "classifier":
        bias_K.data[0] = torch.nan
    else:
        with torch.inference_mode():
            draft.streams[1].cache.both_2LHTe[1] = torch.nan
    try:
        (moved,) = vila_u.advance([draft])
    finally:
        bias_K.data[0] = kept
    assert not moved.finite
