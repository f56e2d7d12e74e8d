"""Train a small HART on cached latents and cached text states (arXiv 2410.10812, section 3.4).

Cross-entropy of the codes with label smoothing, and the diffusion loss of the residual, in one
backward pass. Text is left out for a tenth of the samples, by a uniform draw; such a sample then
looks exactly like the unconditional row of guidance.
Axes: B batch, L text slots, S text channels, h and w latent sides, C latent channels.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gesso_core.models.hart.config import HART_CONFIGS, HARTConfig
from gesso_core.models.hart.initialization import initialize_weights
from gesso_core.models.hart.losses import TrainingLosses, sampled_codes, training_losses
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.transformer import HART, HARTText, text_positions, without_text
from gesso_core.train.denoiser import Batch, CaptionedLatents
from gesso_core.train.hart_tokenizer import FOLDER, load_hart_views, load_trained_quantizer
from gesso_core.train.hart_views import noisy_targets
from gesso_core.train.optimizers import muon_and_adamw
from gesso_core.train.progress import ProgressLine, plot_losses
from gesso_core.train.run_state import RunState
from gesso_core.train.schedule import Clock, Ema, learning_rate, set_learning_rate
from gesso_core.train.stages import Workspace

SEED = 31
LABEL_SMOOTHING = 0.1
TOP_K = 50  # codes that the residual's target is taken from, as they are drawn afterwards
# Exact captions come first, as for the denoiser, and stay frequent because the run is short.
EXACT_START, EXACT_END = 0.7, 0.35
KEYWORD_FROM, KEYWORD_SHARE = 0.5, 0.2


@dataclass(frozen=True, kw_only=True)
class HARTTraining:
    """Sizes and budget of a run."""

    config: str = "hart-tiny"  # key of HART_CONFIGS
    budget_s: float = 80 * 60.0
    batch: int = 48
    rate: float = 4e-3
    hold: float = 0.55  # share of the budget until the learning rate descends
    save_every_s: float = 60.0


HART_TRAINING: dict[str, HARTTraining] = {
    "cpu": HARTTraining(),
    "smoke": HARTTraining(budget_s=3.0, batch=8, save_every_s=1.0),
    "gpu": HARTTraining(budget_s=8 * 60.0, batch=512),
}


def train_hart(
    training: HARTTraining,
    data: CaptionedLatents,
    quantizer: MultiScaleQuantizer,
    folder: Path,
    device: str = "cpu",
) -> HART:
    """Train, or continue, the run in ``folder``; returns the averaged model.

    Args:
        training: sizes and budget.
        data: batches of latents and captions.
        quantizer: frozen.
        folder: where the state and the loss plot are.
        device: where to compute.
    """
    state = _new_state(training, hart_config(training, quantizer), device)
    state.resume(folder / "state.safetensors")
    model = state.model
    assert isinstance(model, HART)
    progress, saved = ProgressLine("hart"), state.clock.used_s
    while state.clock.fraction < 1:
        _update(state, model, training, data, quantizer, progress)
        if state.clock.used_s - saved > training.save_every_s:
            state.save(folder / "state.safetensors")
            saved = state.clock.used_s
    state.save(folder / "state.safetensors")
    state.ema.copy_to(model)
    plot_losses(state.losses, f"{training.config}: cross-entropy + diffusion", folder / "loss.png")
    return model.eval()


def batch_losses(
    model: HART, quantizer: MultiScaleQuantizer, batch: Batch, generator: Generator
) -> TrainingLosses:
    """Losses of one batch; all random numbers come from ``generator``."""
    device = model.device
    targets = noisy_targets(quantizer, batch.latent_BChw.to(device), generator)
    text = _text(model, batch, generator)
    return training_losses(
        model,
        text,
        targets,
        quantizer.codebook_VC.detach(),
        choose=lambda logits: sampled_codes(logits, generator, top_k=TOP_K, top_p=0.0),
        draw_noise=lambda rows: model.residual.draw_training(rows, generator),
        label_smoothing=LABEL_SMOOTHING,
    )


def weighted_loss(losses: TrainingLosses, scales: tuple[int, ...]) -> Tensor:
    """Cross-entropy, in which a token weighs the more the coarser its scale, and diffusion loss.

    What the coarse scales get wrong the fine ones cannot repair, and they have few tokens.
    """
    weight_M = torch.cat([torch.full((side * side,), 1 / side) for side in scales])
    weight_M = (weight_M / weight_M.mean()).to(losses.cross_entropy_BM.device)
    return (losses.cross_entropy_BM * weight_M).mean() + losses.diffusion.total.mean()


def _text(model: HART, batch: Batch, generator: Generator) -> HARTText:
    """Texts in all slots of the model; those left out are zero and all at position 0."""
    slots = model.config.context_tokens
    text_BLS, mask_BL = batch.text_BLS[:, :slots], batch.mask_BL[:, :slots]
    missing = slots - mask_BL.shape[1]
    text_BLS = F.pad(text_BLS, (0, 0, 0, missing)).to(model.device)
    mask_BL = F.pad(mask_BL, (0, missing)).to(model.device)
    chance_B = torch.rand(len(text_BLS), generator=generator).to(model.device)
    dropped_B = chance_B < model.config.text_dropout
    positions_BL = text_positions(mask_BL) * ~dropped_B[:, None]
    return model.encode_text(without_text(text_BLS, dropped_B), mask_BL, positions_BL)


def hart_config(training: HARTTraining, quantizer: MultiScaleQuantizer) -> HARTConfig:
    """The transformer's configuration for the codes and scales of a tokenizer."""
    return replace(
        HART_CONFIGS[training.config], vocabulary=quantizer.vocabulary, scales=quantizer.scales
    )


def _new_state(training: HARTTraining, config: HARTConfig, device: str) -> RunState:
    generator = Generator().manual_seed(SEED)
    model = HART(config)
    initialize_weights(model, generator)
    model.to(device)
    return RunState(
        model=model,
        optimizers=_optimizers(model, training.rate),
        ema=Ema(model, decay=0.999),
        generator=generator,
        clock=Clock(training.budget_s),
    )


def _optimizers(model: HART, rate: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [
        parameter
        for name, parameter in model.blocks.named_parameters()
        if parameter.ndim == 2 and name.endswith("weight")
    ]
    return muon_and_adamw(model, matrices, rate)


def _update(
    state: RunState,
    model: HART,
    training: HARTTraining,
    data: CaptionedLatents,
    quantizer: MultiScaleQuantizer,
    progress: ProgressLine,
) -> None:
    done = state.clock.fraction
    rate = learning_rate(
        done, state.step, peak=training.rate, floor=0.05, hold=training.hold, warm_up=100
    )
    set_learning_rate(state.optimizers, rate)
    batch = data.draw(
        training.batch,
        state.generator,
        exact_share=EXACT_START + (EXACT_END - EXACT_START) * done,
        keyword_share=KEYWORD_SHARE if done > KEYWORD_FROM else 0.0,
        plain_share=0.0,
        empty_share=0.0,
    )
    losses = batch_losses(model, quantizer, batch, state.generator)
    loss = state.update(weighted_loss(losses, model.config.scales), training.batch)
    shown = progress.update(done, state.step, loss, training.batch)
    if shown is not None:
        state.losses.append((state.step, shown))


def run_hart(workspace: Workspace) -> None:
    """Train the transformer of the small HART on the frozen quantizer's codes."""
    train_hart(
        HART_TRAINING[workspace.profile.name],
        hart_data(workspace),
        load_trained_quantizer(workspace),
        workspace.run / FOLDER / "transformer",
        workspace.profile.device,
    )


def hart_data(workspace: Workspace) -> CaptionedLatents:
    """Captioned latents in the views that HART is trained on."""
    sprites = workspace.drawn_sprites()
    records = workspace.captions(sprites)
    views, states = load_hart_views(workspace), workspace.caption_states(records)
    return CaptionedLatents(sprites, views, records, states)
