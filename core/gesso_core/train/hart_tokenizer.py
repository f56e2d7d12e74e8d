"""Learn the codebook of the small HART (arXiv 2410.10812, section 3.1) on frozen latents.

The small tokenizer has no convolutions of its own: it quantizes the latents of ``dcae-tiny``, times
their scaling factor. The codebook starts from k-means of every scale's residuals, then follows them
by exponential moving averages with restart of unused codes; the φ convolutions learn by gradient.
The encoder is frozen, so there is no commitment to train, and the decoder has seen noisy latents.

φ starts as the identity. The last scale is trained by the rule of generation, without φ, so a φ
that only the last scale uses stays the identity and all last-scale rules agree.

    run_hart_tokenizer(workspace)         trains, prints and writes runs/<profile>/hart/tokenizer-….
    load_trained_quantizer(workspace)     the quantizer of that file, for the transformer's training
    load_hart_views(workspace)            the latents it was trained on: more views than the Sana's
    publish_hart_tokenizer(workspace, …)  weights/hart-tiny/tokenizer

The run is a few minutes of fixed length and deterministic: stopped, it starts again.
Axes: B batch, C channels, H side of the latent, N tokens, V codes, R rows.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from gesso_core.errors import WeightsError
from gesso_core.hub import load_dc_ae, resolve, weights_hash
from gesso_core.metrics import psnr
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.keys.hart_tokenizer import tokenizer_keys
from gesso_core.models.keys.translate import untranslate
from gesso_core.train.compose import composite, palette_colors, shrink, sprites_to_float
from gesso_core.train.hart_views import cached_views
from gesso_core.train.latents import LatentViews, shown_compositions
from gesso_core.train.packages import LOCK_HASH
from gesso_core.train.progress import ProgressLine
from gesso_core.train.schedule import learning_rate, set_learning_rate
from gesso_core.train.sprites import SpriteSet
from gesso_core.train.stages import Workspace

SEED: Final = 41
AUTOENCODER: Final = "dcae-tiny"
SCALES: Final = (1, 2, 3, 4)
FOLDER: Final = "hart"
CHUNK: Final = 64
LAST_RESTART: Final = 0.7  # of the run; later no code is moved by force
RESTART_EVERY: Final = 200
UNUSED: Final = 0.04  # of an even share of hits, below which a code is restarted
EARLIER_SCALES: Final = 0.25  # weight of the sum's error before the last scale


@dataclass(frozen=True, kw_only=True)
class TokenizerProfile:
    """How to train the tokenizer."""

    vocabulary: int = 1024
    updates: int = 2500
    batch: int = 256
    decay: float = 0.99  # of the moving averages
    phi_rate: float = 1e-3
    start_latents: int = 6000  # for k-means
    start_rounds: int = 15


PROFILES: Final[Mapping[str, TokenizerProfile]] = {
    "smoke": TokenizerProfile(updates=3, batch=8, start_latents=128, start_rounds=2),
}


def run_hart_tokenizer(workspace: Workspace, scales: tuple[int, ...] = SCALES) -> None:
    """Train the quantizer of the small HART, print its quality and write it."""
    profile = PROFILES.get(workspace.profile.name, TokenizerProfile())
    sprites = workspace.drawn_sprites()
    views = load_hart_views(workspace)
    n, k = shown_compositions(sprites).nonzero().unbind(1)
    latents = views.latents_NKVChw[n, k].flatten(0, 1)
    config = HARTTokenizerConfig(
        vocabulary=profile.vocabulary,
        channels=latents.shape[1],
        scales=scales,
        autoencoder=AUTOENCODER,
    )
    quantizer = train_quantizer(config, latents, profile)
    measures = held_out_measures(quantizer, _autoencoder(), sprites, views.std)
    print(json.dumps(measures, indent=1))
    path = _path(workspace, scales)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"seed": SEED, "measures": measures, **asdict(profile)}
    metadata = {"config": json.dumps(config.to_original()), "about": json.dumps(about)}
    state = {name: tensor.contiguous() for name, tensor in quantizer.state_dict().items()}
    save_file(state, path, metadata=metadata)


def load_trained_quantizer(
    workspace: Workspace, scales: tuple[int, ...] = SCALES
) -> MultiScaleQuantizer:
    """The quantizer that `run_hart_tokenizer` wrote, frozen, in float32.

    Raises:
        WeightsError: it was not trained yet.
    """
    path = _path(workspace, scales)
    config, _ = _read_about(path)
    quantizer = config.build_quantizer()
    quantizer.load_state_dict(load_file(path))
    return quantizer.eval().requires_grad_(False)


def load_hart_views(workspace: Workspace) -> LatentViews:
    """Latents of the shown compositions, scaled as for the Sana; encoded on the first call."""
    model, path = _autoencoder(), workspace.run / FOLDER / "latents.safetensors"
    std = 1 / model.config.scaling_factor
    return cached_views(path, model, workspace.drawn_sprites(), workspace.profile.size, std)


def train_quantizer(
    config: HARTTokenizerConfig, latents_MCHH: Tensor, profile: TokenizerProfile
) -> MultiScaleQuantizer:
    """Fit codebook and φ to latents.

    Args:
        config: of the quantizer.
        latents_MCHH: M latents, in the scale in which they will be quantized.
        profile: length and rates.
    """
    generator = Generator().manual_seed(SEED)
    quantizer = config.build_quantizer()
    start_identity(quantizer)
    first = latents_MCHH[_some(len(latents_MCHH), profile.start_latents, generator)].float()
    start_codebook(quantizer, first, generator, profile.start_rounds)
    averages = CodeAverages(quantizer.codebook_VC.detach(), profile.decay)
    optimizer = torch.optim.Adam(quantizer.phis.parameters(), betas=(0.9, 0.99))
    progress = ProgressLine("hart tokenizer")
    for step in range(profile.updates):
        done = step / profile.updates
        rate = learning_rate(done, step, peak=profile.phi_rate, floor=0.02, hold=0.0, warm_up=50)
        set_learning_rate([optimizer], rate)
        f = latents_MCHH[_some(len(latents_MCHH), profile.batch, generator)].float()
        loss = _update(quantizer, averages, optimizer, f)
        if step % RESTART_EVERY == RESTART_EVERY - 1 and done < LAST_RESTART:
            averages.restart(generator)
        quantizer.codebook_VC.data.copy_(averages.codes())
        progress.update(done, step, loss, len(f))
    for parameter in quantizer.parameters():
        # What ships is float16; a transformer is to learn the codes of exactly those numbers.
        parameter.data.copy_(parameter.data.half())
    return quantizer.eval().requires_grad_(False)


class CodeAverages:
    """Moving averages of the residuals that chose each code, and of how many they were."""

    def __init__(self, codes_VC: Tensor, decay: float) -> None:
        self.decay = decay
        self.sums_VC, self.counts_V = codes_VC.clone(), torch.ones(len(codes_VC))
        self.recent_RC = codes_VC  # residuals of the newest batch at the last scale

    def codes(self) -> Tensor:
        """The codes (V, C) that the averages stand for."""
        return self.sums_VC / self.counts_V.clamp(min=1e-5)[:, None]

    def add(self, indices_R: Tensor, rows_RC: Tensor, share: float) -> None:
        """Count residuals; ``share`` is the part of one update that this call is."""
        self.sums_VC *= self.decay**share
        self.counts_V *= self.decay**share
        counts_V = indices_R.bincount(minlength=len(self.counts_V)).float()
        self.counts_V += (1 - self.decay) * counts_V
        self.sums_VC.index_add_(0, indices_R, rows_RC, alpha=1 - self.decay)
        self.recent_RC = rows_RC

    def restart(self, generator: Generator) -> None:
        """Move every code that is hardly used to a recent residual."""
        even = self.counts_V.sum() / len(self.counts_V)
        unused = (self.counts_V < UNUSED * even).nonzero().squeeze(1)
        rows = self.recent_RC[_some(len(self.recent_RC), len(unused), generator)]
        self.counts_V[unused] = even
        self.sums_VC[unused] = rows * even


def start_identity(quantizer: MultiScaleQuantizer) -> None:
    """Let every φ be the identity."""
    for conv in quantizer.phis:
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)


@torch.no_grad()
def start_codebook(
    quantizer: MultiScaleQuantizer, f_BCHH: Tensor, generator: Generator, rounds: int
) -> None:
    """k-means of each scale's residuals; finer scales get more of the codes."""
    rest, books, left = f_BCHH, [], quantizer.vocabulary
    shares = quantizer.scales
    for scale, side in enumerate(shares):
        last = scale == len(shares) - 1
        count = left if last else quantizer.vocabulary * side // sum(shares)
        rows_RC = _rows(quantizer.next_input(rest, scale))
        centers = _k_means(rows_RC, count, generator, rounds)
        chosen = _nearest(rows_RC, centers)
        h = quantizer.contribution(scale, centers[chosen].view(len(f_BCHH), side**2, -1), phi=False)
        rest, left = rest - h, left - count
        books.append(centers)
    quantizer.codebook_VC.copy_(torch.cat(books))


@torch.no_grad()
def held_out_measures(
    quantizer: MultiScaleQuantizer, autoencoder: DCAE, sprites: SpriteSet, std: float
) -> dict[str, Any]:
    """Quality on compositions that no training saw: PSNR in dB, residual in units of the latent."""
    size = autoencoder.config.spatial_compression_ratio * quantizer.side
    pictures = _held_out_pictures(sprites, size)
    f = torch.cat([autoencoder.encode(part) for part in torch.split(pictures, CHUNK)]) / std
    codes = quantizer.encode_hybrid(f)
    sums = quantizer.partial_sums(codes.indices, phi_at_last=False)
    before_last = sums[-2] if len(sums) > 1 else torch.zeros_like(f)
    hybrid = before_last + codes.rest_BNC.mT.reshape(f.shape)
    residual = (codes.rest_BNC - quantizer.embed(codes.indices[-1])).abs().flatten()

    def quality(latent: Tensor) -> float:
        decoded = [autoencoder.decode(part) for part in torch.split(latent * std, CHUNK)]
        return round(float(psnr(torch.cat(decoded), pictures).mean()), 3)

    return {
        "pictures": len(pictures),
        "discrete_psnr_db_after_each_scale": [quality(total) for total in sums],
        "discrete_psnr_db": quality(sums[-1]),
        "hybrid_psnr_db": quality(hybrid),
        "residual_std": round(float(residual.square().mean().sqrt()), 4),
        "residual_99_percent": round(float(residual.quantile(0.99)), 4),
        "codes_used": len(torch.unique(torch.cat([i.flatten() for i in codes.indices]))),
    }


def publish_hart_tokenizer(
    workspace: Workspace, folder: Path, scales: tuple[int, ...] = SCALES
) -> None:
    """Write ``folder/{config.json,model.safetensors}`` in the published layout.

    Only the quantizer's part is there; the configuration names the autoencoder.
    """
    config, about = _read_about(_path(workspace, scales))
    state = {f"quantizer.{k}": t for k, t in load_file(_path(workspace, scales)).items()}
    named = untranslate(state, tokenizer_keys(config.phi_sharing))
    half = {name: tensor.half().contiguous() for name, tensor in named.items()}
    card = {
        "config": config.to_original(), "about": about, "data_lock_sha256": LOCK_HASH,
        "autoencoder_sha256": weights_hash(resolve(AUTOENCODER)), "trained_dtype": "float32",
    }  # fmt: skip
    metadata = {key: v if isinstance(v, str) else json.dumps(v) for key, v in card.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(half, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(config.to_original(), indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


def _update(
    quantizer: MultiScaleQuantizer,
    averages: CodeAverages,
    optimizer: torch.optim.Optimizer,
    f_BCHH: Tensor,
) -> float:
    """One step of φ by gradient, and the averages of the codes."""
    loss, total, last = f_BCHH.new_zeros(()), torch.zeros_like(f_BCHH), len(quantizer.scales) - 1
    for scale, (indices_BN, rest, h) in enumerate(quantizer.residuals(f_BCHH, phi_at_last=False)):
        total = total + h
        weight = 1.0 if scale == last else EARLIER_SCALES
        loss = loss + weight * F.mse_loss(total, f_BCHH)
        rows_RC = _rows(quantizer.next_input(rest, scale))
        averages.add(indices_BN.flatten(), rows_RC, 1 / len(quantizer.scales))
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    return float(loss.detach())


def _k_means(rows_RC: Tensor, count: int, generator: Generator, rounds: int) -> Tensor:
    centers = rows_RC[_some(len(rows_RC), count, generator)].clone()
    for _ in range(rounds):
        chosen = _nearest(rows_RC, centers)
        sizes = chosen.bincount(minlength=count).float()
        sums = torch.zeros_like(centers).index_add_(0, chosen, rows_RC)
        spare = rows_RC[_some(len(rows_RC), count, generator)]
        centers = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], spare)
    return centers


def _nearest(rows_RC: Tensor, codes_VC: Tensor) -> Tensor:
    return (codes_VC.square().sum(1) - 2 * rows_RC @ codes_VC.T).argmin(1)


def _rows(tokens_BNC: Tensor) -> Tensor:
    return tokens_BNC.detach().reshape(-1, tokens_BNC.shape[2])


def _some(population: int, count: int, generator: Generator) -> Tensor:
    return torch.randint(population, (count,), generator=generator)


def _held_out_pictures(sprites: SpriteSet, size: int) -> Tensor:
    """The compositions that training never shows, (M, 3, size, size) in [-1, 1]."""
    n, k = (~shown_compositions(sprites)).nonzero().unbind(1)
    small = shrink(sprites_to_float(sprites.pixels_NHW4[n]), size)
    return composite(small, palette_colors(k)).contiguous(memory_format=torch.channels_last)


def _autoencoder() -> DCAE:
    return load_dc_ae(resolve(AUTOENCODER))


def _path(workspace: Workspace, scales: tuple[int, ...]) -> Path:
    return workspace.run / FOLDER / f"tokenizer-{'-'.join(map(str, scales))}.safetensors"


def _read_about(path: Path) -> tuple[HARTTokenizerConfig, dict[str, Any]]:
    if not path.exists():
        raise WeightsError(f"{path} does not exist yet; run the stage 'hart-tokenizer' first")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    about: dict[str, Any] = json.loads(metadata["about"])
    return HARTTokenizerConfig.from_original(json.loads(metadata["config"])), about
