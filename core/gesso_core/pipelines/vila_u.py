"""VILA-U as a pipeline: draws pictures and videos row by row, answers, and judges.

Drafts go in and drafts one step further come out; nothing of them is kept in here. Pictures with
prompts of different lengths, at different rows, with different seeds, guidance and filters share
every forward, and each gets the same codes as it would alone.
"""

# B drafts   R rows of the language model   T visual tokens   D codes of each   K codes in the table
# C channels of the features   h, w grid of a picture

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest
from gesso_core.models.vila_u.code_sampling import inverse_cdf, probabilities, uniforms
from gesso_core.models.vila_u.drawing import Rows, draw_codes, next_states
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.splice import IMAGE_PLACEHOLDER, Picture, Row
from gesso_core.models.vila_u.template import PLACEHOLDER
from gesso_core.pipelines.denoiser import Identity
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.vila_u_chat import Chat
from gesso_core.pipelines.vila_u_draft import (
    AnswerDraft,
    AnswerOptions,
    DrawDraft,
    DrawRecipe,
    Stream,
    Utterance,
    all_finite,
)
from gesso_core.pipelines.vila_u_judge import Judge
from gesso_core.pipelines.vila_u_prompt import Prompter, Unfed
from gesso_core.pipelines.vila_u_recipe import draw_recipe
from gesso_core.registry import ModelEntry
from gesso_core.text.domain import Domain

NOT_DRAWN = -1


class VilaUPipeline:
    """One model for pictures and words."""

    def __init__(
        self,
        *,
        entry: ModelEntry,
        model: VilaU,
        tokenizer: Any,
        identity: Identity,
        domain: Domain | None = None,
    ) -> None:
        self.entry, self.model, self.identity, self.domain = entry, model, identity, domain
        self.prompter = Prompter(model, tokenizer)
        self.chat = Chat(model, tokenizer, self.prompter)
        self.judging = Judge(model, tokenizer, self.prompter)

    @property
    def autoencoder(self) -> str:
        """The name of the autoencoder that decodes the features: this model's own tower."""
        return self.entry.autoencoder or self.entry.name

    def recipe(self, request: GenerationRequest) -> DrawRecipe:
        """Every choice of a request made; InvalidRequest names the field that cannot be."""
        return draw_recipe(request, self.entry, self.model.config)

    def video_recipe(self, request: GenerationRequest) -> DrawRecipe:
        """The same for a short video of as many frames as the model was made for."""
        return draw_recipe(request, self.entry, self.model.config, video=True)

    @torch.inference_mode()
    def begin(self, recipe: DrawRecipe, image: Pixels | None = None) -> DrawDraft:
        """Read the prompt, and draw all random numbers; the first step feeds the prompt.

        Args:
            recipe: with ``keep``, the first rows of ``image`` are taken over and the rest is drawn.
                Without, the picture is part of the prompt: where it says ``<image>``, or before it.
            image: a picture of any size, or none.
        """
        row, kept_ND = self._prompt(recipe, image)
        positions = self.model.config.tokens * recipe.frames
        self.prompter.check_length(len(row), positions, "prompt")
        depth = self.model.config.depth.depth
        codes_TD = torch.full((positions, depth), NOT_DRAWN)
        codes_TD[: len(kept_ND)] = kept_ND
        return DrawDraft(
            recipe=recipe,
            prompt=row,
            codes_TD=codes_TD,
            uniforms_TD=uniforms(recipe.seed, positions, depth),
            rows_done=recipe.keep or 0,
        )

    @torch.inference_mode()
    def advance(self, drafts: Sequence[DrawDraft]) -> list[DrawDraft]:
        """One row of the grid of every draft.

        Where prompts are still to be fed, a step feeds them all, and the others wait for it: so
        those that came one after another draw together.
        """
        unfed = [b for b, draft in enumerate(drafts) if not draft.streams]
        if not unfed:
            return self._draw(drafts)
        fed = dict(zip(unfed, self._feed([drafts[b] for b in unfed]), strict=True))
        return [fed.get(b, draft) for b, draft in enumerate(drafts)]

    def _feed(self, drafts: Sequence[DrawDraft]) -> list[DrawDraft]:
        """The prompts of all drafts, and the rows that they keep of a given picture."""
        rows = [self._unfed(draft) for draft in drafts]
        streams = iter(self.prompter.fill([row for pair in rows for row in pair]))
        fed = [tuple(next(streams) for _ in pair) for pair in rows]
        return [
            replace(draft, streams=pair, finite=all_finite([stream.state_S for stream in pair]))
            for draft, pair in zip(drafts, fed, strict=True)
        ]

    def _unfed(self, draft: DrawDraft) -> list[Unfed]:
        """The conditional row and, under guidance, the unconditional one."""
        recipe, positions = draft.recipe, len(draft.codes_TD)
        kept = Picture(codes_ND=draft.codes_TD[: draft.rows_done * self.model.config.tower.grid[1]])
        keeps = self.prompter.row([IMAGE_PLACEHOLDER], [kept])
        begun, rest = self.prompter.begun(draft.prompt, positions)
        rows = [Unfed(begun, Row.joined([rest, keeps]))]
        if recipe.guided:
            rows.append(Unfed(self.prompter.unconditional(positions, video=recipe.video), keeps))
        return rows

    def _draw(self, drafts: Sequence[DrawDraft]) -> list[DrawDraft]:
        width = self.model.config.tower.grid[1]
        rows = Rows.of([draft.recipe.guided for draft in drafts], self.model.device)
        streams = [draft.streams[0] for draft in drafts]
        streams += [draft.streams[1] for draft in drafts if draft.recipe.guided]
        caches = [stream.cache for stream in streams]
        states_RS = torch.stack([stream.state_S for stream in streams])
        choose = _Draws(drafts, width, self.model.device)
        tables = self.model.tower.quantizer.tables
        drawn: list[Tensor] = []
        for column in range(width):
            codes_BD = draw_codes(
                self.model.depth_transformer, tables, states_RS, rows, choose.scales_B, choose
            )
            choose.column += 1
            drawn.append(codes_BD)
            lengths = [stream.length + column for stream in streams]
            states_RS = next_states(self.model, codes_BD, rows, caches, lengths)
        codes_BwD = torch.stack(drawn, dim=1).cpu()
        finite_R = states_RS.isfinite().all(dim=1)
        finite_B = finite_R[rows.conditional] & finite_R[rows.unconditional] & choose.finite_B
        finite: list[bool] = finite_B.tolist()
        moved = [
            Stream(stream.cache, stream.length + width, state_S)
            for stream, state_S in zip(streams, states_RS, strict=True)
        ]
        return [
            _drawn(draft, codes_BwD[b], [moved[r] for r in dict.fromkeys(rows.pairs[b])], finite[b])
            for b, draft in enumerate(drafts)
        ]

    def latent(self, draft: DrawDraft) -> Tensor:
        """Features (C, h, w) of the newest frame, zero where nothing is drawn yet."""
        height = self.model.config.tower.grid[0]
        return self.frames(draft)[max(0, draft.rows_done - 1) // height]

    @torch.inference_mode()
    def frames(self, draft: DrawDraft) -> list[Tensor]:
        """Features (C, h, w) of every frame, for the tower's decoder."""
        grid, codes_TD = self.model.config.tower.grid, draft.codes_TD.to(self.model.device)
        features_TC = self.model.tower.embed(codes_TD.clamp(min=0))
        features_TC = features_TC * (codes_TD[:, :1] != NOT_DRAWN)
        frames_FhwC = features_TC.reshape(draft.recipe.frames, *grid, -1).float()
        return list(frames_FhwC.permute(0, 3, 1, 2))

    def begin_answer(
        self, conversation: Sequence[Utterance], options: AnswerOptions | None = None
    ) -> AnswerDraft:
        """See `Chat.begin`."""
        return self.chat.begin(conversation, options or AnswerOptions())

    def advance_answers(self, drafts: Sequence[AnswerDraft]) -> list[AnswerDraft]:
        """See `Chat.advance`."""
        return self.chat.advance(drafts)

    def judge(self, pictures: Sequence[Pixels], prompt: str) -> list[float]:
        """See `Judge`."""
        return self.judging(pictures, prompt)

    def kv_bytes(self, draft: DrawDraft | AnswerDraft) -> int:
        """Memory of a draft's keys and values, from when its prompt is fed to its end."""
        streams = draft.streams if isinstance(draft, DrawDraft) else (draft.stream,)
        return sum(stream.cache.bytes for stream in streams if stream is not None)

    def kv_bytes_needed(
        self, prompt_tokens: int, drawn_tokens: int, *, guided: bool = False
    ) -> int:
        """The same before it begins: from the length of the prompt and what is to be drawn."""
        tokens = prompt_tokens + drawn_tokens
        if guided:
            tokens += len(self.prompter.picture_ids("")) + drawn_tokens
        return tokens * self.model.rows.bytes_per_token(self.model.dtype)

    def _prompt(self, recipe: DrawRecipe, image: Pixels | None) -> tuple[Row, Tensor]:
        """The conditional prompt, and the codes (N, D) that are taken over from the picture."""
        pictures = self.prompter.encode([] if image is None else [image])
        nothing_ND = torch.empty(0, self.model.config.depth.depth, dtype=torch.int64)
        _check_places(recipe, len(pictures))
        text = recipe.prompt.replace(PLACEHOLDER, "")
        self.prompter.check_words(text, "prompt")
        if recipe.keep is not None:
            if not pictures:
                raise InvalidRequest(
                    f"keep {recipe.keep} rows of which picture? Send one along, or leave keep out",
                    field="image",
                )
            kept_ND = pictures[0].codes_ND[: recipe.keep * self.model.config.tower.grid[1]]
            return self.prompter.row(self.prompter.picture_ids(recipe.prompt), []), kept_ND
        prompt = recipe.prompt
        if pictures and PLACEHOLDER not in prompt:
            prompt = f"{PLACEHOLDER}\n{prompt}"
        ids = self.prompter.picture_ids(prompt, video=recipe.video)
        return self.prompter.row(ids, pictures), nothing_ND


def _check_places(recipe: DrawRecipe, pictures: int) -> None:
    """``<image>`` in a prompt stands for a picture that is looked at, not for one that is kept."""
    places, shown = recipe.prompt.count(PLACEHOLDER), 0 if recipe.keep is not None else pictures
    if places > shown:
        raise InvalidRequest(
            f"the prompt has {places} {PLACEHOLDER}, but {shown} pictures are given to look at; "
            f"leave {PLACEHOLDER} out, or send the picture that it stands for, with keep 0",
            field="prompt",
        )


class _Draws:
    """Chooses codes for one row of the grid: every draft with its own numbers and filters."""

    def __init__(self, drafts: Sequence[DrawDraft], width: int, device: torch.device) -> None:
        recipes = [draft.recipe for draft in drafts]
        self.scales_B = torch.tensor([r.guidance_scale for r in recipes], device=device)
        self.top_k_B = torch.tensor([r.top_k for r in recipes], device=device)
        self.top_p_B = torch.tensor([r.top_p for r in recipes], device=device)
        starts = [draft.rows_done * width for draft in drafts]
        uniforms_BwD = torch.stack(
            [d.uniforms_TD[t : t + width] for d, t in zip(drafts, starts, strict=True)]
        )
        self.uniforms_BwD = uniforms_BwD.to(device)
        self.column = 0
        self.finite_B = torch.ones(len(drafts), dtype=torch.bool, device=device)

    def __call__(self, logits_BK: Tensor, depth: int) -> Tensor:
        """(B, K) → (B,)."""
        probabilities_BK = probabilities(logits_BK, self.top_k_B, self.top_p_B)
        # One logit that is not finite leaves no probability that is.
        self.finite_B &= probabilities_BK[:, 0].isfinite()
        return inverse_cdf(probabilities_BK, self.uniforms_BwD[:, self.column, depth])


def _drawn(
    draft: DrawDraft, codes_wD: Tensor, streams: Sequence[Stream], finite: bool
) -> DrawDraft:
    codes_TD = draft.codes_TD.clone()
    start = draft.rows_done * len(codes_wD)
    codes_TD[start : start + len(codes_wD)] = codes_wD
    return replace(
        draft,
        codes_TD=codes_TD,
        streams=tuple(streams),
        rows_done=draft.rows_done + 1,
        finite=finite,
    )
