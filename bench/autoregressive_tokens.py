"""Time per text token: our answers against ``generate`` of transformers, with one language model.

Both take the likeliest token every time, from the same prompt, the same number of tokens, and must
say the same. The peer is the model's ``llm`` folder as transformers loads it; nothing of this
project is in it. Marks that end an answer are switched off on both sides.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cpu_timing import Row, Times, in_turn
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.pipelines.vila_u_draft import AnswerDraft, AnswerOptions, Utterance
from transformers import AutoModelForCausalLM

TARGET = 1.1
QUESTION = "which background colors can you draw? which styles do you know?"
TOKENS, SMOKE_TOKENS = 64, 6


def text_tokens(pipeline: VilaUPipeline, folder: Path, *, smoke: bool) -> Iterator[Row]:
    """One answer, and eight at a time."""
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, repeats = (SMOKE_TOKENS, 1) if smoke else (TOKENS, 15)
    pipeline.chat.ends = frozenset()
    for batch in (1, 8):
        ours = _ours(pipeline, batch, tokens)
        theirs = _theirs(pipeline, peer, batch, tokens)
        same = ours() == theirs()
        times = in_turn({"transformers": theirs, "ours": ours}, repeats)
        yield _row(times, batch, tokens, same)


def _ours(pipeline: VilaUPipeline, batch: int, tokens: int) -> Callable[[], list[list[int]]]:
    asked = [Utterance(role="user", parts=(QUESTION,))]
    options = AnswerOptions(max_tokens=tokens)

    def run() -> list[list[int]]:
        drafts: list[AnswerDraft] = [pipeline.begin_answer(asked, options) for _ in range(batch)]
        while not drafts[0].done:
            drafts = pipeline.advance_answers(drafts)
        return [list(draft.ids) for draft in drafts]

    return run


def _theirs(
    pipeline: VilaUPipeline, peer: Any, batch: int, tokens: int
) -> Callable[[], list[list[int]]]:
    ids, _ = pipeline.prompter.read([Utterance(role="user", parts=(QUESTION,))])
    embeddings_BLS = pipeline.model.embed_text(torch.tensor([ids] * batch)).detach()
    mask_BL = torch.ones(embeddings_BLS.shape[:2], dtype=torch.long)
    settings = peer.generation_config
    settings.eos_token_id = None
    settings.pad_token_id = 0

    def run() -> list[list[int]]:
        with torch.inference_mode():
            said = peer.generate(
                inputs_embeds=embeddings_BLS,
                attention_mask=mask_BL,
                max_new_tokens=tokens,
                do_sample=False,
            )
        return [list(row) for row in said.tolist()]

    return run


def _row(times: dict[str, Times], batch: int, tokens: int, same: bool) -> Row:
    count = batch * tokens
    ratio = times["ours"].cpu_ms / times["transformers"].cpu_ms
    return {
        "what": "text tokens, prompt included",
        "batch": batch,
        "new_tokens": tokens,
        "same_tokens": same,
        **{f"{name}_cpu_ms_per_token": round(t.cpu_ms / count, 4) for name, t in times.items()},
        **{f"{name}_wall_ms_per_token": round(t.wall_ms / count, 4) for name, t in times.items()},
        "ratio": round(ratio, 3),
        "target": TARGET,
        "met": ratio <= TARGET,
    }
