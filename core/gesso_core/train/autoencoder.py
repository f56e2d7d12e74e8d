"""Train a small DC-AE on sprites (arXiv 2410.10733, adapted to a CPU budget).

Two stages on the clock: first everything is trained, then the encoder is frozen (so that latents
can be cached and a denoiser started) and the decoder alone goes on.
Axes: B batch, C channels, H height, W width.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from gesso_core.metrics import psnr, ssim
from gesso_core.models.dc_ae import DC_AE_CONFIGS, DCAE
from gesso_core.train.compose import (
    COLORS,
    augment,
    composite,
    mixed_colors,
    palette_colors,
    shrink,
    sprites_to_float,
)
from gesso_core.train.linear_start import start_linear
from gesso_core.train.profiles import Profile
from gesso_core.train.progress import ProgressLine, plot_losses
from gesso_core.train.run_state import RunState
from gesso_core.train.schedule import Clock, Ema, learning_rate, set_learning_rate
from gesso_core.train.sprites import SpriteSet

FREEZE_AT = 0.67
LATENT_NOISE = 0.1  # of the latent's std, added before decoding
SEED = 20


def train_autoencoder(profile: Profile, sprites: SpriteSet, folder: Path) -> DCAE:
    """Train, or continue, the run in ``folder``; writes ``encoder.safetensors`` when it freezes.

    Args:
        profile: sizes and budget.
        sprites: all sprites; held-out concepts are left out here.
        folder: where the state, the log and the results of the run are.
    """
    seen = sprites.subset(lambda concept: not concept.held_out)
    state = _new_state(profile, seen)
    resumed = state.resume(folder / "state.safetensors")
    device, model = torch.device(profile.device), state.model
    assert isinstance(model, DCAE)
    if state.stage == "start":
        if not resumed:
            first = _batch(profile, seen, state.generator, profile.linear_start_pictures)
            start_linear(model.cpu(), first)
            _channels_last(model.to(device))
        state.ema = Ema(model, state.ema.decay)
        state.stage = "full"
    model.encoder.requires_grad_(state.stage == "full")
    progress, saved = ProgressLine("autoencoder"), state.clock.used_s
    while state.clock.fraction < 1:
        if state.stage == "full" and state.clock.fraction >= FREEZE_AT:
            _freeze_encoder(state, model, folder)
        _set_rate(state, profile)
        picture = _batch(profile, seen, state.generator, profile.autoencoder_batch).to(device)
        loss = _update(state, model, picture)
        shown = progress.update(state.clock.fraction, state.step, loss, len(picture))
        if shown is not None:
            state.losses.append((state.step, shown))
        if state.clock.used_s - saved > profile.save_every_s:
            state.save(folder / "state.safetensors")
            saved = state.clock.used_s
    if state.stage == "full":
        _freeze_encoder(state, model, folder)
    state.stage = "done"
    state.save(folder / "state.safetensors")
    state.ema.copy_to(model)
    plot_losses(state.losses, f"{profile.autoencoder}: reconstruction loss", folder / "loss.png")
    return model.eval()


def reconstruction_loss(picture: Tensor, target: Tensor, latent: Tensor) -> Tensor:
    """L1 + 0.5 MSE + 0.5 L1 of the image gradients + 1e-3 mean square of the latent."""
    difference = picture - target
    gradients = sum(difference.diff(dim=dim).abs().mean() for dim in (-1, -2))
    squares = difference.square().mean()
    return difference.abs().mean() + 0.5 * squares + 0.5 * gradients + 1e-3 * latent.square().mean()


@torch.no_grad()
def held_out_quality(model: DCAE, sprites: SpriteSet, size: int) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM over all sprites given, each on one palette color in turn."""
    pictures = reference_pictures(sprites, size)
    device = next(model.parameters()).device
    decoded = torch.cat(
        [model(part.to(device)).float().cpu() for part in torch.split(pictures, 32)]
    )
    return {
        "psnr_db": float(psnr(decoded, pictures).mean()),
        "ssim": float(ssim(decoded, pictures).mean()),
        "pictures": float(len(pictures)),
    }


def reference_pictures(sprites: SpriteSet, size: int) -> Tensor:
    """Every sprite, unchanged, on palette colors in turn: (N, 3, size, size) in [-1, 1]."""
    colors = palette_colors(torch.arange(len(sprites.pixels_NHW4)) % len(COLORS))
    return shrink(composite(sprites_to_float(sprites.pixels_NHW4), colors), size)


def _new_state(profile: Profile, sprites: SpriteSet) -> RunState:
    torch.manual_seed(SEED)
    model = _channels_last(DCAE(DC_AE_CONFIGS[profile.autoencoder])).to(profile.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=profile.autoencoder_lr, betas=(0.9, 0.99), weight_decay=1e-3
    )
    return RunState(
        model=model,
        optimizers=(optimizer,),
        ema=Ema(model, decay=0.998),
        generator=Generator().manual_seed(SEED),
        clock=Clock(profile.autoencoder_s),
    )


def _channels_last(model: DCAE) -> DCAE:
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _batch(profile: Profile, sprites: SpriteSet, generator: Generator, batch: int) -> Tensor:
    index = torch.randint(len(sprites.pixels_NHW4), (batch,), generator=generator)
    views = augment(sprites_to_float(sprites.pixels_NHW4[index]), generator)
    pictures = shrink(composite(views, mixed_colors(batch, generator)), profile.size)
    return pictures.contiguous(memory_format=torch.channels_last)


def _set_rate(state: RunState, profile: Profile) -> None:
    fraction, peak = state.clock.fraction, profile.autoencoder_lr
    if state.stage == "full":
        rate = learning_rate(
            fraction / FREEZE_AT, state.step, peak=peak, floor=0.1, hold=0.5, warm_up=100
        )
    else:
        remaining = (fraction - FREEZE_AT) / (1 - FREEZE_AT)
        rate = learning_rate(
            remaining, state.step, peak=0.6 * peak, floor=0.03, hold=0.0, warm_up=1
        )
    set_learning_rate(state.optimizers, rate)


def _update(state: RunState, model: DCAE, picture: Tensor) -> float:
    frozen = state.stage == "decoder"
    with torch.autocast(picture.device.type, torch.bfloat16):
        with torch.set_grad_enabled(not frozen):
            latent = model.encode(picture)
        noise = torch.randn(latent.shape, generator=state.generator).to(latent)
        decoded = model.decode(latent + LATENT_NOISE * latent.detach().std() * noise)
    loss = reconstruction_loss(decoded.float(), picture, latent.float())
    return state.update(loss, len(picture))


def _freeze_encoder(state: RunState, model: DCAE, folder: Path) -> None:
    """Keep the averaged encoder for good, write it, and go on from the averaged decoder."""
    state.ema.copy_to(model)
    model.encoder.requires_grad_(False)
    state.stage = "decoder"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"encoder.{k}": v.cpu().contiguous() for k, v in model.encoder.state_dict().items()}
    save_file(tensors, folder / "encoder.safetensors", metadata={"step": json.dumps(state.step)})
