"""Text states of all training captions, computed once.

Captions have different lengths, so their tokens lie one after the other in one tensor.
Axes: T tokens of all captions, N captions, B batch, L tokens of a padded caption, S state channels.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gesso_core.text.states import TextEncoder

CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class CaptionStates:
    """Ragged text states; the last caption is the empty one."""

    tokens_TS: Tensor  # float16
    offsets_N: Tensor  # first token of each caption, and the end

    def __len__(self) -> int:
        return len(self.offsets_N) - 1

    @property
    def empty(self) -> int:
        """Index of the empty caption."""
        return len(self) - 1

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std per channel over all tokens."""
        sample = self.tokens_TS[:: max(1, len(self.tokens_TS) // 200_000)].float()
        return sample.mean(dim=0), sample.std(dim=0)

    def batch(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Padded states (B, L, S) float16 and their mask (B, L)."""
        starts, ends = self.offsets_N[index_B], self.offsets_N[index_B + 1]
        lengths = ends - starts
        positions_L = torch.arange(int(lengths.max()))
        mask_BL = positions_L < lengths[:, None]
        rows_BL = (starts[:, None] + positions_L).clamp(max=len(self.tokens_TS) - 1)
        return self.tokens_TS[rows_BL] * mask_BL[..., None], mask_BL

    def pooled(self, index_B: Tensor) -> Tensor:
        """Mean state of each caption, (B, S) float32."""
        states, mask_BL = self.batch(index_B)
        return states.float().sum(dim=1) / mask_BL.sum(dim=1, keepdim=True)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": self.tokens_TS, "offsets": self.offsets_N}, path)

    @classmethod
    def load(cls, path: Path) -> "CaptionStates":
        """Read what ``save`` wrote."""
        tensors = load_file(path)
        return cls(tokens_TS=tensors["tokens"], offsets_N=tensors["offsets"])


@torch.no_grad()
def encode_captions(encoder: TextEncoder, captions: Sequence[str]) -> CaptionStates:
    """Encode ``captions`` and the empty caption in bf16, those of similar length together."""
    texts = [*captions, ""]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    pieces: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        with torch.autocast("cpu", torch.bfloat16):
            states = encoder.encode([texts[i] for i in chunk])
        for row, i in enumerate(chunk):
            length = int(states.mask_BL[row].sum())
            pieces[i] = states.states_BLC[row, :length].half()
        if start // CHUNK % 100 == 0:
            print(f"captions {start}/{len(order)}", file=sys.stderr, flush=True)
    lengths = torch.tensor([0, *(len(piece) for piece in pieces)])
    return CaptionStates(tokens_TS=torch.cat(pieces), offsets_N=lengths.cumsum(0))
