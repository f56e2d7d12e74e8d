"""Does a small model know what a prompt is about? A look at the nearest concept names.

A denoiser trained on a closed set of concepts may keep ``concepts.safetensors`` and
``concepts.json`` beside its weights: the text states of its concept names, pooled, and the cosine
that 95 % of its training captions reach. A prompt is in the domain when some stretch of it, up to
six tokens, comes as close to a name.

The states are taken behind a leading "a", whose own state is left out: a causal encoder's first
token is nearly the same for every text, and would make all of them look alike.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.safe_files import read_json, read_tensors
from gesso_core.text.states import TextEncoder, TextStates

# N names   L tokens   C channels   W windows

TENSORS_FILE: Final = "concepts.safetensors"
NAMES_FILE: Final = "concepts.json"
LEAD: Final = "a "
LONGEST_WINDOW: Final = 6
PASSING_SHARE: Final = 0.95
SUGGESTIONS: Final = 3
SAME_ENCODER: Final = 0.98


@dataclass(frozen=True)
class Verdict:
    """``in_domain`` is None where nothing is known; ``suggestions`` are names, nearest first."""

    in_domain: bool | None
    suggestions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """The concepts a denoiser was trained on, and the encoder that the names went through."""

    encoder: TextEncoder
    names: Sequence[str]
    directions_NC: Tensor
    mean_C: Tensor
    std_C: Tensor
    threshold: float

    @classmethod
    def from_folder(cls, folder: Path, encoder: TextEncoder) -> "Domain | None":
        """The domain beside a denoiser's weights, None where it keeps none.

        Raises:
            WeightsError: damaged files, or states that another encoder made.
        """
        if not (folder / TENSORS_FILE).exists():
            return None
        names = read_json(folder / NAMES_FILE).get("names")
        tensors = read_tensors(folder / TENSORS_FILE)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        count, width = len(names) if isinstance(names, list) else 0, encoder.width
        expected = {"directions": (count, width), "mean": (width,), "std": (width,)}
        if not isinstance(names, list) or shapes != {**expected, "threshold": ()}:
            raise WeightsError(
                f"the concepts in {folder} have shapes {shapes} for {count} names, expected "
                f"{expected}; train or download the model again"
            )
        directions_NC, mean_C, std_C = (tensors[k].float() for k in ("directions", "mean", "std"))
        threshold = float(tensors["threshold"])
        domain = cls(encoder, names, directions_NC, mean_C, std_C, threshold)
        domain._require_same_encoder(folder)
        return domain

    def judge(self, prompts: Sequence[str]) -> list[Verdict]:
        """One verdict per prompt; suggestions for those outside."""
        return [self._verdict(cosines_N) for cosines_N in self.cosines(prompts)]

    def cosines(self, prompts: Sequence[str]) -> list[Tensor]:
        """Per prompt the cosine to every name, (N,): that of the closest stretch of the prompt."""
        result = []
        for tokens_LC in _content_states(self.encoder, prompts):
            windows_WC = _windows((tokens_LC - self.mean_C) / self.std_C)
            cosines_WN = F.normalize(windows_WC, dim=-1) @ self.directions_NC.T
            result.append(cosines_WN.amax(0))
        return result

    def _verdict(self, cosines_N: Tensor) -> Verdict:
        best = cosines_N.topk(min(SUGGESTIONS, len(self.names)))
        if float(best.values[0]) >= self.threshold:
            return Verdict(True)
        return Verdict(False, tuple(self.names[index] for index in best.indices.tolist()))

    def _require_same_encoder(self, folder: Path) -> None:
        if float(self.cosines(self.names[:1])[0][0]) < SAME_ENCODER:
            raise WeightsError(
                f"the concepts in {folder} were made with another text encoder or other text "
                "statistics; use the encoder that the model names"
            )


def build_domain(
    encoder: TextEncoder, names: Sequence[str], captions: Sequence[str], folder: Path
) -> Domain:
    """Write the two files for ``names``, with the threshold that 95 % of ``captions`` pass."""
    tokens = _content_states(encoder, names)
    every_token = torch.cat(tokens)
    mean_C, std_C = every_token.mean(0), every_token.std(0)
    pooled_NC = torch.stack([((t - mean_C) / std_C).mean(0) for t in tokens])
    # Half precision before the threshold is measured, as it will be loaded.
    directions_NC = F.normalize(pooled_NC, dim=-1).half().float()
    domain = Domain(encoder, names, directions_NC, mean_C, std_C, threshold=0.0)
    best = torch.stack([cosines_N.max() for cosines_N in domain.cosines(captions)])
    threshold = torch.quantile(best, 1 - PASSING_SHARE)
    tensors = {"directions": directions_NC.half(), "mean": mean_C, "std": std_C}
    save_file({**tensors, "threshold": threshold}, folder / TENSORS_FILE)
    (folder / NAMES_FILE).write_text(json.dumps({"names": list(names)}, ensure_ascii=False) + "\n")
    return Domain(encoder, names, directions_NC, mean_C, std_C, float(threshold))


def _content_states(encoder: TextEncoder, texts: Sequence[str]) -> list[Tensor]:
    """Per text the states of its tokens behind the leading word, (L, C), at least one row."""
    result: list[Tensor] = []
    for start in range(0, len(texts), 64):
        states: TextStates = encoder.encode([LEAD + text for text in texts[start : start + 64]])
        for states_LC, mask_L in zip(states.states_BLC.float(), states.mask_BL, strict=True):
            content_LC = states_LC[mask_L][1:]
            result.append(content_LC if len(content_LC) else states_LC[:1])
    return result


def _windows(tokens_LC: Tensor) -> Tensor:
    """Means over all stretches of 1 to 6 neighboring tokens, (W, C)."""
    sizes = range(1, min(LONGEST_WINDOW, len(tokens_LC)) + 1)
    return torch.cat([tokens_LC.unfold(0, size, 1).mean(-1) for size in sizes])
