"""What an autoencoder service can host: every network that turns pictures into latents and back.

All of them take and give signals in [-1, 1] of shape (B, 3, H, W) and latents (B, C, h, w), not
scaled by anything. What differs is said by three numbers.
"""

# B batch   C latent channels   h, w latent grid   H, W pixels

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from gesso_core.errors import WeightsError
from gesso_core.hub import load_dc_ae
from gesso_core.hub.load_hart_tokenizer import hart_tokenizer_folder, load_hart_tokenizer
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_fused import fuse_for_inference
from gesso_core.models.dc_ae_tiling import decode_safely, encode_safely
from gesso_core.models.hart.autoencoder import HARTAutoencoder

if TYPE_CHECKING:  # transformers takes seconds to import, and a DC-AE needs none of it
    from gesso_core.models.vila_u.vision_tower import VisionTower


class PixelCodec(Protocol):
    """A network between pictures and latents."""

    @property
    def model(self) -> nn.Module:
        """The network, in eval mode."""
        ...

    @property
    def channels(self) -> int:
        """C."""
        ...

    @property
    def compression(self) -> int:
        """Pixels per side of a latent cell."""
        ...

    @property
    def only_side(self) -> int | None:
        """Pixels along a side of the only (square) picture that it encodes; None for any size."""
        ...

    @property
    def only_grid(self) -> tuple[int, int] | None:
        """The only (h, w) that it decodes; None for any."""
        ...

    def encode(self, x_1CHW: Tensor) -> Tensor:
        """A picture of whole cells to its latent."""
        ...

    def decode(self, latent_1CHW: Tensor) -> Tensor:
        """A latent to its picture, not clamped."""
        ...


class DcAeCodec:
    """A DC-AE, of pictures of any size; large ones in tiles where memory is short."""

    only_side: int | None = None
    only_grid: tuple[int, int] | None = None

    def __init__(self, model: DCAE) -> None:
        self.model = fuse_for_inference(model)
        self.channels = model.config.latent_channels
        self.compression = model.config.spatial_compression_ratio

    def encode(self, x_1CHW: Tensor) -> Tensor:
        """A picture of whole cells to its latent."""
        return encode_safely(self.model, x_1CHW)

    def decode(self, latent_1CHW: Tensor) -> Tensor:
        """A latent to its picture, not clamped."""
        return decode_safely(self.model, latent_1CHW)


class HartCodec:
    """The autoencoder of HART's tokenizer; its latents are f, before quantization.

    It attends over all cells of a picture, so that a picture is never cut into tiles.
    """

    only_side: int | None = None
    only_grid: tuple[int, int] | None = None

    def __init__(self, model: HARTAutoencoder) -> None:
        self.model = model
        self.channels = model.config.latent_channels
        self.compression = model.config.spatial_compression_ratio

    def encode(self, x_1CHW: Tensor) -> Tensor:
        """A picture of whole cells to f."""
        return self.model.encode(x_1CHW)

    def decode(self, latent_1CHW: Tensor) -> Tensor:
        """A sum of codes, with or without residual, to its picture."""
        return self.model.reconstruct(latent_1CHW)


class TowerCodec:
    """The vision tower of a VILA-U; its latents are the sums of the code rows, z_q."""

    def __init__(self, model: "VisionTower") -> None:
        config = model.config
        self.model = model
        self.channels = config.width
        self.only_side: int | None = config.image_size
        self.only_grid: tuple[int, int] | None = config.grid
        self.compression = max(1, config.image_size // config.grid[0])

    def encode(self, x_1CHW: Tensor) -> Tensor:
        """A picture of the tower's size to the features that its codes stand for."""
        return self.model.encode(x_1CHW).features_BhwC.permute(0, 3, 1, 2)

    def decode(self, latent_1CHW: Tensor) -> Tensor:
        """Features to their picture, not clamped."""
        return self.model.decode(latent_1CHW.permute(0, 2, 3, 1))


def load_codec(folder: Path, *, dtype: torch.dtype, device: str) -> PixelCodec:
    """The network in a folder, by what the folder holds.

    Raises:
        WeightsError: missing, damaged or foreign weights.
    """
    if (folder / "vision_tower").is_dir():
        return _tower(folder, dtype, device)
    if hart_tokenizer_folder(folder) is not None:
        tokenizer = load_hart_tokenizer(folder, dtype)
        if tokenizer.autoencoder is None:
            raise WeightsError(
                f"{folder} draws latents of {tokenizer.config.autoencoder}, which decodes them; "
                "serve that one"
            )
        return HartCodec(tokenizer.autoencoder.to(device))
    return DcAeCodec(load_dc_ae(folder, dtype).to(device))


def _tower(folder: Path, dtype: torch.dtype, device: str) -> TowerCodec:
    from gesso_core.hub.load_vila_u_tower import load_vila_u_tower

    return TowerCodec(load_vila_u_tower(folder, dtype).to(device))
