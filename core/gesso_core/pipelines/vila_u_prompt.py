"""From what a person says and shows to filled rows of the language model.

Every prompt begins like every other one: with the template's first words. Their keys and values are
computed once per model and copied into each row, and so are those of the unconditional prompt.
Prompts of any lengths are fed together, and so are pictures to the tower; none changes another's.
"""

# N visual tokens of a picture   D codes of a visual token   S width of the states
# t tokens that are fed to a row   P side of a picture as the tower sees it

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest
from gesso_core.models.vila_u.config import SPECIAL_TOKENS
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.rows import spare_rows
from gesso_core.models.vila_u.splice import Picture, Row, splice
from gesso_core.models.vila_u.template import (
    PLACEHOLDER,
    Template,
    Turn,
    conversation_text,
    head_text,
    picture_prompt,
    tokenize,
)
from gesso_core.models.vila_u.vision_tower import preprocess
from gesso_core.pipelines.pictures import Pixels, stretched
from gesso_core.pipelines.vila_u_draft import Part, Prompt, Stream, Utterance, Video

# What shares one forward; a longer prompt goes alone.
PICTURES_TOGETHER: Final = 32
TOKENS_TOGETHER: Final = 4096


class Unfed(NamedTuple):
    """A row of the language model, and what is still to be fed to it."""

    begun: Stream
    rest: Row


class Prompter:
    """Builds prompts of one model and feeds them to its language model."""

    def __init__(self, model: VilaU, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.template = model.config.template
        self._reserved = _reserved_words(tokenizer)
        self._lock = threading.Lock()
        self._head: tuple[list[int], Stream] | None = None
        self._unconditional: dict[bool, Stream] = {}

    def picture_ids(self, prompt: str, *, video: bool = False) -> list[int]:
        """Token ids of a request for a picture, which end with the start marker."""
        text = conversation_text(self.template, picture_prompt(prompt))
        return tokenize(self.tokenizer, f"{text} {'<vi_start>' if video else '<im_start>'}")

    def prompt(self, utterances: Sequence[Utterance]) -> Prompt:
        """A conversation, ready to be fed; nothing has been through the model. See `read`."""
        ids, pictures = self.read(utterances)
        return Prompt(tuple(ids), tuple(self.signal(picture) for picture in pictures))

    def conversation(self, utterances: Sequence[Utterance]) -> Row:
        """A conversation with its pictures as one row that asks for the next answer; see `read`."""
        (row,) = self.rows([self.prompt(utterances)])
        return row

    def rows(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Conversations with their pictures as codes; all pictures are encoded together."""
        coded = iter(self.codes([signal for prompt in prompts for signal in prompt.signals]))
        return [self.row(prompt.ids, [next(coded) for _ in prompt.signals]) for prompt in prompts]

    def read(self, utterances: Sequence[Utterance]) -> tuple[list[int], list[Pixels]]:
        """Token ids of a conversation with places for its pictures, and the pictures.

        Raises:
            InvalidRequest: turns that do not alternate, a text with reserved words, a picture that
                is none, a video for a model that sees none, a conversation over the context.
        """
        template, turns, pictures = self.template, [], list[Pixels]()
        for number, utterance in enumerate(utterances):
            text, shown = self._said(utterance.parts)
            if utterance.role == "system":
                template = self._with_system(template, text, number, shown)
                continue
            turns.append(Turn(role=utterance.role, text=text))
            pictures += shown
        if not turns or turns[-1].role != "user":
            raise InvalidRequest(
                "the conversation does not end with a message of the user; send one to answer",
                field="messages",
            )
        return tokenize(self.tokenizer, conversation_text(template, turns)), pictures

    def row(self, ids: Sequence[int], pictures: Sequence[Picture]) -> Row:
        """Ids with placeholders and their pictures, spliced."""
        depth, vocabulary = self.config.depth.depth, self.config.vocabulary
        return splice(ids, pictures, depth=depth, vocabulary=vocabulary)

    def fitted(self, pixels_HWC: Pixels) -> Pixels:
        """A picture as the tower looks at it; those who keep many of them keep these."""
        side = self.config.tower.image_size
        return stretched(pixels_HWC, side, side)

    def encode(self, pictures: Sequence[Pixels]) -> list[Picture]:
        """Codes of pictures of any size."""
        return self.codes([self.signal(picture) for picture in pictures])

    def signal(self, pixels_HWC: Pixels) -> Tensor:
        """A picture of any size as numbers for the tower, (3, P, P) on the CPU."""
        return preprocess(pixels_HWC, self.config.tower.image_size)

    def codes(self, signals_3PP: Sequence[Tensor]) -> list[Picture]:
        """Codes of pictures, encoded together where that changes none of them."""
        tower, device = self.model.tower, self.model.device
        dtype = next(tower.parameters()).dtype
        together = PICTURES_TOGETHER
        cells = (
            math.prod(shape[:2])
            for shape in (self.config.tower.latent_shape, tower.config.code_shape)
        )
        if device.type == "cpu" and any(spare_rows(count) for count in cells):
            together = 1
        coded: list[Picture] = []
        for start in range(0, len(signals_3PP), together):
            signals_B3PP = torch.stack(list(signals_3PP[start : start + together]))
            codes_BhwD = tower.encode(signals_B3PP.to(device, dtype)).codes_BhwD.cpu()
            coded += [Picture(codes_ND=codes_ND) for codes_ND in codes_BhwD.flatten(1, 2)]
        return coded

    def check_words(self, text: str, field: str) -> None:
        """Refuse texts with words that mean something else to the model."""
        found = [word for word in self._reserved if word in text]
        if found:
            raise InvalidRequest(
                f"the text holds {found[0]!r}, which is a mark of the model; leave it out",
                field=field,
            )

    def check_length(self, tokens: int, more: int, field: str) -> None:
        """Refuse what does not fit into the context together with what shall be drawn."""
        if tokens + more > self.config.context:
            raise InvalidRequest(
                f"the prompt has {tokens} tokens and {more} are to be drawn; the model takes "
                f"{self.config.context} together, so at most {self.config.context - more} in the "
                "prompt: shorten it, or show fewer pictures",
                field=field,
            )

    def begun(self, row: Row, more: int) -> Unfed:
        """What there is of a prompt's row before it is fed, with room for ``more`` behind it."""
        _, head = self._head_stream()
        shared = self._shared_with_head(row)
        cache = self.model.rows.new_cache(len(row) + more, head.state_S, head.cache, shared)
        return Unfed(Stream(cache, shared, head.state_S), row.part(shared))

    def unconditional(self, more: int, *, video: bool = False) -> Stream:
        """The prompt that asks for any picture, copied from the first time it was fed."""
        with self._lock:
            kept = self._unconditional.get(video)
        if kept is None:
            row = self.row(self.picture_ids("", video=video), [])
            (kept,) = self.fill([self.begun(row, 0)])
            with self._lock:
                self._unconditional[video] = kept
        cache = self.model.rows.new_cache(kept.length + more, kept.state_S, kept.cache, kept.length)
        return Stream(cache, kept.length, kept.state_S)

    def fill(self, rows: Sequence[Unfed]) -> list[Stream]:
        """Feed to every row what is left for it; a row with nothing left stays as it is."""
        hungry = [row for row in rows if len(row.rest)]
        states = iter(self.feed(hungry))
        return [
            Stream(begun.cache, begun.length + len(rest), next(states)[-1].clone())
            if len(rest)
            else begun
            for begun, rest in rows
        ]

    def feed(self, rows: Sequence[Unfed]) -> list[Tensor]:
        """Feed rows together, as many at once as memory is likely to bear.

        Returns (t, S) for each: the states of the tokens that were fed.
        """
        states: list[Tensor] = []
        for portion in _portions(rows):
            counts = [len(row.rest) for row in portion]
            states_NS = self.model.rows.together(
                self.model.embed_row(Row.joined([row.rest for row in portion])),
                [row.begun.cache for row in portion],
                [row.begun.length for row in portion],
                counts,
            )
            states += states_NS.split_with_sizes(counts)
        return states

    def _head_stream(self) -> tuple[list[int], Stream]:
        with self._lock:
            if self._head is None:
                ids = tokenize(self.tokenizer, head_text(self.template))
                embeddings = self.model.embed_text(torch.tensor([ids], device=self.model.device))
                cache = self.model.rows.new_cache(len(ids), embeddings)
                states = self.model.rows(embeddings, [cache], [0])
                self._head = ids, Stream(cache, len(ids), states[0, -1])
            return self._head

    def _shared_with_head(self, row: Row) -> int:
        """How many tokens a prompt has in common with every other one; one is left to be fed."""
        ids, _ = self._head_stream()
        most = min(len(ids), len(row) - 1)
        same = (row.ids_L[:most] == torch.tensor(ids[:most])) & (row.codes_LD[:most, 0] < 0)
        return most if bool(same.all()) else int(same.long().argmin())

    def _said(self, parts: Sequence[Part]) -> tuple[str, list[Pixels]]:
        """The text of one utterance, every picture on a line of its own, and the pictures."""
        pieces: list[str] = []
        pictures: list[Pixels] = []
        for part in parts:
            if isinstance(part, str):
                self.check_words(part, "messages")
                pieces.append(part.strip())
                continue
            frames = self._frames(part) if isinstance(part, Video) else [part]
            pieces += [PLACEHOLDER] * len(frames)
            pictures += frames
        return "\n".join(piece for piece in pieces if piece), pictures

    def _frames(self, video: Video) -> list[Pixels]:
        """As many frames as the model looks at, evenly spread over the video."""
        wanted = self.config.video_frames
        if not wanted:
            raise InvalidRequest("this model sees no videos; send pictures", field="video")
        frames_FHW3 = video.frames_FHW3
        if frames_FHW3.ndim != 4 or not len(frames_FHW3):
            raise InvalidRequest(
                f"a video of shape {frames_FHW3.shape}; send (frames, height, width, 3)",
                field="video",
            )
        chosen = np.linspace(0, len(frames_FHW3) - 1, wanted).round().astype(int)
        return [frames_FHW3[index] for index in chosen]

    def _with_system(
        self, template: Template, text: str, number: int, shown: Sequence[Pixels]
    ) -> Template:
        if number or shown:
            raise InvalidRequest(
                "a system message comes first, once, and holds text only", field="messages"
            )
        return replace(template, system=text, system_sha256=None)


def _portions(rows: Sequence[Unfed]) -> Iterator[list[Unfed]]:
    """Rows in their order, at most so many tokens at a time unless one row alone has more."""
    portion: list[Unfed] = []
    for row in rows:
        if portion and sum(len(one.rest) for one in (*portion, row)) > TOKENS_TOGETHER:
            yield portion
            portion = []
        portion.append(row)
    if portion:
        yield portion


def _reserved_words(tokenizer: Any) -> tuple[str, ...]:
    return (PLACEHOLDER, *SPECIAL_TOKENS, *(str(token) for token in tokenizer.all_special_tokens))
