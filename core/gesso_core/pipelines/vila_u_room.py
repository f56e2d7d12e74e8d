"""How much memory keys and values will fill, told before anything is fed to the model.

Nothing is fed: texts are read into tokens, and a picture counts as the tokens that it will become.
"""

from collections.abc import Sequence

from gesso_core.models.vila_u.template import PLACEHOLDER
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_draft import AnswerOptions, DrawRecipe, Utterance


def drawing_bytes(pipeline: VilaUPipeline, recipe: DrawRecipe, *, shown: bool = False) -> int:
    """Bytes of a picture or video under way; ``shown``: a picture is part of the prompt."""
    tokens = pipeline.model.config.tokens
    asked = f"{PLACEHOLDER}\n{recipe.prompt}" if shown else recipe.prompt
    ids = pipeline.prompter.picture_ids(asked, video=recipe.video)
    prompt = len(ids) + (tokens - 1 if shown else 0)
    return pipeline.kv_bytes_needed(prompt, tokens * recipe.frames, guided=recipe.guided)


def answering_bytes(
    pipeline: VilaUPipeline, conversation: Sequence[Utterance], options: AnswerOptions
) -> int:
    """Bytes of an answer under way.

    Raises:
        InvalidRequest: a conversation that the model cannot read.
    """
    ids, pictures = pipeline.prompter.read(conversation)
    prompt = len(ids) + len(pictures) * (pipeline.model.config.tokens - 1)
    return pipeline.kv_bytes_needed(prompt, options.max_tokens)


def judging_bytes(pipeline: VilaUPipeline, pictures: int, prompt: str) -> int:
    """Bytes of judging so many pictures together.

    Raises:
        InvalidRequest: a prompt that the model cannot read.
    """
    return pictures * pipeline.kv_bytes_needed(pipeline.judging.question(prompt).tokens, 0)
