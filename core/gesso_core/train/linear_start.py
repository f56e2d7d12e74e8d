"""Start a DC-AE as the best linear code of its training pictures.

The published graph is linear once its residual branches are silent, except for the last norm. So
the branches start at zero (their norms' weights), every downsampling convolution keeps the leading
principal components, and every other convolution outside the branches is fitted by least squares
to the patches that it should pass on. Training then starts near the quality of a linear code
instead of spending most of a small budget on reaching it. The graph itself is not changed.
"""

# B batch   C channels   H height   W width   M rows of a regression   K columns of a regression

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.errors import ConfigError
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_blocks import Downsample, RMSNorm2d, Upsample, channel_duplicate

RIDGE = 1e-4
CONSTANT = 1.5  # value of the channels that hold the last norm steady


@torch.no_grad()
def start_linear(model: DCAE, pictures_BCHW: Tensor) -> None:
    """Set the weights of ``model`` in place from pictures in [-1, 1].

    Raises:
        ConfigError: the model has full-resolution stages, which this start does not cover.
    """
    if not isinstance(model.encoder.project_in, Downsample):
        raise ConfigError("the linear start needs an encoder whose first stage is empty")
    silence_branches(model)
    codes = _start_encoder(model, pictures_BCHW)
    _start_decoder(model, pictures_BCHW, codes)


def silence_branches(model: nn.Module) -> None:
    """Zero the norm weight of every residual branch, so that each block starts as the identity."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm2d) and not name.endswith("norm_out"):
            nn.init.zeros_(module.weight)


def _start_encoder(model: DCAE, pictures_BCHW: Tensor) -> Tensor:
    encoder = model.encoder
    assert isinstance(encoder.project_in, Downsample)
    first = encoder.project_in.conv
    first.weight[:3] = 0
    first.weight[range(3), range(3), 1, 1] = 1
    first.bias[:3] = 0  # type: ignore[index]
    x = encoder.project_in(pictures_BCHW)
    for stage in encoder.stages:
        for block in stage:  # type: ignore[attr-defined]
            if isinstance(block, Downsample):
                _keep_components(block.conv, x)
            x = block(x)
    ratio = model.config.spatial_compression_ratio
    target = _principal_codes(F.pixel_unshuffle(pictures_BCHW, ratio), encoder.latent_channels)
    if encoder.shortcut:
        encoder.project_out.weight.zero_()
        nn.init.zeros_(encoder.project_out.bias)  # type: ignore[arg-type]
        shortcut = x.unflatten(1, (encoder.latent_channels, -1)).mean(dim=2)
        target = target - shortcut
    _fit(encoder.project_out, x, target)
    return torch.as_tensor(model.encode(pictures_BCHW))


def _start_decoder(model: DCAE, pictures_BCHW: Tensor, x: Tensor) -> None:
    decoder = model.decoder
    nn.init.normal_(decoder.project_in.weight, std=1e-3)
    nn.init.zeros_(decoder.project_in.bias)  # type: ignore[arg-type]
    x = decoder.project_in(x) + (channel_duplicate(x, decoder.width, 1) if decoder.shortcut else 0)
    factor = model.config.spatial_compression_ratio
    for stage in reversed(decoder.stages):
        for block in stage:  # type: ignore[attr-defined]
            if isinstance(block, Upsample):
                factor //= 2
                _fit_upsample(block, x, _patch_target(pictures_BCHW, factor, block.out_channels))
            x = block(x)
    decoder.norm_out.weight.fill_(float(x.square().mean().sqrt()))
    nn.init.zeros_(decoder.norm_out.bias)
    x = decoder.activation(decoder.norm_out(x))
    assert isinstance(decoder.project_out, Upsample)
    _fit_upsample(decoder.project_out, x, pictures_BCHW)


def _patch_target(pictures_BCHW: Tensor, factor: int, channels: int) -> Tensor:
    """What the features at one level should hold: patch components; signed pairs at the finest."""
    patches = F.pixel_unshuffle(pictures_BCHW, factor)
    count = patches.shape[1]
    if 2 * count <= channels:
        steady = patches.new_full((1,), CONSTANT).expand(
            patches.shape[0], channels - 2 * count, *patches.shape[2:]
        )
        return torch.cat([patches, -patches, steady], dim=1)
    codes = _principal_codes(patches, min(channels, count))
    return F.pad(codes, (0, 0, 0, 0, 0, channels - codes.shape[1]))


def _principal_codes(x_BCHW: Tensor, count: int) -> Tensor:
    """Leading principal components, scaled by the geometric mean of their own and the mean std."""
    mean, vectors = _components(x_BCHW, count)
    centered = x_BCHW - mean[None, :, None, None]
    codes = torch.einsum("bchw,ck->bkhw", centered, vectors)
    std = codes.std(dim=(0, 2, 3))
    return codes / (std * std.mean()).sqrt()[None, :, None, None].clamp(min=1e-4)


def _components(x_BCHW: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows_MK = x_BCHW.movedim(1, -1).flatten(0, 2)
    mean = rows_MK.mean(dim=0)
    _, vectors = torch.linalg.eigh((rows_MK - mean).T @ (rows_MK - mean))
    return mean, vectors.flip(1)[:, :count]


def _keep_components(conv: nn.Conv2d, x_BCHW: Tensor) -> None:
    mean, vectors = _components(x_BCHW, conv.out_channels)
    conv.weight.zero_()
    conv.weight[:, :, 1, 1] = vectors.T
    conv.bias.copy_(-vectors.T @ mean)  # type: ignore[union-attr]


def _fit_upsample(block: Upsample, x_BCHW: Tensor, target_BCHW: Tensor) -> None:
    if block.shortcut:
        target_BCHW = target_BCHW - channel_duplicate(x_BCHW, block.out_channels, 2)
    _fit(block.conv, x_BCHW, F.pixel_unshuffle(target_BCHW, 2))


def _fit(conv: nn.Conv2d, x_BCHW: Tensor, target_BCHW: Tensor) -> None:
    """Ridge regression of a 3x3 convolution with bias."""
    rows_MK = F.unfold(x_BCHW, 3, padding=1).movedim(1, -1).flatten(0, 1)
    rows_MK = F.pad(rows_MK, (0, 1), value=1.0)
    goals_MC = target_BCHW.flatten(2).movedim(1, -1).flatten(0, 1)
    gram = rows_MK.T @ rows_MK
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-6)
    solution = torch.linalg.solve(gram, rows_MK.T @ goals_MC)
    conv.weight.copy_(solution[:-1].T.reshape(conv.weight.shape))
    conv.bias.copy_(solution[-1])  # type: ignore[union-attr]
