"""Names of tensors in nunchaku files: the classic layout (v1), the Python models (v2), and lite.

v2 and lite call the leaves ``smooth_factor``, ``smooth_factor_orig``, ``proj_down`` and
``proj_up``; v2 FLUX models also keep the module names of diffusers. Everything inside gesso uses
the classic names.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.linear import AWQ_TENSORS, W4A4_TENSORS

Value = TypeVar("Value")

_LEAVES: Final = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}
_DOUBLE: Final = {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
    "norm_q": "attn.norm_q",
    "norm_k": "attn.norm_k",
    "norm_added_q": "attn.norm_added_q",
    "norm_added_k": "attn.norm_added_k",
}
_SINGLE: Final = {
    "qkv_proj": "attn.to_qkv",
    "out_proj": "attn.to_out",
    "norm_q": "attn.norm_q",
    "norm_k": "attn.norm_k",
}
_BLOCK: Final = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(.+)")
_AFTER_GELU: Final = re.compile(r"(?:single_)?transformer_blocks\.\d+\.mlp_(?:context_)?fc2")
_CLASSIC_LEAVES: Final = frozenset(_LEAVES)
_NEW_LEAVES: Final = frozenset(_LEAVES.values())
_ALL_LEAVES: Final = W4A4_TENSORS | AWQ_TENSORS


def to_v2(name: str) -> str:
    """The v2 name of a tensor of a FLUX file with a classic name."""
    module, dot, leaf = name.rpartition(".")
    return f"{_module(module, backwards=False)}{dot}{_LEAVES.get(leaf, leaf)}"


def to_classic(name: str, *, modules: bool = True) -> str:
    """Inverse of `to_v2`; ``modules=False`` renames the last part only (lite, other models)."""
    back = {new: classic for classic, new in _LEAVES.items()}
    module, dot, leaf = name.rpartition(".")
    return f"{_module(module, backwards=True) if modules else module}{dot}{back.get(leaf, leaf)}"


def to_lite(name: str) -> str:
    """The lite name of a tensor: only the last part differs from the classic one."""
    module, dot, leaf = name.rpartition(".")
    return f"{module}{dot}{_LEAVES.get(leaf, leaf)}"


def key_map(classic: Iterable[str]) -> dict[str, str]:
    """Classic name → v2 name."""
    return {name: to_v2(name) for name in classic}


def is_after_gelu(module: str) -> bool:
    """Whether the engine shifts this classic layer's input and quantizes it without a sign."""
    return _AFTER_GELU.fullmatch(module) is not None


def is_flux_layer(module: str) -> bool:
    """Whether a classic layer name is one that v2 FLUX models call differently."""
    return _module(module, backwards=False) != module


def uses_new_leaves(names: Iterable[str]) -> bool:
    """Whether these names are v2 or lite.

    Raises:
        WeightsError: classic and new names in one file, or neither.
    """
    leaves = {name.rpartition(".")[2] for name in names}
    classic, new = leaves & _CLASSIC_LEAVES, leaves & _NEW_LEAVES
    if classic and new:
        raise WeightsError(
            f"the file has classic names ({', '.join(sorted(classic))}) beside those of v2 "
            f"({', '.join(sorted(new))}); it was merged from two versions: use one of them"
        )
    return bool(new)


def split_layers(
    tensors: Mapping[str, Value],
) -> tuple[dict[str, dict[str, Value]], dict[str, Value]]:
    """Classic names → quantized layers (leaf → tensor) by name, and everything else."""
    modules = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    layers: dict[str, dict[str, Value]] = {module: {} for module in sorted(modules)}
    plain = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in layers:
            layers[module][leaf] = tensor
        elif leaf in _ALL_LEAVES - {"bias"}:
            raise WeightsError(
                f"{name} belongs to a quantized layer, but {module}.qweight is missing; the file "
                "was cut or merged from parts: download it again"
            )
        else:
            plain[name] = tensor
    return layers, plain


def _module(module: str, *, backwards: bool) -> str:
    match = _BLOCK.fullmatch(module)
    if match is None:
        return module
    table = _SINGLE if module.startswith("single") else _DOUBLE
    if backwards:
        table = {new: classic for classic, new in table.items()}
    return f"{match[1]}.{table.get(match[2], match[2])}"
