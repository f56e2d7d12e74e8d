"""Text, pictures and video frames in one stream of tokens.

A prompt holds one placeholder per picture. Splicing replaces it by the picture's s·s visual tokens,
each standing for D codes. Whether a picture is what the model shall learn to draw, or only
something it looks at, is said by the picture itself (`Picture.answer`), not guessed from its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest

# B rows   L tokens of a row   N visual tokens of a picture   D codes of a visual token
IMAGE_PLACEHOLDER = -200
IGNORED = -100
TEXT = -1  # in the place of codes where a token is text


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as codes (N, D), row by row of its grid; a video is one such after the other."""

    codes_ND: Tensor
    answer: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One spliced stream: token ids (0 at visual tokens), codes (`TEXT` at text), labels."""

    ids_L: Tensor
    codes_LD: Tensor
    labels_LD: Tensor

    def __len__(self) -> int:
        return len(self.ids_L)

    def part(self, start: int, end: int | None = None) -> "Row":
        """Some of its tokens."""
        return Row(**{name: column[start:end] for name, column in vars(self).items()})

    @staticmethod
    def joined(rows: "Sequence[Row]") -> "Row":
        """Rows one behind the other, as one."""
        names = ("ids_L", "codes_LD", "labels_LD")
        return Row(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded to one length, or packed (then with the number of each token's row, from 1)."""

    ids_BL: Tensor
    codes_BLD: Tensor
    labels_BLD: Tensor
    mask_BL: Tensor
    positions_BL: Tensor
    segments_BL: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def splice(
    ids: Sequence[int],
    pictures: Sequence[Picture],
    *,
    depth: int,
    vocabulary: int,
    labels: Sequence[int] | None = None,
) -> Row:
    """Replace every placeholder in ``ids`` by the picture whose turn it is.

    Args:
        ids: token ids with `IMAGE_PLACEHOLDER` where a picture goes.
        pictures: in the order of the placeholders.
        depth: D.
        vocabulary: V; the label of code c is V + c, that of a text token the token itself.
        labels: text labels in parallel with ``ids``; those of placeholders are not read. Without
            them nothing is a target, except the pictures that are answers.

    Raises:
        InvalidRequest: the numbers of pictures and placeholders differ.
    """
    count = sum(token == IMAGE_PLACEHOLDER for token in ids)
    if count != len(pictures):
        raise InvalidRequest(
            f"the text has {count} places for pictures, but {len(pictures)} pictures were given; "
            "send one picture for each place",
            field="images",
        )
    targets = [IGNORED] * len(ids) if labels is None else list(labels)
    waiting = iter(pictures)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    for index in [*(i for i, token in enumerate(ids) if token == IMAGE_PLACEHOLDER), len(ids)]:
        parts.append(_text_part(ids[start:index], targets[start:index], depth))
        if index < len(ids):
            parts.append(_picture_part(next(waiting), vocabulary))
        start = index + 1
    ids_L, codes_LD, labels_LD = (torch.cat(column) for column in zip(*parts, strict=True))
    return Row(ids_L=ids_L, codes_LD=codes_LD, labels_LD=labels_LD)


def pad_rows(rows: Sequence[Row], *, left: bool = False) -> Batch:
    """Rows of one length each, filled up on the right (or left); positions count real tokens."""
    length = max(len(row) for row in rows)
    spare = [length - len(row) for row in rows]
    pads = [(extra, 0) if left else (0, extra) for extra in spare]
    mask_BL = torch.stack(
        [
            _padded(torch.ones(len(r), dtype=torch.bool), p, 0)
            for r, p in zip(rows, pads, strict=True)
        ]
    )
    return Batch(
        ids_BL=torch.stack([_padded(r.ids_L, p, 0) for r, p in zip(rows, pads, strict=True)]),
        codes_BLD=torch.stack(
            [_padded(r.codes_LD, p, TEXT) for r, p in zip(rows, pads, strict=True)]
        ),
        labels_BLD=torch.stack(
            [_padded(r.labels_LD, p, IGNORED) for r, p in zip(rows, pads, strict=True)]
        ),
        mask_BL=mask_BL,
        positions_BL=(mask_BL.long().cumsum(dim=1) - 1).clamp(min=0),
    )


def _text_part(
    ids: Sequence[int], labels: Sequence[int], depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    ids_L = torch.tensor(list(ids), dtype=torch.int64)
    labels_L = torch.tensor(list(labels), dtype=torch.int64)
    codes_LD = torch.full((len(ids), depth), TEXT, dtype=torch.int64)
    return ids_L, codes_LD, labels_L[:, None].expand(-1, depth)


def _picture_part(picture: Picture, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    codes_ND = picture.codes_ND.long()
    labels_ND = codes_ND + vocabulary if picture.answer else torch.full_like(codes_ND, IGNORED)
    return torch.zeros(len(codes_ND), dtype=torch.int64), codes_ND, labels_ND


def _padded(x: Tensor, pad: tuple[int, int], value: int) -> Tensor:
    """Extend dim 0."""
    widths = (0, 0) * (x.ndim - 1) + pad
    return torch.nn.functional.pad(x, widths, value=value)
