"""Models from folders: read the config, build on the meta device, assign the checkpoint, cast.

Strict: every key is consumed or named in an error, shapes are compared, and a number format other
than the one that the weights were trained for is refused unless it is known to be harmless.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from gesso_core.errors import ConfigError, WeightsError
from gesso_core.hub.checkpoint import (
    file_metadata,
    load_state_dict,
    trained_dtype,
    weight_files,
)
from gesso_core.hub.manifest import weights_hash
from gesso_core.models.dc_ae import DCAE
from gesso_core.models.dc_ae_config import DCAEConfig
from gesso_core.models.dc_ae_variants import DC_AE_CONFIGS
from gesso_core.models.keys.dc_ae import translate_dc_ae
from gesso_core.models.keys.sana import sana_keys
from gesso_core.models.keys.translate import translate
from gesso_core.models.sana import Sana
from gesso_core.models.sana_config import SanaConfig
from gesso_core.safe_files import read_json

Model = TypeVar("Model", bound=nn.Module)

# (trained for, asked for): what goes wrong.
UNSAFE_SANA: Final = {
    (
        torch.float16,
        torch.bfloat16,
    ): "bfloat16 drops digits that weights trained in float16 rely on",
    (torch.bfloat16, torch.float16): "activations of weights trained in bfloat16 overflow float16",
}
UNSAFE_DC_AE: Final = {
    (trained, torch.float16): "activations of this autoencoder overflow float16"
    for trained in (torch.float32, torch.bfloat16)
}


def load_dc_ae(
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    config: DCAEConfig | None = None,
    allow_any_dtype: bool = False,
) -> DCAE:
    """A DC-AE in eval mode, from either checkpoint layout.

    Args:
        path: a model folder, a pipeline folder with ``vae``, or one safetensors file.
        dtype: of the parameters.
        variant: ``"fp16"`` or ``"bf16"`` where a folder has both.
        config: for files without a ``config.json``; see ``DC_AE_CONFIGS``.
        allow_any_dtype: load even where the number format is known to give broken pictures.

    Raises:
        WeightsError: missing, damaged or foreign weights; a refused number format.
        ConfigError: the configuration contradicts itself or is unknown.
    """
    path = _part(path, "vae")
    if not allow_any_dtype:
        _check_dtype(path, variant, dtype, UNSAFE_DC_AE)
    config = config or dc_ae_config(path)
    with torch.device("meta"):
        model = DCAE(config)
    state = translate_dc_ae(load_state_dict(path, variant), config, model.state_dict())
    return _filled(model, state, dtype)


def load_sana(
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    config: SanaConfig | None = None,
    allow_any_dtype: bool = False,
) -> Sana:
    """A Sana in eval mode, from either checkpoint layout; arguments as for `load_dc_ae`.

    Args:
        path: a model folder, a pipeline folder with ``transformer``, or one safetensors file.
        config: for files without a ``config.json``; see ``SANA_CONFIGS``.
    """
    path = _part(path, "transformer")
    if not allow_any_dtype:
        _check_dtype(path, variant, dtype, UNSAFE_SANA)
    config = config or sana_config(path)
    with torch.device("meta"):
        model = Sana(config)
    stored = load_state_dict(path, variant)
    state = translate(stored, sana_keys(stored), model.state_dict())
    return _filled(model, state, dtype)


def sana_config(path: Path) -> SanaConfig:
    """The configuration in a Sana folder."""
    return SanaConfig.from_diffusers(_config(path, "SanaTransformer2DModel", "SANA_CONFIGS"))


def dc_ae_config(path: Path) -> DCAEConfig:
    """The configuration in a DC-AE folder; the authors' files only name the model."""
    values = _config(path, "AutoencoderDC", "DC_AE_CONFIGS")
    if "_class_name" in values:
        return DCAEConfig.from_diffusers(values)
    names = [v for v in values.values() if isinstance(v, str) and v in DC_AE_CONFIGS]
    if len(names) != 1:
        raise ConfigError(
            f"{path / 'config.json'} neither describes an AutoencoderDC nor names one of "
            f"{', '.join(DC_AE_CONFIGS)}; pass config=DC_AE_CONFIGS[…]"
        )
    return DC_AE_CONFIGS[names[0]]


def require_its_autoencoder(transformer: Path, autoencoder: Path) -> None:
    """Refuse a denoiser that was trained on the latents of another autoencoder.

    The denoiser's file states ``autoencoder_sha256`` in its metadata, a quantized one in its
    account of how it was made; without it all is allowed.
    """
    file = weight_files(_part(transformer, "transformer")).files[0]
    expected = str(file_metadata(file).get("autoencoder_sha256") or "")
    found = weights_hash(_part(autoencoder, "vae")) if expected else ""
    if expected != found:
        raise WeightsError(
            f"{transformer} was trained with the autoencoder {expected[:12]}…, but {autoencoder} "
            f"is {found[:12]}…; use the two folders of one release"
        )


def _part(path: Path, name: str) -> Path:
    return path / name if (path / name).is_dir() else path


def _config(path: Path, class_name: str, table: str) -> dict[str, Any]:
    if path.is_file() or (path.is_dir() and not (path / "config.json").exists()):
        raise WeightsError(
            f"{path} comes without a config.json; say which model it is: config={table}[…]"
        )
    values = read_json(path / "config.json")
    if values.get("_class_name", class_name) != class_name:
        raise ConfigError(
            f"{path} holds a {values['_class_name']}, expected {class_name}; give the right folder"
        )
    return values


def _check_dtype(
    path: Path,
    variant: str | None,
    asked: torch.dtype,
    unsafe: Mapping[tuple[torch.dtype, torch.dtype], str],
) -> None:
    trained = trained_dtype(path, variant)
    if reason := unsafe.get((trained, asked)):
        names = [str(d).removeprefix("torch.") for d in (trained, asked)]
        raise WeightsError(
            f"{path} was trained for {names[0]} and cannot be used in {names[1]}: {reason}; "
            f"load it in {names[0]} or float32, or pass allow_any_dtype=True to try",
            field="dtype",
        )


def _filled(model: Model, state: dict[str, Tensor], dtype: torch.dtype) -> Model:
    """Assign a translated state; batch counters, which a file may leave out, start at zero."""
    counters = model.state_dict().keys() - state.keys()
    state |= {key: torch.zeros((), dtype=torch.long) for key in counters}
    cast = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    model.load_state_dict(cast, strict=True, assign=True)
    return model.eval().requires_grad_(False)
