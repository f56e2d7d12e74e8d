"""Train the language model and the depth transformer of the small VILA-U on codes of its tower.

The tower is frozen. Text and codes are next-token prediction with equal weights (VILA-U, arXiv
2409.04429, section 3.2), in packed rows.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Generator, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gesso_core.layers.linear import replace_linear_layers
from gesso_core.models.vila_u.config import VilaUConfig
from gesso_core.models.vila_u.depth_transformer import DepthConfig, DepthTransformer
from gesso_core.models.vila_u.losses import training_losses
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.packing import pack_rows
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.template import SHORT, Tokenizer
from gesso_core.models.vila_u.tower_config import TowerConfig
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.train.optimizers import muon_and_adamw
from gesso_core.train.progress import ProgressLine, plot_losses
from gesso_core.train.run_state import RunState
from gesso_core.train.schedule import Clock, Ema, learning_rate, set_learning_rate
from gesso_core.train.vila_u_data import CodedViews, Lessons, encode_views, tokenizer_texts
from gesso_core.train.vila_u_tokenizer import build_tokenizer, load_tokenizer
from gesso_core.train.vila_u_tower import load_tower_run

if TYPE_CHECKING:
    from gesso_core.train.stages import Workspace

SEED: Final = 31
BUDGET_S: Final = 160 * 60.0
BUDGETS_S: Final = {"cpu": BUDGET_S, "smoke": 3.0, "gpu": 8 * 60.0}  # by the name of the profile
PACKED: Final = 620  # tokens of a packed row
TOKENS: Final = 1152  # of an update
LEARNING_RATE: Final = 4e-3
SAVE_EVERY_S: Final = 60.0
EXACT_START, EXACT_END = 0.7, 0.5  # share of captions that leave nothing open
# Of the energy of a visual token the first code carries .83, the next ones .09, .04 and .02.
DEPTH_WEIGHTS: Final = (2.0, 2.0, 1.6, 1.0, 0.6, 0.4, 0.2, 0.2)
TOWER_RUN: Final = "vilau"
RUN: Final = "vilau-language"
STATE: Final = "state.safetensors"


def llama_config(tokenizer: Tokenizer, entries: int) -> LlamaConfig:
    """The small language model: 6 layers of width 192."""
    return LlamaConfig(
        vocab_size=entries,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def new_model(tower: VisionTower, tokenizer: Tokenizer, entries: int) -> VilaU:
    """An untrained small VILA-U around a tower, with the random state of torch."""
    llama = llama_config(tokenizer, entries)
    depth = DepthConfig(
        depth=tower.config.depth,
        codebook=_codebook(tower.config),
        code_width=tower.config.width,
        state_width=llama.hidden_size,
        width=128,
        heads=4,
        layers=3,
        dropout=0.0,
    )
    config = VilaUConfig(
        tower=tower.config,
        depth=depth,
        vocabulary=entries,
        state_width=llama.hidden_size,
        context=llama.max_position_embeddings,
        video_frames=0,
        template=SHORT,
        judges_by="caption",
    )
    model = VilaU(
        config,
        tower,
        Projector(config.projector, tower.config.width, llama.hidden_size),
        DepthTransformer(depth),
        LlamaForCausalLM(llama),
    )
    nn.init.normal_(model.depth_transformer.position_1DE, std=0.02)
    tower.requires_grad_(False)
    return model


class Trained(nn.Module):
    """What the training changes: all of a model but its tower."""

    def __init__(self, model: VilaU) -> None:
        super().__init__()
        self.llm, self.projector = model.llm, model.projector
        self.depth_transformer = model.depth_transformer


def train_language(
    model: VilaU,
    lessons: Lessons,
    folder: Path,
    *,
    budget_s: float = BUDGET_S,
    tokens: int = TOKENS,
) -> VilaU:
    """Train, or continue, the run in ``folder``; returns the averaged model.

    Args:
        model: its tower is frozen already.
        lessons: where batches come from; a run that continues draws other lessons.
        folder: where the state and the loss plot are.
        budget_s: wall-clock seconds.
        tokens: of one update.
    """
    trained = Trained(model)
    replace_linear_layers(trained)
    state = RunState(
        model=trained,
        optimizers=_optimizers(trained),
        ema=Ema(trained, decay=0.998),
        generator=Generator().manual_seed(SEED),
        clock=Clock(budget_s),
    )
    state.resume(folder / STATE)
    lessons.rng.seed(SEED + state.step)
    progress, saved = ProgressLine("vila-u"), state.clock.used_s
    model.train()
    model.tower.eval()
    while state.clock.fraction < 1:
        _update(state, model, lessons, tokens, progress)
        if state.clock.used_s - saved > SAVE_EVERY_S:
            state.save(folder / STATE)
            saved = state.clock.used_s
    state.save(folder / STATE)
    state.ema.copy_to(trained)
    plot_losses(state.losses, "vilau-tiny: text and image loss", folder / "loss.png")
    return model.eval()


def run_vila_u(workspace: "Workspace") -> None:
    """Encode the pictures once, learn the tokenizer, then train."""
    model, lessons = prepared(workspace)
    budget_s = BUDGETS_S[workspace.profile.name]
    train_language(model, lessons, workspace.run / RUN, budget_s=budget_s)


def prepared(workspace: "Workspace") -> tuple[VilaU, Lessons]:
    """The untrained model of a workspace, and its lessons; what takes long is kept on disk."""
    run = workspace.run / RUN
    tower, sprites = load_tower_run(workspace.run / TOWER_RUN), workspace.drawn_sprites()
    codes, words = run / "codes.safetensors", run / "tokenizer"
    if not codes.exists():
        encode_views(tower, sprites, size=tower.config.image_size).save(codes)
    if not (words / "tokenizer.json").exists():
        styles = sorted(set(sprites.style_of_N.tolist()))
        build_tokenizer(tokenizer_texts(sprites, styles), words)
    tokenizer = load_tokenizer(words)
    torch.manual_seed(SEED)
    model = new_model(tower, tokenizer, len(tokenizer))
    rng = random.Random(SEED)
    return model, Lessons(sprites, CodedViews.load(codes), tokenizer, model.config, rng)


def _codebook(config: TowerConfig) -> int:
    size = config.codebook_size
    assert isinstance(size, int), "the small tower has one table"
    return size


def _optimizers(trained: Trained) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside, AdamW for tables, heads and norms."""
    inside = [
        *trained.llm.get_decoder().layers.parameters(),
        *trained.depth_transformer.blocks.parameters(),
        *trained.projector.parameters(),
    ]
    matrices = [parameter for parameter in inside if parameter.ndim == 2]
    return muon_and_adamw(trained, matrices, LEARNING_RATE)


def _update(
    state: RunState, model: VilaU, lessons: Lessons, tokens: int, progress: ProgressLine
) -> None:
    done = state.clock.fraction
    rate = learning_rate(done, state.step, peak=LEARNING_RATE, floor=0.03, hold=0.65, warm_up=100)
    set_learning_rate(state.optimizers, rate)
    rows = lessons.draw(tokens, exact_share=EXACT_START + (EXACT_END - EXACT_START) * done)
    weights_D = torch.tensor(DEPTH_WEIGHTS[: model.config.depth.depth])
    with torch.autocast(model.device.type, torch.bfloat16):
        losses = training_losses(model, pack_rows(rows, PACKED), depth_weights_D=weights_D)
    state.update(losses.total, len(rows))
    both = [float(losses.text.detach()), float(losses.image.detach())]
    shown = progress.update(done, state.step, sum(both), len(rows))
    if shown is not None:
        print(f"  text {both[0]:.3f}  image {both[1]:.3f}", flush=True)
        state.losses.append((state.step, shown))
