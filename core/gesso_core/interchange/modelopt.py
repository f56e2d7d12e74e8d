"""Import of NVIDIA ModelOpt checkpoints with NVFP4 weights, SVDQuant ("NVFP4_SVD") or plain.

A folder with ``config.json`` (``quantization_config.quant_method: modelopt``) or
``hf_quant_config.json`` beside safetensors. Per layer ``<m>``:

    weight            uint8 [N, K/2]     e2m1 codes, the even column in the low nibble
    weight_scale      e4m3 [N, K/16]     scales of groups of 16
    weight_scale_2    fp32, one value    amax of the weight / (6·448)
    pre_quant_scale   [K]                multiplied into the input: our 1/λ
    svdquant_lora_a   [R, K]             reads the input *after* that multiplication
    svdquant_lora_b   [N, R]
    input_scale       fp32, one value    static second-level scale of the input; not used: our
                                         kernels scale the input per token and group
    bias              [N]

The names, that the factors lie beside the weight, and that factor a reads the scaled input were
read in the exporter and in ``SVDQuantLinear`` of NVIDIA/Model-Optimizer; names and shapes agree
with the loader test of TensorRT-LLM. The nibble order was read in ModelOpt's ``NVFP4QTensor``. No
published SVDQuant checkpoint was at hand: the import is tested on files made by these rules.

λ is kept in 16 bit, so ``1/pre_quant_scale`` is rounded once; the branch is not affected.
"""

# N output channels   K input channels   R rank

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.packing import pad_to
from gesso_core.quant.canonical import QuantizedModel
from gesso_core.quant.record import GROUP, QuantizedLinear

_COLUMN_TILE: Final = 64
_LEAVES: Final = frozenset(
    {
        "weight", "weight_scale", "weight_scale_2", "pre_quant_scale",
        "svdquant_lora_a", "svdquant_lora_b", "input_scale", "bias",
    }
)  # fmt: skip
_ALGORITHMS: Final = ("NVFP4_SVD", "NVFP4", "NVFP4_AWQ")


def is_modelopt(names: Mapping[str, Any]) -> bool:
    """Whether these are the tensors of such a checkpoint."""
    return any(name.endswith((".weight_scale_2", ".svdquant_lora_a")) for name in names)


def import_modelopt(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QuantizedModel:
    """Layers under their own names.

    Args:
        tensors: of all files of the checkpoint.
        config: ``quantization_config`` of config.json, or ``hf_quant_config.json``; may be empty.

    Raises:
        WeightsError: another algorithm than NVFP4, or a layer that is not as described.
    """
    about = config.get("quantization", config)
    algorithm = about.get("quant_algo") if isinstance(about, Mapping) else None
    if algorithm is not None and algorithm not in _ALGORITHMS:
        raise WeightsError(
            f"the checkpoint is quantized as {algorithm}; gesso imports {', '.join(_ALGORITHMS)}: "
            "export it with NVFP4_SVDQUANT_DEFAULT_CFG, or quantize with: gesso quantize"
        )
    modules = {n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")}
    layers, used = {}, set()
    for module in sorted(modules):
        leaves = {
            leaf: tensors[f"{module}.{leaf}"] for leaf in _LEAVES if f"{module}.{leaf}" in tensors
        }
        layers[module] = _layer(module, leaves)
        used |= {f"{module}.{leaf}" for leaf in leaves}
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    strays = [
        n for n in plain if n.endswith((".weight_scale_2", ".svdquant_lora_a", ".svdquant_lora_b"))
    ]
    if strays or not layers:
        raise WeightsError(
            f"{strays[0] if strays else 'every layer'} lacks its weight_scale; the checkpoint was "
            "cut or merged: export it again"
        )
    rank = max(layer.rank for layer in layers.values())
    return QuantizedModel(
        layers=layers, plain=plain, made_by={"imported_from": "modelopt", "rank": rank}
    )


def _layer(name: str, leaves: Mapping[str, Tensor]) -> QuantizedLinear:
    _require(name, leaves)
    weight = leaves["weight"].view(torch.uint8)
    rows, columns = weight.shape[0], weight.shape[1] * 2
    scale_K = leaves.get("pre_quant_scale")
    dtype = _sixteen_bit(leaves.get("svdquant_lora_a"), scale_K, leaves.get("bias"))
    scale64_K = torch.ones(columns).double() if scale_K is None else scale_K.double().flatten()
    a_RK = leaves.get("svdquant_lora_a", torch.zeros(0, columns))
    b_NR = leaves.get("svdquant_lora_b", torch.zeros(rows, 0))
    bias = leaves.get("bias")
    groups = _COLUMN_TILE // (GROUP["nvfp4"] or _COLUMN_TILE)
    record = QuantizedLinear(
        weight="nvfp4",
        activation="nvfp4",
        in_features=columns,
        codes=pad_to(weight, _COLUMN_TILE // 2, 1),
        scale=pad_to(leaves["weight_scale"], groups, 1, 1),
        tensor_scale=leaves["weight_scale_2"].float().reshape(1),
        smooth=pad_to((1 / scale64_K).to(dtype), _COLUMN_TILE, 0, 1),
        down=pad_to((a_RK.double() * scale64_K).to(dtype), _COLUMN_TILE, 1),
        up=b_NR.to(dtype),
        bias=None if bias is None else bias.to(dtype),
    )
    record.require_valid(name)
    return record


def _require(name: str, leaves: Mapping[str, Tensor]) -> None:
    if missing := {"weight", "weight_scale", "weight_scale_2"} - leaves.keys():
        raise WeightsError(
            f"{name} lacks {', '.join(sorted(missing))}; expected an NVFP4 layer of ModelOpt with "
            "two levels of scales: export the checkpoint again"
        )
    if ("svdquant_lora_a" in leaves) != ("svdquant_lora_b" in leaves):
        raise WeightsError(f"{name} has one factor of its branch without the other; export again")
    for leaf in ("weight", "svdquant_lora_a", "svdquant_lora_b"):
        if leaf in leaves and leaves[leaf].ndim != 2:
            raise WeightsError(
                f"{name}.{leaf} has the shape {tuple(leaves[leaf].shape)}, expected a matrix; "
                "export the checkpoint again"
            )
    weight, scale = leaves["weight"], leaves["weight_scale"]
    rows, groups = weight.shape[0], weight.shape[1] * 2 // 16
    rank = len(leaves.get("svdquant_lora_a", ()))
    expected = {
        "weight": (rows, groups * 8),
        "weight_scale": (rows, groups),
        "pre_quant_scale": (groups * 16,),
        "svdquant_lora_a": (rank, groups * 16),
        "svdquant_lora_b": (rows, rank),
    }
    for leaf, shape in expected.items():
        if leaf in leaves and tuple(leaves[leaf].shape) != shape:
            raise WeightsError(
                f"{name}.{leaf} has the shape {tuple(leaves[leaf].shape)}, expected {shape}; a "
                "padded or swizzled export cannot be read: export without those options"
            )
    if weight.element_size() != 1 or scale.dtype != torch.float8_e4m3fn:
        raise WeightsError(
            f"{name} has {weight.dtype} weights with {scale.dtype} scales, expected uint8 with "
            "float8_e4m3fn (NVFP4)"
        )
    if leaves["weight_scale_2"].numel() != 1:
        raise WeightsError(f"{name}.weight_scale_2 must be one number per layer")


def _sixteen_bit(*tensors: Tensor | None) -> torch.dtype:
    """The 16-bit dtype of the first tensor that has one."""
    found = (t.dtype for t in tensors if t is not None and t.dtype != torch.float32)
    return next(found, torch.bfloat16)
