"""HART's transformer from its published layout: the folders ``llm`` and ``tokenizer``.

Strict: every key is consumed or named in an error. The attention mask that published files carry,
380 MB at 1024 pixels, is not read; it follows from the scales.
"""

from pathlib import Path
from typing import Final

import torch

from gesso_core.errors import WeightsError
from gesso_core.hub.checkpoint import load_state_dict, weight_files
from gesso_core.hub.load_hart_tokenizer import HARTTokenizer
from gesso_core.models.hart.config import HARTConfig
from gesso_core.models.hart.transformer import HART
from gesso_core.models.keys.hart import HART_BUFFERS, HART_ORIGINAL
from gesso_core.models.keys.translate import translate
from gesso_core.safe_files import read_header, read_json

TRANSFORMER: Final = "llm"
# The averaged weights, converted; the authors draw with these where there are both.
AVERAGED: Final = "ema_model.safetensors"


def hart_weights(folder: Path) -> Path:
    """What holds the weights of the folder ``llm``: a file, or the folder itself."""
    return folder / AVERAGED if (folder / AVERAGED).is_file() else folder


def load_hart_model(
    folder: Path, tokenizer: HARTTokenizer, dtype: torch.dtype = torch.float32
) -> HART:
    """The transformer in eval mode.

    Args:
        folder: the folder ``llm``.
        tokenizer: that of the same release.
        dtype: of the parameters.

    Raises:
        WeightsError: missing, damaged or foreign weights; a tokenizer with other codes or scales.
        ConfigError: unknown settings, or values that this code does not compute.
    """
    config = HARTConfig.from_original(
        read_json(folder / "config.json"),
        vocabulary=tokenizer.config.vocabulary,
        latent_channels=tokenizer.config.channels,
    )
    _check_fit(folder, config, tokenizer)
    with torch.device("meta"):
        model = HART(config)
    stored = load_state_dict(hart_weights(folder), skip=HART_BUFFERS)
    state = translate(stored, HART_ORIGINAL, model.state_dict())
    cast = {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_state_dict(cast, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _check_fit(folder: Path, config: HARTConfig, tokenizer: HARTTokenizer) -> None:
    """Codes, channels and scales of transformer and tokenizer, compared before anything is read."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(hart_weights(folder)).files:
        header = read_header(file)
        shapes |= {name: entry["shape"] for name, entry in header.items() if "shape" in entry}
    of_tokenizer = tokenizer.config
    codes = shapes.get("head.weight", [config.vocabulary])[0]
    channels = shapes.get("word_embed.weight", [0, config.latent_channels])[-1]
    if (codes, channels) != (of_tokenizer.vocabulary, of_tokenizer.channels):
        raise WeightsError(
            f"{folder} predicts {codes} codes of {channels} channels, but the codebook of the "
            f"tokenizer has {of_tokenizer.vocabulary} of {of_tokenizer.channels}; use the two "
            "folders of one release"
        )
    if config.scales != of_tokenizer.scales:
        raise WeightsError(
            f"{folder} draws the scales {list(config.scales)}, but the tokenizer has "
            f"{list(of_tokenizer.scales)}; use the two folders of one release"
        )
