"""What keys and values will take is known before anything is fed, to the byte."""

from typing import Any

import numpy as np
import pytest
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_draft import AnswerOptions, DrawRecipe, Utterance, Video
from gesso_core.pipelines.vila_u_room import answering_bytes, drawing_bytes, judging_bytes


def picture(side: int = 20) -> Pixels:
    return np.full((side, side, 3), 90, dtype=np.uint8)


def taken(pipeline: VilaUPipeline, recipe: DrawRecipe, *image: Pixels) -> int:
    """What a drawing takes once its prompt is fed."""
    return pipeline.kv_bytes(*pipeline.advance([pipeline.begin(recipe, *image)]))


def wish(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**({"prompt": "a red disc", "width": 16, "height": 16} | changes))


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"prompt": "a red disc " * 5}])
def test_a_drawing_takes_what_was_told(vila_u: VilaUPipeline, changes: dict[str, Any]) -> None:
    recipe = vila_u.recipe(wish(**changes))
    assert drawing_bytes(vila_u, recipe) == taken(vila_u, recipe)


def test_a_picture_in_the_prompt_counts_and_kept_rows_do_not(vila_u: VilaUPipeline) -> None:
    recipe, keeping = vila_u.recipe(wish()), vila_u.recipe(wish(keep=1))
    shown = taken(vila_u, recipe, picture())
    told = drawing_bytes(vila_u, recipe, shown=True)
    assert shown <= told < 1.1 * shown  # the line end may melt into the next word
    kept = taken(vila_u, keeping, picture())
    assert drawing_bytes(vila_u, keeping) == kept < shown


def test_a_video_takes_what_was_told(vila_u: VilaUPipeline) -> None:
    recipe = vila_u.video_recipe(wish())
    assert drawing_bytes(vila_u, recipe) == taken(vila_u, recipe)


def test_an_answer_takes_what_was_told(vila_u: VilaUPipeline) -> None:
    frames = Video(np.stack([picture()] * 3))
    for parts in (("hello",), (picture(), "what is it?"), (picture(), frames, "what is it?")):
        said = [Utterance(role="user", parts=parts)]
        for options in (AnswerOptions(max_tokens=3), AnswerOptions(max_tokens=20)):
            (draft,) = vila_u.advance_answers([vila_u.begin_answer(said, options)])
            assert answering_bytes(vila_u, said, options) == vila_u.kv_bytes(draft)


def test_a_conversation_that_cannot_be_read_is_refused_before_anything_is_fed(
    vila_u: VilaUPipeline,
) -> None:
    with pytest.raises(InvalidRequest, match="mark of the model"):
        answering_bytes(vila_u, [Utterance(role="user", parts=("<image>",))], AnswerOptions())


def test_a_judgement_grows_with_its_pictures_and_its_words(vila_u: VilaUPipeline) -> None:
    one = judging_bytes(vila_u, 1, "a red disc")
    assert judging_bytes(vila_u, 5, "a red disc") == 5 * one
    assert judging_bytes(vila_u, 1, "a red disc on blue") > one
