"""Train a LoRA for a small Sana: its weights stay as they are, low-rank factors learn beside them.

A style repaints the training sprites; captions stay what they are, so that any caption then gives
its picture in that style. The file has PEFT's keys and may be used by any gesso and by diffusers.

    python -m gesso_core.train lora --style ink      # → runs/lora/ink.safetensors

Axes: N sprites, R rank, B batch, C latent channels, h and w latent height and width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from gesso_core.hub import load_dc_ae, load_sana, resolve
from gesso_core.layers.adapters import LowRank, adapters
from gesso_core.lora.targets import LayerMap
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.keys.sana import sana_diffusers_keys
from gesso_core.models.sana import Sana
from gesso_core.train.compose import COLORS, composite, shrink, sprites_to_float
from gesso_core.train.denoiser import CaptionedLatents, flow_loss
from gesso_core.train.latents import LatentViews
from gesso_core.train.optimizers import descend
from gesso_core.train.progress import ProgressLine
from gesso_core.train.schedule import learning_rate, set_learning_rate
from gesso_core.train.sprites import SpriteSet
from gesso_core.train.stages import Workspace

SEED: Final = 33
LUMINANCE: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601
CHUNK: Final = 64
LEARNED: Final = ("attention.", "cross.", "ffn.")  # parts of a block that get factors

Style = Callable[[Tensor], Tensor]
"""Premultiplied RGBA sprites (N, 4, H, W) in [0, 1] to pictures (N, 3, H, W) in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class LoraProfile:
    """How to train a LoRA."""

    rank: int = 16
    updates: int = 1500
    batch: int = 32
    rate: float = 4e-3
    exact_share: float = 0.5  # captions that leave nothing open


def ink(sprites_N4HW: Tensor) -> Tensor:
    """Shades of gray on white, whatever color the caption asks for."""
    weights = torch.tensor(LUMINANCE)[None, :, None, None]
    gray = (sprites_N4HW[:, :3] * weights).sum(dim=1, keepdim=True)
    drawn = torch.cat([gray.expand(-1, 3, -1, -1), sprites_N4HW[:, 3:]], dim=1)
    return composite(drawn, torch.ones(len(drawn), 3))


STYLES: Final[Mapping[str, Style]] = {"ink": ink}


class TrainableLora(nn.Module):
    """Factors for the linear layers of every block; ``up`` starts at zero, so nothing changes yet.

    Queries, keys and values share ``down``, as do keys and values of the cross-attention.
    """

    def __init__(self, model: Sana, rank: int, generator: Generator) -> None:
        super().__init__()
        guided = model.config.guidance_embedding
        table = sana_diffusers_keys(guidance_embedding=guided)
        self.targets = {
            name: target
            for name, target in LayerMap(model, (table,)).targets.items()
            if target.name.startswith("blocks.")
            and target.name.split(".", 2)[2].startswith(LEARNED)
        }
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for target in self.targets.values():
            key = _key(target.name)
            if key not in self.down:
                drawn = torch.randn(rank, target.columns, generator=generator)
                self.down[key] = nn.Parameter(drawn / target.columns**0.5)
                self.up[key] = nn.Parameter(torch.zeros(target.outputs, rank))
        self._names = {target.module: _key(target.name) for target in self.targets.values()}

    def low_rank(self, module: nn.Module) -> LowRank | None:
        """The factors of a layer, as `adapters` wants them."""
        key = self._names.get(module)
        return None if key is None else (self.down[key], self.up[key])

    def tensors(self) -> dict[str, Tensor]:
        """The factors under PEFT's keys, float16."""
        tensors = {}
        for name, target in self.targets.items():
            key, rows = _key(target.name), slice(target.row, target.row + target.rows)
            tensors[f"transformer.{name}.lora_A.weight"] = self.down[key].detach().half()
            tensors[f"transformer.{name}.lora_B.weight"] = self.up[key].detach()[rows].half()
        return {name: tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def styled_latents(
    autoencoder: DCAE, sprites: SpriteSet, style: Style, *, size: int, scale: float
) -> LatentViews:
    """One view of every sprite in ``style``, the same for every color that a caption may ask for.

    Args:
        autoencoder: its encoder is used.
        sprites: what to repaint.
        style: how.
        size: side of the pictures in pixels.
        scale: what a latent is multiplied by, the autoencoder's ``scaling_factor``.
    """
    parts = []
    for start in range(0, len(sprites.pixels_NHW4), CHUNK):
        pixels = sprites.pixels_NHW4[start : start + CHUNK]
        pictures = style(shrink(sprites_to_float(pixels), size))
        parts.append(autoencoder.encode(pictures) * scale)
    latents_NKVChw = torch.cat(parts).half()[:, None, None].expand(-1, len(COLORS), -1, -1, -1, -1)
    return LatentViews(latents_NKVChw=latents_NKVChw, std=1 / scale)


def train_lora(model: Sana, data: CaptionedLatents, profile: LoraProfile) -> TrainableLora:
    """Learn what ``data`` shows; ``model`` itself is not changed.

    Args:
        model: the network, fp32.
        data: captions with latents in the new style.
        profile: rank and budget.
    """
    generator = Generator().manual_seed(SEED)
    model.requires_grad_(False)
    lora = TrainableLora(model, profile.rank, generator)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=profile.rate, weight_decay=0.0)
    progress = ProgressLine("lora")
    for step in range(profile.updates):
        done = step / profile.updates
        rate = learning_rate(done, step, peak=profile.rate, floor=0.05, hold=0.5, warm_up=20)
        set_learning_rate([optimizer], rate)
        batch = data.draw(profile.batch, generator, exact_share=profile.exact_share)
        with adapters(lora):  # of the backward pass as well, which may compute blocks again
            loss = descend(flow_loss(model, batch, generator), lora, [optimizer])
        progress.update(done, step + 1, loss, profile.batch)
    return lora


def run_lora(workspace: Workspace, style: str, profile: LoraProfile) -> Path:
    """Train a LoRA of ``style`` for the shipped small Sana; returns the file."""
    sprites = workspace.drawn_sprites()
    records = workspace.captions(sprites)
    autoencoder = load_dc_ae(resolve("dcae-tiny"), torch.float32)
    latents = styled_latents(
        autoencoder,
        sprites,
        STYLES[style],
        size=workspace.profile.size,
        scale=autoencoder.config.scaling_factor,
    )
    data = CaptionedLatents(sprites, latents, records, workspace.caption_states(records))
    model = load_sana(resolve(workspace.profile.denoiser), torch.float32)
    path = workspace.runs / "lora" / f"{style}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(train_lora(model, data, profile).tensors(), path)
    print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    return path


def _key(name: str) -> str:
    """A module's name as a key of a parameter dictionary, which allows no dots."""
    return name.replace(".", "/")
