"""Pixels to latent and back, through a DC-AE or another network, for pictures of any size.

Latents in here are unscaled; the scaling factor is a matter of the diffusion model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso_core.errors import InvalidRequest, NumericalError
from gesso_core.hub import DEFAULT_STORE, resolve
from gesso_core.metrics import psnr, ssim
from gesso_core.pipelines.memory import explained
from gesso_core.pipelines.pictures import MAX_PIXELS, Pixels, stretched
from gesso_core.pipelines.pixel_codecs import PixelCodec, load_codec
from gesso_core.sampling.aspect_ratio import resize_and_crop

SMALLEST_SSIM_SIDE = 11  # the window of the metric


@dataclass(frozen=True)
class Reconstruction:
    """A picture after encoder and decoder, and how close it came."""

    pixels_HWC: Pixels
    psnr_db: float
    ssim: float


class Autoencoder:
    """Takes and gives pixels. Raises NumericalError instead of giving NaN pictures."""

    def __init__(self, name: str, codec: PixelCodec) -> None:
        self.name = name
        self.codec = codec

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        store: Path = DEFAULT_STORE,
    ) -> Self:
        """A model by its registry name, or from a folder."""
        codec = load_codec(resolve(name_or_folder, store=store), dtype=dtype, device=device)
        name = name_or_folder.name if isinstance(name_or_folder, Path) else name_or_folder
        return cls(name, codec)

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.codec.model

    @property
    def compression(self) -> int:
        """Pixels per side of a latent cell."""
        return self.codec.compression

    @torch.inference_mode()
    def encode(self, pixels_HWC: Pixels) -> Tensor:
        """The latent (C, h, w), fp32, on the CPU.

        The picture is continued to whole cells, or, where the network knows only one size,
        stretched to that.
        """
        x_1CHW = self._whole_cells(self._signal(self._fitted(pixels_HWC))).to(self._weight.dtype)
        x_1CHW = x_1CHW.contiguous(memory_format=torch.channels_last)
        with explained("encoding this picture", "send a smaller one"):
            latent_1CHW = self.codec.encode(x_1CHW)
        return self._finite(latent_1CHW, "latent")[0].float().cpu()

    @torch.inference_mode()
    def decode(
        self, latent_CHW: Tensor, height: int | None = None, width: int | None = None
    ) -> Pixels:
        """The picture of a latent; with ``height`` and ``width`` scaled to cover that size and cut.

        Raises InvalidRequest for a latent of another shape, or a picture over the pixel limit.
        """
        self._check_latent(latent_CHW)
        return to_pixels(self._sized(self._decoded(latent_CHW[None]), height, width)[0])

    @torch.inference_mode()
    def reconstruct(self, pixels_HWC: Pixels) -> Reconstruction:
        """Encode and decode; PSNR in dB and SSIM against the picture, after rounding to 8 bits."""
        height, width = pixels_HWC.shape[:2]
        if min(height, width) < SMALLEST_SSIM_SIDE:
            raise InvalidRequest(
                f"a picture of {width}x{height} is too small to measure; "
                f"both sides need at least {SMALLEST_SSIM_SIDE} pixels",
                field="image",
            )
        pixels_HWC = self._fitted(pixels_HWC)
        height, width = pixels_HWC.shape[:2]
        pixels = to_pixels(self._decoded(self.encode(pixels_HWC)[None])[0, :, :height, :width])
        pair = self._signal(pixels), self._signal(pixels_HWC)
        return Reconstruction(pixels, float(psnr(*pair)), min(1.0, float(ssim(*pair))))

    def _fitted(self, pixels_HWC: Pixels) -> Pixels:
        side = self.codec.only_side
        return pixels_HWC if side is None else stretched(pixels_HWC, side, side)

    @property
    def _weight(self) -> Tensor:
        return next(self.model.parameters())

    def _signal(self, pixels_HWC: Pixels) -> Tensor:
        """[0, 255] to [-1, 1], (1, C, H, W), fp32, on the device of the model."""
        x_HWC = torch.tensor(pixels_HWC).to(self._weight.device)
        return (x_HWC / 127.5 - 1).permute(2, 0, 1)[None]

    def _whole_cells(self, x_1CHW: Tensor) -> Tensor:
        bottom, right = (-side % self.compression for side in x_1CHW.shape[-2:])
        return F.pad(x_1CHW, (0, right, 0, bottom), mode="replicate") if bottom or right else x_1CHW

    def _decoded(self, latent_1CHW: Tensor) -> Tensor:
        latent_1CHW = latent_1CHW.to(self._weight.device, self._weight.dtype)
        with explained("decoding this latent", "ask for a smaller picture"):
            image_1CHW = self.codec.decode(latent_1CHW)
        return self._finite(image_1CHW, "picture").float().clamp(-1, 1)

    def _sized(self, image_1CHW: Tensor, height: int | None, width: int | None) -> Tensor:
        given_height, given_width = image_1CHW.shape[-2:]
        return resize_and_crop(image_1CHW, height or given_height, width or given_width)

    def _finite(self, tensor: Tensor, what: str) -> Tensor:
        if not bool(tensor.isfinite().all()):
            raise NumericalError(
                f"{self.name} made a {what} with NaN or infinite values; it should run in float32 "
                "or bfloat16"
            )
        return tensor

    def _check_latent(self, latent_CHW: Tensor) -> None:
        channels, shape = self.codec.channels, tuple(latent_CHW.shape)
        grid = self.codec.only_grid or shape[1:]
        if latent_CHW.ndim != 3 or shape[0] != channels or shape[1:] != grid or 0 in shape:
            height, width = self.codec.only_grid or ("height", "width")
            raise InvalidRequest(
                f"a latent of shape {shape}; {self.name} decodes ({channels}, {height}, {width})",
                field="latent",
            )
        if not latent_CHW.is_floating_point() or not bool(latent_CHW.isfinite().all()):
            raise InvalidRequest(
                f"a latent of type {str(latent_CHW.dtype).removeprefix('torch.')} or with NaN; "
                "send finite floating-point numbers",
                field="latent",
            )
        height, width = shape[1] * self.compression, shape[2] * self.compression
        if height * width > MAX_PIXELS:
            raise InvalidRequest(
                f"a latent for {width}x{height} pixels; at most {MAX_PIXELS:,} pixels are decoded",
                field="latent",
            )


def to_pixels(image_CHW: Tensor) -> Pixels:
    """[-1, 1] to uint8 (H, W, C), rounded to the nearest."""
    scaled = (image_CHW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels: Pixels = scaled.permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels
