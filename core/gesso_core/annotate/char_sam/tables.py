"""What was measured, as text for people and as JSON for machines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gesso_core.annotate.char_sam.measure import (
    BOX_SOURCES,
    CHARACTER,
    COLOUR,
    GLYPH,
    METHODS,
    THRESHOLD,
    WORD,
    Measured,
    Method,
)

WORST = 5  # words named per set
GAINS: tuple[tuple[str, Method, Method], ...] = (
    ("word box to character box", WORD, CHARACTER),
    ("character box to glyph", CHARACTER, GLYPH),
    ("word box to glyph", WORD, GLYPH),
    ("glyph to stroke colour", GLYPH, COLOUR),
    ("colour threshold to stroke colour", THRESHOLD, COLOUR),
)


@dataclass(frozen=True)
class Check:
    """A promise, what was measured, and whether it is kept.

    Some rows are only told: their bounds were set for other scenes, and nothing follows from them.
    """

    promise: str
    measured: str
    kept: bool
    told_only: bool = False

    @property
    def verdict(self) -> str:
        """A word for the reader."""
        if self.told_only:
            return "reached" if self.kept else "below"
        return "kept" if self.kept else "BROKEN"


def report(measured: Sequence[Measured], checks: Sequence[Check], segmenter: str) -> str:
    """The tables as text."""
    lines = [f"segmenter {segmenter}, one crop per word unless the row says otherwise", ""]
    for number, group in enumerate(measured, start=1):
        lines.append(f"[{number}] {group.name}: {group.words} words, {group.characters} characters")
    heads = "".join(f"{f'[{number}]':>9}" for number in range(1, len(measured) + 1))
    lines += ["", f"{'foreground IoU':34} {'boxes':8}{heads}"]
    for method in METHODS:
        cells = [
            _cell(group.overlaps[method].iou if method in group.overlaps else None)
            for group in measured
        ]
        if any(cell.strip() != "-" for cell in cells):
            lines.append(f"{method.title:34} {method.boxes:8}{''.join(cells)}")
    lines += ["", *_gain_table(measured, heads), "", *_box_table(measured), ""]
    lines += [f"{check.verdict:7} {check.promise}: {check.measured}" for check in checks]
    for group in measured:
        if group.box_ious:
            lines += ["", f"{group.name}, the worst words:", *_worst(group)]
    return "\n".join(lines)


def as_json(
    measured: Sequence[Measured], checks: Sequence[Check], segmenter: str
) -> dict[str, Any]:
    """The same numbers for machines."""
    return {
        "segmenter": segmenter,
        "groups": [
            {
                "name": group.name,
                "words": group.words,
                "characters": group.characters,
                "methods": [
                    {
                        "method": method.title,
                        "boxes": method.boxes,
                        "fg_iou": round(seen.iou, 4),
                        "f": round(seen.f, 4),
                    }
                    for method, seen in group.overlaps.items()
                ],
                "word_ious": [
                    {"scene": scene, "text": text, "fg_iou": round(iou, 4)}
                    for scene, text, iou in group.word_ious
                ],
                "boxes": {
                    source: {
                        "mean_iou": round(sum(ious) / max(len(ious), 1), 4),
                        "at_least_half": round(group.boxes_found(source), 4),
                    }
                    for source, ious in group.box_ious.items()
                },
            }
            for group in measured
        ],
        "checks": [vars(check) for check in checks],
    }


def _gain_table(measured: Sequence[Measured], heads: str) -> list[str]:
    """What each step is worth."""
    lines = [f"{'gain in foreground IoU':43}{heads}"]
    for title, before, after in GAINS:
        cells = (f"{group.iou(after) - group.iou(before):+9.3f}" for group in measured)
        lines.append(f"{title:43}{''.join(cells)}")
    return lines


def _worst(group: Measured) -> list[str]:
    """The words that the default settings do least well, with their foreground IoU."""
    by_iou = sorted(group.word_ious, key=lambda seen: seen[2])
    return [f"  {iou:.3f} {text} in {scene}" for scene, text, iou in by_iou[:WORST]]


def _box_table(measured: Sequence[Measured]) -> list[str]:
    """How well each kind of box fits, in the groups whose true boxes are known."""
    known = [(number, group) for number, group in enumerate(measured, start=1) if group.box_ious]
    heads = "".join(f"{f'[{number}]':>14}" for number, _ in known)
    lines = [f"{'boxes: mean IoU (share >= 0.5)':34}{heads}"]
    for source in BOX_SOURCES:
        cells = "".join(_box_cell(group, source) for _, group in known)
        lines.append(f"{source:34}{cells}")
    return lines


def _cell(iou: float | None) -> str:
    return f"{'-' if iou is None else f'{iou:.3f}':>9}"


def _box_cell(group: Measured, source: str) -> str:
    ious = group.box_ious[source]
    if not any(ious):
        return f"{'-':>14}"
    return f"{f'{sum(ious) / len(ious):.2f} ({group.boxes_found(source):.2f})':>14}"
