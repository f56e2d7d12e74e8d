"""Sprites: pictures with transparency of every (concept, style), packed into one safetensors file.

Pixels are stored premultiplied, so that resizing and compositing never bleed hidden color:
``picture = premultiplied + (1 - alpha) * background``.
Axes: N sprites, H height, W width, 4 = premultiplied red, green, blue, alpha (uint8).
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gesso_core.npm_packages import fetch, members, read_json
from gesso_core.train.concepts import Concept, read_concepts
from gesso_core.train.packages import LOCK_HASH, locked_packages

STYLES = ("3D", "flat", "cartoon")
RENDER_SIZE = 256
Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SpriteSet:
    """Sprites with the concept and the style each one shows."""

    pixels_NHW4: Tensor
    concept_of_N: Tensor
    style_of_N: Tensor
    concepts: tuple[Concept, ...]

    def subset(self, keep: Callable[[Concept], bool]) -> "SpriteSet":
        """The sprites whose concept passes ``keep``; concepts are numbered anew."""
        kept = [i for i, concept in enumerate(self.concepts) if keep(concept)]
        position = {old: new for new, old in enumerate(kept)}
        rows = [n for n, c in enumerate(self.concept_of_N.tolist()) if c in position]
        renumbered = [position[int(self.concept_of_N[n])] for n in rows]
        return SpriteSet(
            pixels_NHW4=self.pixels_NHW4[rows],
            concept_of_N=torch.tensor(renumbered, dtype=torch.int64),
            style_of_N=self.style_of_N[rows],
            concepts=tuple(self.concepts[i] for i in kept),
        )

    def of_styles(self, count: int) -> "SpriteSet":
        """The sprites of the first ``count`` styles; all concepts stay."""
        rows = self.style_of_N < count
        return SpriteSet(
            pixels_NHW4=self.pixels_NHW4[rows],
            concept_of_N=self.concept_of_N[rows],
            style_of_N=self.style_of_N[rows],
            concepts=self.concepts,
        )

    def save(self, path: Path) -> None:
        """Write tensors and concepts as one safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [[c.emoji, c.name, list(c.keywords), c.reserved] for c in self.concepts]
        tensors = {
            "pixels": self.pixels_NHW4.contiguous(),
            "concept": self.concept_of_N,
            "style": self.style_of_N,
        }
        metadata = {"concepts": json.dumps(rows), "data_lock_sha256": LOCK_HASH}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> "SpriteSet":
        """Read what ``save`` wrote."""
        with safe_open(path, framework="pt") as file:
            rows = json.loads(file.metadata()["concepts"])
            concepts = tuple(
                Concept(emoji=e, name=n, keywords=tuple(k), reserved=r) for e, n, k, r in rows
            )
            return cls(
                pixels_NHW4=file.get_tensor("pixels"),
                concept_of_N=file.get_tensor("concept"),
                style_of_N=file.get_tensor("style"),
                concepts=concepts,
            )


def build_sprites(cache: Path, size: int, protected: frozenset[str]) -> SpriteSet:
    """Fetch the locked packages and render every drawable concept in every style.

    Args:
        cache: folder for the package archives.
        size: side of the sprites in pixels.
        protected: words that are never reserved for evaluation.
    """
    archives = {name: fetch(package, cache) for name, package in locked_packages().items()}
    table = read_json(archives["unicode-emoji-json"], "data-by-emoji.json")
    labels = read_json(archives["cldr-annotations-full"], "annotations/en/annotations.json")
    annotations = cast("dict[str, Any]", labels)["annotations"]["annotations"]
    concepts = read_concepts(table, annotations, protected)
    position = {concept.key: i for i, concept in enumerate(concepts)}
    sources = (
        _webp_pictures(archives["@lobehub/fluent-emoji-3d"]),
        _svg_pictures(archives["@iconify-json/fluent-emoji-flat"], position),
        _svg_pictures(archives["@iconify-json/noto"], position),
    )
    rows = [
        (position[key], style, resize_premultiplied(picture, size))
        for style, source in enumerate(sources)
        for key, picture in source
        if key in position
    ]
    return SpriteSet(
        pixels_NHW4=torch.from_numpy(np.stack([pixels for _, _, pixels in rows])),
        concept_of_N=torch.tensor([concept for concept, _, _ in rows]),
        style_of_N=torch.tensor([style for _, style, _ in rows]),
        concepts=tuple(concepts),
    )


def resize_premultiplied(picture: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """A square RGBA picture as (size, size, 4) premultiplied bytes, area-averaged."""
    straight = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    alpha = straight[..., 3:]
    premultiplied = np.concatenate([straight[..., :3] * alpha, alpha], axis=-1)
    channels = [
        Image.fromarray(np.ascontiguousarray(premultiplied[..., c])).resize(
            (size, size), Image.Resampling.BOX
        )
        for c in range(4)
    ]
    stacked = np.stack([np.asarray(channel) for channel in channels], axis=-1)
    scaled: npt.NDArray[np.uint8] = np.round(np.clip(stacked, 0, 1) * 255).astype(np.uint8)
    return scaled


def _plain_key(name: str) -> str:
    return "-".join(part.zfill(4) for part in name.split("-") if part != "fe0f")


def _webp_pictures(archive: Path) -> Iterator[tuple[str, Image.Image]]:
    for path, content in members(archive, suffix=".webp"):
        yield _plain_key(Path(path).stem), Image.open(io.BytesIO(content))


def _svg_pictures(archive: Path, wanted: dict[str, int]) -> Iterator[tuple[str, Image.Image]]:
    import resvg_py

    icons = cast("dict[str, Any]", read_json(archive, "package/icons.json"))
    chars = cast("dict[str, str]", read_json(archive, "package/chars.json"))
    by_key = {_plain_key(code): name for code, name in chars.items()}
    for key in wanted:
        icon = icons["icons"].get(by_key.get(key, ""))
        if icon is None:
            continue
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE))
        yield key, Image.open(io.BytesIO(png))
