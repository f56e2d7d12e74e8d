"""Segmenters around segmenters: one counts what it is asked, one never asks twice."""

from collections.abc import Sequence

from gesso_core.annotate.segmenter.contract import Embedding, Masks, Prompt, Segmenter, joined
from gesso_core.pipelines.pictures import Pixels


class Counted:
    """A segmenter that counts the prompts it was asked."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.name, self.sha256 = segmenter.name, segmenter.sha256
        self.prompts = 0

    def embed(self, picture_HW3: Pixels) -> Embedding:
        """As the segmenter does."""
        return self.segmenter.embed(picture_HW3)

    def predict(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = False
    ) -> Masks:
        """As the segmenter does, counted."""
        self.prompts += len(prompts)
        return self.segmenter.predict(embedding, prompts, multimask=multimask)


class Remembering:
    """A segmenter that answers a prompt about the last picture from memory, if it can."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.name, self.sha256 = segmenter.name, segmenter.sha256
        self._picture = ""
        self._answers: dict[tuple[object, ...], Masks] = {}

    def embed(self, picture_HW3: Pixels) -> Embedding:
        """As the segmenter does; another picture is a reason to forget."""
        embedding = self.segmenter.embed(picture_HW3)
        if embedding.key != self._picture:
            self._picture, self._answers = embedding.key, {}
        return embedding

    def predict(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = False
    ) -> Masks:
        """As the segmenter does. Prompts with a mask, and proposals, are not remembered."""
        if multimask or any(prompt.mask_LL is not None for prompt in prompts) or not prompts:
            return self.segmenter.predict(embedding, prompts, multimask=multimask)
        keys = [(embedding.key, prompt.box, prompt.points, prompt.labels) for prompt in prompts]
        new = [place for place, key in enumerate(keys) if key not in self._answers]
        if new:
            answered = self.segmenter.predict(embedding, [prompts[place] for place in new])
            self._answers |= {keys[p]: answered.rows([row]) for row, p in enumerate(new)}
        return joined([self._answers[key] for key in keys])
