"""The unified vision tower of VILA-U (arXiv 2409.04429, section 3.1).

pixels → SigLIP up to the layer before the last → residual quantizer → codes; the rows of the codes
add up to the features that the language model sees and that the decoder paints from. The last
SigLIP layer, its norm and its pooling head take part in contrastive training only.

Axes: B batch, S picture side, H and W latent grid, h and w code grid, D depth, C feature channels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from gesso_core.errors import InvalidRequest, WeightsError
from gesso_core.models.vila_u.decoder import pixel_decoder
from gesso_core.models.vila_u.residual_quantizer import ResidualQuantizer
from gesso_core.models.vila_u.tower_config import TowerConfig

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class TowerCodes:
    """A batch of pictures as codes, and the features that these stand for."""

    codes_BhwD: Tensor  # int64
    features_BhwC: Tensor  # z_q


class VisionTower(nn.Module):
    """Encoder, quantizer and decoder in one; pictures are (B, 3, S, S) in [-1, 1]."""

    config: TowerConfig
    has_contrastive_branch = True  # false when the weights came without it

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SiglipVisionModel(siglip_vision_config(config))
        self.quantizer = ResidualQuantizer(
            latent_shape=config.latent_shape,
            code_shape=config.code_shape,
            entries=config.codebook_size,
            shared=config.shared_codebook,
            decay=config.decay,
            restart=config.restart_unused_codes,
        )
        self.post_quant = nn.Conv2d(config.latent_shape[2], config.decoder.z_channels, 1)
        self.decoder = pixel_decoder(config.decoder)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))

    def features(self, pixels_B3SS: Tensor) -> Tensor:
        """Output of the encoder's layer before the last, not yet quantized: (B, H, W, C)."""
        self._check_pixels(pixels_B3SS)
        hidden_BNC: Tensor = self.encoder.embeddings(pixels_B3SS)
        for layer in self.encoder.encoder.layers[:-1]:
            hidden_BNC = layer(hidden_BNC, None)
        return hidden_BNC.view(len(hidden_BNC), *self.config.latent_shape)

    def encode(self, pixels_B3SS: Tensor) -> TowerCodes:
        """Codes of pictures, and the features that the codes stand for."""
        quantized = self.quantizer.encode(self.features(pixels_B3SS))
        return TowerCodes(quantized.codes_BhwD, quantized.partial_sums[-1])

    def pooled(self, features_BhwC: Tensor) -> Tensor:
        """One vector per picture for the contrastive loss, (B, C); from quantized features.

        Raises:
            WeightsError: the weights came without this branch.
        """
        if not self.has_contrastive_branch:
            raise WeightsError(
                "these weights were published without the last encoder layer and the pooling head, "
                "so the tower gives codes and features but no vector per picture"
            )
        latent_BHWC = self.quantizer.to_latent_shape(features_BhwC)
        hidden_BNC = self.encoder.encoder.layers[-1](latent_BHWC.flatten(1, 2), None)
        vectors: Tensor = self.encoder.head(self.encoder.post_layernorm(hidden_BNC))
        return vectors

    def embed(self, codes: Tensor) -> Tensor:
        """The sum of the table rows of codes, (..., D) to (..., C); the code K adds nothing."""
        return self.quantizer.embed(codes)

    def embed_partial(self, codes: Tensor) -> Tensor:
        """Sums of the table rows up to each depth, (..., D) to (..., D, C)."""
        return self.quantizer.embed_partial(codes)

    def decode(self, features_BhwC: Tensor) -> Tensor:
        """Pictures of features, (B, 3, height, width), about [-1, 1] and not clamped."""
        z_BCHW = self.quantizer.to_latent_shape(features_BhwC).permute(0, 3, 1, 2).contiguous()
        if self.config.decoder_latent_shape is not None:
            z_BCHW = F.interpolate(z_BCHW, size=self.config.decoder_latent_shape, mode="bilinear")
        picture: Tensor = self.decoder(self.post_quant(z_BCHW))
        return picture

    def _check_pixels(self, pixels_B3SS: Tensor) -> None:
        side = self.config.image_size
        if pixels_B3SS.ndim != 4 or tuple(pixels_B3SS.shape[1:]) != (3, side, side):
            raise InvalidRequest(
                f"pictures of shape {tuple(pixels_B3SS.shape)}; the vision tower sees (batch, 3, "
                f"{side}, {side}), which 'preprocess' makes of any picture",
                field="image",
            )


def siglip_vision_config(config: TowerConfig) -> SiglipVisionConfig:
    """The encoder's sizes for transformers."""
    sizes = config.encoder
    return SiglipVisionConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        num_channels=sizes.num_channels,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=LAYER_NORM_EPS,
        attention_dropout=0.0,
    )


def preprocess(pixels_HW3: npt.NDArray[np.uint8], side: int) -> Tensor:
    """A picture of any size as the tower sees it: (3, side, side) in [-1, 1].

    Resized to the square by a bicubic filter; the aspect ratio is not kept.

    Raises:
        InvalidRequest: not an RGB picture of 8 bits.
    """
    if pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3 or pixels_HW3.dtype != np.uint8:
        raise InvalidRequest(
            f"a picture of shape {pixels_HW3.shape} and type {pixels_HW3.dtype}; send RGB, "
            "(height, width, 3), with 8 bits per channel",
            field="image",
        )
    picture = Image.fromarray(np.ascontiguousarray(pixels_HW3))
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
