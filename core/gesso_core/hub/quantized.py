"""A quantized Sana from its folder: ``config.json`` beside ``gesso_quantized.safetensors``.

The model is built on the meta device; quantized layers take the place of the linear ones, and every
tensor of the file must find its place: names, shapes and sizes are compared.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gesso_kernels.errors import UnsupportedMode
from gesso_kernels.modes import Budget, Mode, choose_mode
from torch import Tensor, nn

from gesso_core.errors import ConfigError, WeightsError
from gesso_core.hub.checkpoint import trained_dtype
from gesso_core.hub.load import UNSAFE_SANA, sana_config
from gesso_core.models.sana import Sana
from gesso_core.models.sana_config import SanaConfig
from gesso_core.quant.canonical import CANONICAL_FILE, read_canonical
from gesso_core.quant.device_layouts import layer_mode
from gesso_core.quant.layer_map import matrix_of
from gesso_core.quant.modules import SVDQuantLinear
from gesso_core.quant.record import QuantizedLinear, WeightFormat

# A guided picture is two rows of the network.
_GUIDED = 2


def load_quantized_sana(
    folder: Path,
    *,
    mode: Mode | None = None,
    budget: Budget = "8bit",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Sana:
    """A Sana in eval mode whose layers compute from quantized weights.

    Args:
        folder: holds ``config.json`` and the canonical file.
        mode: how the layers compute; by default the best for the device, the size of the model's
            pictures and ``budget``, and on a CPU ``"dequantized"``.
        budget: ``"4bit"`` keeps weights in 4 bit where an 8-bit copy would be faster.
        dtype: of everything else; by default what the model was trained for, float32 on a CPU.

    Raises:
        WeightsError: a file that is truncated, of another version, or of another model.
        ConfigError: a mode that the device or the format does not have; names the best one.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else trained_dtype(folder)
    _check_dtype(folder, dtype)
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{folder} has no config.json beside {CANONICAL_FILE}; put that of the 16-bit model "
            "there, which it was made from"
        )
    config = sana_config(folder)
    with torch.device("meta"):
        model = Sana(config)
    content = read_canonical(folder / CANONICAL_FILE)
    plain, layers = content.plain, dict(content.layers)
    del content  # a record is let go once its layer has what it needs of it
    try:
        for name in list(layers):
            record = layers.pop(name)
            chosen = choose(record.weight, mode, budget, device, config)
            _put_layer(model, name, record, chosen, device, dtype)
    except UnsupportedMode as error:
        raise ConfigError(f"{folder}: {error}", field="mode") from error
    _fill_plain(model, plain, folder, device, dtype)
    return model.eval().requires_grad_(False)


def choose(
    weight: WeightFormat,
    wanted: Mode | None,
    budget: Budget,
    device: torch.device,
    config: SanaConfig,
) -> Mode:
    """The mode of layers with such weights on ``device``; raises `UnsupportedMode`."""
    arch = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    tokens = _GUIDED * (config.sample_size // config.patch_size) ** 2
    return choose_mode(weight, arch=arch, tokens=tokens, budget=budget, wanted=wanted)


@dataclass(frozen=True, kw_only=True)
class QuantizedSummary:
    """What a loaded model keeps in memory.

    Attributes:
        weight: number formats of the quantized weights, ``"int4"`` or ``"int4+int8"``.
        rank: of the low-rank branches; the largest.
        layers: quantized layers per mode.
        weight_bytes: all parameters and buffers.
        dense_bytes: the same model in 16 bit.
    """

    weight: str
    rank: int
    layers: Mapping[Mode, int]
    weight_bytes: int
    dense_bytes: int

    @property
    def ratio(self) -> float:
        """Memory as a share of the 16-bit model's."""
        return self.weight_bytes / self.dense_bytes

    @property
    def mode(self) -> Mode:
        """What most layers run in."""
        return max(self.layers, key=lambda mode: self.layers[mode])

    def __str__(self) -> str:
        """``svdquant-int4-r32 (w8a8_int8)``, as provenance has it."""
        return f"svdquant-{self.weight}-r{self.rank} ({self.mode})"


def quantized_summary(model: nn.Module) -> QuantizedSummary | None:
    """Formats, modes and memory of a model; None if no layer is quantized."""
    layers = [module for module in model.modules() if isinstance(module, SVDQuantLinear)]
    if not layers:
        return None
    dense = sum(2 * tensor.numel() for tensor in _tensors(model))
    for layer in layers:
        dense += layer.dense_nbytes - sum(2 * buffer.numel() for buffer in layer.buffers())
    return QuantizedSummary(
        weight="+".join(sorted({str(layer.record_facts["weight"]) for layer in layers})),
        rank=max(layer.rank for layer in layers),
        layers=Counter(layer.mode for layer in layers),
        weight_bytes=weight_bytes(model),
        dense_bytes=dense,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in _tensors(model))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _check_dtype(folder: Path, asked: torch.dtype) -> None:
    trained = trained_dtype(folder)
    if reason := UNSAFE_SANA.get((trained, asked)):
        names = [str(dtype).removeprefix("torch.") for dtype in (trained, asked)]
        raise WeightsError(
            f"{folder} was trained for {names[0]} and cannot be used in {names[1]}: {reason}; "
            f"load it in {names[0]} or float32",
            field="dtype",
        )


def _put_layer(
    model: nn.Module,
    name: str,
    record: QuantizedLinear,
    mode: Mode,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        weight, bias = matrix_of(parent.get_submodule(child), name)
    except (AttributeError, ConfigError) as error:
        raise WeightsError(
            f"the file quantizes {name}, which is no linear layer of this {type(model).__name__}; "
            "config.json and the file belong to different models"
        ) from error
    _require_fit(name, record, weight, bias)
    mode = layer_mode(record, mode)
    layer = SVDQuantLinear.from_record(record, mode, name=name, device=device, dtype=dtype)
    setattr(parent, child, layer)


def _require_fit(name: str, record: QuantizedLinear, weight: Tensor, bias: Tensor | None) -> None:
    found = (record.out_features, record.in_features)
    if found != tuple(weight.shape):
        raise WeightsError(
            f"{name} has {found[0]} rows of {found[1]} columns in the file, but the model has "
            f"{weight.shape[0]} of {weight.shape[1]}; config.json and the file belong to "
            "different models"
        )
    # The shift of a layer's input is repaired in the bias, so such a layer always has one.
    if (record.bias is None) != (bias is None and record.shift == 0):
        state = "lacks its bias" if record.bias is None else "has a bias that the model has not"
        raise WeightsError(f"{name} {state}; quantize the model again")


def _fill_plain(
    model: Sana,
    plain: Mapping[str, Tensor],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Assign every tensor that was not quantized; what is left over or missing is an error."""
    quantized = {name for name, m in model.named_modules() if isinstance(m, SVDQuantLinear)}
    expected = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if key.rpartition(".")[0] not in quantized
    }
    _compare(plain, expected, folder)
    state: dict[str, Any] = {
        key: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for key, tensor in plain.items()
    }
    model.load_state_dict(state, strict=False, assign=True)


def _compare(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "not in the model": sorted(given.keys() - expected.keys()),
        "mis-shaped": [
            f"{key} {list(given[key].shape)}, expected {list(tensor.shape)}"
            for key, tensor in sorted(expected.items())
            if key in given and given[key].shape != tensor.shape
        ],
        "no real numbers": [
            f"{key} is {given[key].dtype}"
            for key, tensor in sorted(expected.items())
            if key in given and given[key].is_floating_point() != tensor.is_floating_point()
        ],
    }
    lines = [f"  {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if lines:
        raise WeightsError(
            f"{folder / CANONICAL_FILE} does not fit the model of config.json:\n"
            + "\n".join(lines)
            + "\nQuantize the model again, or use the config.json that came with the file."
        )
