"""Train a small vision tower for VILA-U (arXiv 2409.04429, section 3.1, adapted to a CPU budget).

Stages on the clock: without quantization; with it; then encoder and tables are frozen and written,
so that a language model can begin, and the decoder and the contrastive branch go on. The features
start as a linear code of the patches (their principal components), which the layers only refine.

Loss: reconstruction + 0.25 commitment + 0.1 sigmoid image-text loss (arXiv 2303.15343, algorithm 1)
on the pooled quantized features. Text vectors are cached states of a language model, projected.

Axes: B batch, S picture side, h and w code grid, D depth, C feature channels, T text channels.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from gesso_core.errors import WeightsError
from gesso_core.models.vila_u.residual_quantizer import Codebook, straight_through
from gesso_core.models.vila_u.tower_config import VILAU_TINY, TowerConfig
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.train.autoencoder import reconstruction_loss
from gesso_core.train.captioned_pictures import CaptionedPictures, Pictures
from gesso_core.train.optimizers import muon_and_adamw
from gesso_core.train.progress import ProgressLine, plot_losses
from gesso_core.train.run_state import RunState
from gesso_core.train.schedule import Clock, Ema, learning_rate, set_learning_rate
from gesso_core.train.stages import Workspace
from gesso_core.train.tower_quality import held_out_concepts, tower_quality
from gesso_core.train.tower_start import start_linear, start_smooth, start_tables

SEED = 23
CONTRASTIVE_WEIGHT = 0.1
SAVE_EVERY_S = 60.0
FOLDER = "vilau"
ENCODER, TOWER, STATE = "encoder.safetensors", "tower.safetensors", "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class TowerProfile:
    """Sizes and budget of one way to train a tower."""

    config: TowerConfig
    seconds: float  # wall clock
    pictures: int  # encoded and compared with their captions, per update
    decoded: int  # of these also decoded
    rate: float
    quantize_at: float = 0.12  # shares of the budget
    freeze_at: float = 0.62
    restart_below: float = 0.02  # vectors per update of a table under which a row is replaced
    start_pictures: int = 384
    refit_updates: int = 60


CPU = TowerProfile(config=VILAU_TINY, seconds=31 * 60, pictures=32, decoded=16, rate=5e-3)
TOWER_PROFILES: dict[str, TowerProfile] = {
    "cpu": CPU,
    "smoke": replace(CPU, seconds=4.0, pictures=8, decoded=4, start_pictures=24, refit_updates=2),
    "gpu": replace(CPU, seconds=8 * 60, pictures=512, decoded=256),
}


class TowerInTraining(nn.Module):
    """A tower, and the projection of text vectors that its pooled features are compared with."""

    def __init__(self, config: TowerConfig, text_width: int) -> None:
        super().__init__()
        width = config.encoder.hidden_size
        self.tower = VisionTower(config)
        self.text = nn.Sequential(
            nn.Linear(text_width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        nn.init.constant_(self.tower.logit_scale, math.log(10))
        nn.init.constant_(self.tower.logit_bias, -10.0)


def train_tower(
    profile: TowerProfile, data: CaptionedPictures, folder: Path, device: str = "cpu"
) -> VisionTower:
    """Train, or continue, the run in ``folder``; writes ``encoder.safetensors`` when it freezes.

    Args:
        profile: sizes and budget.
        data: pictures with captions.
        folder: where the state, the log and the results are.
        device: where the tower is trained.
    """
    state = _new_state(profile, data, device)
    state.resume(folder / STATE)
    model = state.model
    assert isinstance(model, TowerInTraining)
    _restart_below(model.tower, profile.restart_below)
    if state.stage == "start":
        start_linear(model.tower, data.draw(profile.start_pictures, state.generator).pixels_B3SS)
        start_smooth(model.tower.decoder)
        state.ema, state.stage = Ema(model, state.ema.decay), "continuous"
    progress, saved = ProgressLine("vision tower"), state.clock.used_s
    while state.clock.fraction < 1:
        _next_stage(state, model, profile, data, folder)
        _set_rate(state, profile)
        loss = _update(state, model, profile, data)
        shown = progress.update(state.clock.fraction, state.step, loss, profile.pictures)
        if shown is not None:
            state.losses.append((state.step, shown))
        if state.clock.used_s - saved > SAVE_EVERY_S:
            state.save(folder / STATE)
            saved = state.clock.used_s
    _next_stage(state, model, profile, data, folder)
    state.stage = "done"
    state.save(folder / STATE)
    state.ema.copy_to(model)
    save_tower(model.tower, folder / TOWER)
    plot_losses(state.losses, "vision tower: loss", folder / "loss.png")
    return model.tower.eval()


def contrastive_loss(
    model: TowerInTraining, image_BC: Tensor, batch: Pictures, text_BT: Tensor
) -> Tensor:
    """Sigmoid loss of all pairs of a batch; pairs of one concept in two rows do not count."""
    image_BC = F.normalize(image_BC.float(), dim=-1)
    text_BC = F.normalize(model.text(text_BT).float(), dim=-1)
    tower = model.tower
    logits_BB = image_BC @ text_BC.T * tower.logit_scale.exp() + tower.logit_bias
    same_BB = (batch.concept_B[:, None] == batch.concept_B).to(logits_BB.device)
    own_BB = torch.eye(len(same_BB), dtype=torch.bool, device=logits_BB.device)
    losses_BB = -F.logsigmoid(torch.where(own_BB, logits_BB, -logits_BB))
    return losses_BB.masked_fill(same_BB & ~own_BB, 0.0).sum() / len(losses_BB)


def save_tower(tower: VisionTower, path: Path) -> None:
    """Write a tower under our own names, with its configuration in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tower.state_dict().items()}
    partial = path.with_suffix(".partial")
    config = json.dumps(tower.config.to_original())
    save_file(tensors, partial, metadata={"config": config})
    partial.replace(path)


@torch.no_grad()
def encode_pictures(
    tower: VisionTower, pictures: Tensor | Sequence[Tensor], chunk: int = 128
) -> Tensor:
    """Codes (B, h, w, D) int64 of pictures (B, 3, S, S), on the CPU."""
    pixels_B3SS = pictures if isinstance(pictures, Tensor) else torch.stack(list(pictures))
    device = tower.logit_scale.device
    parts = [tower.encode(part.to(device)).codes_BhwD for part in torch.split(pixels_B3SS, chunk)]
    return torch.cat(parts).cpu()


def run_vila_u_tower(workspace: Workspace) -> None:
    """Train the tower of a profile, then write how good it is to ``quality.json``."""
    data, folder = tower_data(workspace), workspace.run / FOLDER
    profile = TOWER_PROFILES[workspace.profile.name]
    train_tower(profile, data, folder, workspace.profile.device)
    seen, everything = workspace.drawn_sprites(), workspace.sprites()
    quality = tower_quality(load_tower_run(folder), data, held_out_concepts(everything, seen))
    (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality))


def tower_data(workspace: Workspace) -> CaptionedPictures:
    """The pictures and captions of a profile."""
    sprites = workspace.drawn_sprites()
    records = workspace.captions(sprites)
    states = workspace.caption_states(records)
    return CaptionedPictures(sprites, records, states, workspace.profile.size)


def load_trained_tower(workspace: Workspace) -> VisionTower:
    """The tower of a profile's run, see `load_tower_run`."""
    return load_tower_run(workspace.run / FOLDER)


def load_tower_run(folder: Path) -> VisionTower:
    """The tower of a run: complete when the run is done, else with an untrained decoder.

    Raises:
        WeightsError: the encoder is not frozen yet.
    """
    for name in (TOWER, ENCODER):
        if (folder / name).exists():
            return _read_tower(folder / name)
    raise WeightsError(
        f"{folder / ENCODER} does not exist yet: it is written after about two thirds of the "
        "tower's training; run the stage 'vila-u-tower' first"
    )


def _read_tower(path: Path) -> VisionTower:
    with safe_open(path, framework="pt") as file:
        config = TowerConfig.from_original(json.loads(file.metadata()["config"]))
    tower = VisionTower(config)
    # As it will be published: a model trained on its codes must meet the same codes again.
    tower.load_state_dict({name: t.half().float() for name, t in load_file(path).items()})
    return tower.eval().requires_grad_(False)


def _new_state(profile: TowerProfile, data: CaptionedPictures, device: str) -> RunState:
    torch.manual_seed(SEED)
    model = TowerInTraining(profile.config, data.text_vectors(torch.zeros(1).long()).shape[1])
    model.to(device)
    model.tower.encoder.set_attn_implementation("eager")  # faster than fused at so few tokens
    return RunState(
        model=model,
        optimizers=_optimizers(model, profile.rate),
        ema=Ema(model, decay=0.998),
        generator=Generator().manual_seed(SEED),
        clock=Clock(profile.seconds),
    )


def _optimizers(model: TowerInTraining, rate: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for encoder matrices and decoder convolutions, AdamW for the rest."""
    inner = (model.tower.encoder.encoder, model.tower.decoder.middle, model.tower.decoder.levels)
    matrices = [p for part in inner for p in part.parameters() if p.ndim >= 2]
    matrices.append(model.tower.decoder.conv_in.weight)
    return muon_and_adamw(model, matrices, rate, rest_decay=1e-3)


def _restart_below(tower: VisionTower, limit: float) -> None:
    for book in tower.quantizer.codebooks:
        assert isinstance(book, Codebook)
        book.restart_below = limit


def _next_stage(
    state: RunState,
    model: TowerInTraining,
    profile: TowerProfile,
    data: CaptionedPictures,
    folder: Path,
) -> None:
    fraction, tower = state.clock.fraction, model.tower
    if state.stage == "continuous" and fraction >= profile.quantize_at:
        with torch.no_grad():
            pixels = data.draw(profile.start_pictures, state.generator).pixels_B3SS
            start_tables(tower, tower.features(pixels), state.generator)
        state.stage = "quantized"
    if state.stage == "quantized" and fraction >= profile.freeze_at:
        state.ema.copy_to(model)
        for _ in range(profile.refit_updates):
            pixels = data.draw(profile.pictures, state.generator).pixels_B3SS
            with torch.no_grad():
                tower.quantizer.update(tower.features(pixels), generator=state.generator)
        save_tower(tower, folder / ENCODER)
        state.stage = "decoder"


def _set_rate(state: RunState, profile: TowerProfile) -> None:
    fraction, peak = state.clock.fraction, profile.rate
    if state.stage == "decoder":
        rest = (fraction - profile.freeze_at) / (1 - profile.freeze_at)
        rate = learning_rate(rest, state.step, peak=0.7 * peak, floor=0.03, hold=0.0, warm_up=1)
    else:
        done = fraction / profile.freeze_at
        rate = learning_rate(done, state.step, peak=peak, floor=0.1, hold=0.5, warm_up=100)
    set_learning_rate(state.optimizers, rate)


def _update(
    state: RunState, model: TowerInTraining, profile: TowerProfile, data: CaptionedPictures
) -> float:
    batch = data.draw(profile.pictures, state.generator)
    text_BT = data.text_vectors(batch.caption_B)
    loss = (_frozen_loss if state.stage == "decoder" else _full_loss)(
        state, model, batch, text_BT, profile.decoded
    )
    return state.update(loss, profile.pictures)


def _frozen_loss(
    state: RunState, model: TowerInTraining, batch: Pictures, text_BT: Tensor, decoded: int
) -> Tensor:
    """Loss of what comes after the codes: the decoder and the contrastive branch."""
    tower = model.tower
    device = tower.logit_scale.device
    pixels_B3SS = batch.pixels_B3SS.to(device)
    with torch.no_grad():
        features_BhwC = tower.encode(pixels_B3SS).features_BhwC
    with torch.autocast(device.type, torch.bfloat16):
        painted_B3SS = tower.decode(features_BhwC[:decoded])
        matched = contrastive_loss(model, tower.pooled(features_BhwC), batch, text_BT.to(device))
    painted = reconstruction_loss(painted_B3SS.float(), pixels_B3SS[:decoded], torch.zeros(()))
    return painted + CONTRASTIVE_WEIGHT * matched


def _full_loss(
    state: RunState, model: TowerInTraining, batch: Pictures, text_BT: Tensor, decoded: int
) -> Tensor:
    tower = model.tower
    device = tower.logit_scale.device
    pixels_B3SS, text_BT = batch.pixels_B3SS.to(device), text_BT.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        latent_BHWC = tower.features(pixels_B3SS)
        x_BhwC = tower.quantizer.to_code_shape(latent_BHWC).float()
        seen_BhwC, commitment = x_BhwC, x_BhwC.new_zeros(())
        if state.stage == "quantized":
            quantized = tower.quantizer.update(latent_BHWC.float(), generator=state.generator)
            seen_BhwC = straight_through(x_BhwC, quantized.partial_sums[-1])
            commitment = tower.config.commitment_weight * quantized.commitment_loss(x_BhwC)
        painted_B3SS = tower.decode(seen_BhwC[:decoded])
        matched = contrastive_loss(model, tower.pooled(seen_BhwC), batch, text_BT)
    painted = reconstruction_loss(painted_B3SS.float(), pixels_B3SS[:decoded], x_BhwC)
    return painted + commitment + CONTRASTIVE_WEIGHT * matched
