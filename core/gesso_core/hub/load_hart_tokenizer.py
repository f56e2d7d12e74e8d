"""HART's tokenizer from its folder: the configuration, the quantizer and, if it has one, its own
autoencoder. Strict: every key is consumed or known to be dropped, and shapes are compared.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gesso_core.errors import WeightsError
from gesso_core.hub.checkpoint import load_state_dict
from gesso_core.models.hart.autoencoder import HARTAutoencoder
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.keys.hart_tokenizer import tokenizer_keys
from gesso_core.models.keys.translate import translate
from gesso_core.safe_files import read_json

TELLING = "v_patch_nums"  # a setting that only a HART tokenizer has
HITS = "vae.quantize.ema_vocab_hit_SV"


class HARTTokenizer(NamedTuple):
    """The parts of a tokenizer."""

    config: HARTTokenizerConfig
    quantizer: MultiScaleQuantizer  # always in float32
    autoencoder: HARTAutoencoder | None  # None: the latents are those of ``config.autoencoder``


def hart_tokenizer_folder(folder: Path) -> Path | None:
    """Where a HART tokenizer lies: this folder or its ``tokenizer``; None if neither is one."""
    for place in (folder, folder / "tokenizer"):
        config = place / "config.json"
        if config.is_file() and TELLING in read_json(config):
            return place
    return None


def load_hart_tokenizer(
    folder: Path, dtype: torch.dtype = torch.float32, *, variant: str | None = None
) -> HARTTokenizer:
    """A tokenizer in eval mode.

    Args:
        folder: of the tokenizer, or one that holds it as ``tokenizer``.
        dtype: of the autoencoder's parameters; nearest codes are always searched in float32.
        variant: ``"fp16"`` or ``"bf16"`` where a folder has both.

    Raises:
        WeightsError: missing, damaged or foreign weights; another codebook or list of scales than
            the configuration's.
        ConfigError: unknown settings, or values that this code does not compute.
    """
    place = hart_tokenizer_folder(folder)
    if place is None:
        raise WeightsError(
            f"{folder} holds no HART tokenizer: neither its config.json nor that of "
            f"{folder / 'tokenizer'} has {TELLING!r}; give the folder 'tokenizer' of the release"
        )
    config = HARTTokenizerConfig.from_original(read_json(place / "config.json"))
    stored = load_state_dict(place, variant)
    _check_scales(stored, config)
    with torch.device("meta"):
        parts = TokenizerParts(config)
    state = translate(stored, tokenizer_keys(config.phi_sharing), parts.state_dict())
    cast = {
        k: t.to(torch.float32 if k.startswith("quantizer.") else dtype) for k, t in state.items()
    }
    parts.load_state_dict(cast, strict=True, assign=True)
    parts.eval().requires_grad_(False)
    return HARTTokenizer(config, parts.quantizer, parts.autoencoder)


class TokenizerParts(nn.Module):
    """``quantizer`` and, unless the latents are another model's, ``autoencoder``."""

    def __init__(self, config: HARTTokenizerConfig) -> None:
        super().__init__()
        self.quantizer = config.build_quantizer()
        own = config.autoencoder is None
        self.autoencoder: HARTAutoencoder | None = HARTAutoencoder(config) if own else None


def _check_scales(stored: dict[str, Tensor], config: HARTTokenizerConfig) -> None:
    """The hit counts, otherwise unused, tell how many scales and codes there were in training."""
    if HITS not in stored:
        return
    found, wanted = tuple(stored[HITS].shape), (len(config.scales), config.vocabulary)
    if found != wanted:
        raise WeightsError(
            f"the weights count hits of {found[0]} scales and {found[-1]} codes, but config.json "
            f"has {wanted[0]} scales {config.scales} and {wanted[1]} codes; use the config.json "
            "that belongs to these weights"
        )
