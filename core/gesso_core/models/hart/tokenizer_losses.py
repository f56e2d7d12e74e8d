"""Training the full-size tokenizer (arXiv 2410.10812, section 3.1): alternating decode and losses.

Half of the batches decode the sum of the codes, the other half that sum plus the true residual, so
that one decoder serves both. In the hybrid stage only the decoder's side learns. What the paper
adds (a perceptual term) needs weights that were never released; the adversarial term needs none.
"""

# B batch   C channels   H height   W width   h, w size of the discriminator's answer

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gesso_core.models.hart.autoencoder import HARTAutoencoder
from gesso_core.models.hart.quantizer import MultiScaleQuantizer


class TokenizerPass(NamedTuple):
    """One training forward."""

    picture_BCHW: Tensor  # not clamped
    vq_loss: Tensor
    discrete: bool  # whether the decoder saw the codes only


class TokenizerLosses(NamedTuple):
    """The terms of the loss, and their weighted sum."""

    pixels: Tensor
    vq: Tensor
    adversarial: Tensor
    total: Tensor


def draw_branch(generator: Generator, discrete_share: float = 0.5) -> bool:
    """Whether the next batch decodes the codes only; one uniform draw."""
    return bool(torch.rand((), generator=generator) < discrete_share)


def tokenizer_pass(
    autoencoder: HARTAutoencoder,
    quantizer: MultiScaleQuantizer,
    x_BCHW: Tensor,
    *,
    discrete: bool,
) -> TokenizerPass:
    """Encode, quantize with straight-through gradients, decode.

    Args:
        autoencoder: encoder and decoder.
        quantizer: of latents of this size.
        x_BCHW: pictures in [-1, 1].
        discrete: decode the sum of the codes; otherwise add what they leave over.
    """
    quantized = quantizer.quantize(autoencoder.encode(x_BCHW), discrete=discrete)
    latent_BCHW = quantized.latent_BCHW.to(x_BCHW.dtype)
    return TokenizerPass(autoencoder.reconstruct(latent_BCHW), quantized.vq_loss, discrete)


def freeze_for_hybrid(autoencoder: HARTAutoencoder, quantizer: MultiScaleQuantizer) -> None:
    """Let only the decoder's side learn, as the hybrid stage does."""
    quantizer.requires_grad_(False)
    autoencoder.encoder.requires_grad_(False)
    autoencoder.quant_conv.requires_grad_(False)


def tokenizer_losses(
    done: TokenizerPass,
    x_BCHW: Tensor,
    *,
    vq_weight: float = 1.0,
    verdict_B1hw: Tensor | None = None,
    adversarial_weight: float = 0.0,
) -> TokenizerLosses:
    """Mean square error in pixels, VQ loss, and the generator's side of a hinge loss.

    Args:
        done: the training forward.
        x_BCHW: the pictures it was given.
        vq_weight: of the VQ loss.
        verdict_B1hw: what the discriminator says about the reconstruction; None leaves it out.
        adversarial_weight: of the generator's loss.
    """
    pixels = F.mse_loss(done.picture_BCHW, x_BCHW)
    adversarial = pixels.new_zeros(()) if verdict_B1hw is None else -verdict_B1hw.mean()
    total = pixels + vq_weight * done.vq_loss + adversarial_weight * adversarial
    return TokenizerLosses(pixels, done.vq_loss, adversarial, total)


def discriminator_loss(real_B1hw: Tensor, fake_B1hw: Tensor) -> Tensor:
    """Hinge loss of the discriminator on its verdicts."""
    return 0.5 * (F.relu(1 - real_B1hw).mean() + F.relu(1 + fake_B1hw).mean())


class PatchDiscriminator(nn.Module):
    """Three strided convolutions and two more: a verdict for every patch (arXiv 1611.07004)."""

    def __init__(self, image_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**index, 8) for index in range(layers + 1)]
        blocks: list[nn.Module] = [
            nn.Conv2d(image_channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for index in range(1, layers + 1):
            stride = 2 if index < layers else 1
            # The normalisation behind it has a bias of its own.
            conv = nn.Conv2d(
                widths[index - 1], widths[index], 4, stride=stride, padding=1, bias=False
            )
            blocks += [conv, nn.BatchNorm2d(widths[index]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 1, h, w]."""
        verdict_B1hw: Tensor = self.main(x_BCHW)
        return verdict_B1hw
