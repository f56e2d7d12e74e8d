"""A user's LoRA appended to the packed branch of FLUX layers, as the original engine wants it.

The branch of the engine reads the raw input and its down factor already holds 1/λ, so the rows of
the LoRA are appended as they are: down [A/λ ; A'], up [B , B']. Adapters of q, k and v with
different A' become block-diagonal, their ranks add up; with one A' they share it. AdaLN layers have
no branch: their adapters stay separate, in the row order of the layer, only padded.

Inside gesso LoRAs are applied to records at run time; this module serves files for other engines.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.interchange.nunchaku.packing import (
    RANK_TILE,
    interleave_rows,
    pack_low_rank,
    pad_to,
    unpack_low_rank,
)

_DOUBLE: Final = {
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "out_proj": ("attn.to_out.0",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
    "norm1.linear": ("norm1.linear",),
    "norm1_context.linear": ("norm1_context.linear",),
}
_SINGLE: Final = {
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "out_proj": ("proj_out.linears.0",),
    "mlp_fc1": ("proj_mlp",),
    "mlp_fc2": ("proj_out.linears.1",),
    "norm.linear": ("norm.linear",),
}
_ADALN_SPLITS: Final = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}
_SPLIT: Final = "proj_out"  # of single blocks: attention columns, then those of the MLP


class Factors(NamedTuple):
    """Two factors, row-major: ``down`` [R, K] and ``up`` [N, R]."""

    down: Tensor
    up: Tensor


def concatenate_block(
    block: str,
    base: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The low-rank tensors of one block with a LoRA appended.

    Args:
        block: ``transformer_blocks.<i>`` or ``single_transformer_blocks.<i>``.
        base: the file's tensors; ``<block>.<layer>.lora_down`` and ``.lora_up`` are read, packed.
        lora: ``<block>.<module>.lora_A.weight`` and ``.lora_B.weight``, strength folded into B.
        dtype: of adapters on layers without a branch; others take the dtype of the branch.

    Returns:
        ``<layer>.lora_down`` and ``.lora_up`` of every layer that has a branch or an adapter.

    Raises:
        WeightsError: half a pair, or an adapter whose sizes do not fit the layer.
    """
    result: dict[str, Tensor] = {}
    for layer, modules in (_SINGLE if block.startswith("single") else _DOUBLE).items():
        own = _base(f"{block}.{layer}", base)
        extra = _extra([f"{block}.{module}" for module in modules], lora, own)
        if own is None and extra is not None:
            extra = Factors(extra.down.to(dtype), extra.up.to(dtype))
        factors = _appended(f"{block}.{layer}", own, extra)
        if factors is None:
            continue
        if layer in _ADALN_SPLITS:
            down = pad_to(factors.down, RANK_TILE, 0)
            up = pad_to(interleave_rows(factors.up, _ADALN_SPLITS[layer]), RANK_TILE, 1)
        else:
            down, up = pack_low_rank(factors.down, "down"), pack_low_rank(factors.up, "up")
        result |= {f"{layer}.lora_down": down, f"{layer}.lora_up": up}
    return result


def block_diagonal(adapters: list[Factors]) -> Factors:
    """Adapters of layers that read one input, stacked along their rows."""
    first = adapters[0].down
    if all(torch.equal(adapter.down, first) for adapter in adapters):
        return Factors(first, torch.cat([adapter.up for adapter in adapters]))
    ranks = [adapter.up.shape[1] for adapter in adapters]
    up = torch.cat(
        [
            torch.nn.functional.pad(adapter.up, (sum(ranks[:i]), sum(ranks[i + 1 :])))
            for i, adapter in enumerate(adapters)
        ]
    )
    return Factors(torch.cat([adapter.down for adapter in adapters]), up)


def _base(layer: str, base: Mapping[str, Tensor]) -> Factors | None:
    down, up = (base.get(f"{layer}.lora_{side}") for side in ("down", "up"))
    if down is None or up is None or not down.numel():
        return None
    return Factors(unpack_low_rank(down, "down"), unpack_low_rank(up, "up"))


def _extra(modules: list[str], lora: Mapping[str, Tensor], base: Factors | None) -> Factors | None:
    if len(modules) > 1:
        fused = _adapter(modules[0].replace("to_q", "to_qkv").replace("_q_", "_qkv_"), lora, base)
        if fused is not None:
            return fused
    found = [_adapter(module, lora, base) for module in modules]
    present = [adapter for adapter in found if adapter is not None]
    if not present:
        return None
    if len(found) == 1:
        return present[0]
    # A module without an adapter gets a zero one that shares the first A.
    zero = Factors(present[0].down, torch.zeros_like(present[0].up))
    return block_diagonal([adapter or zero for adapter in found])


def _adapter(module: str, lora: Mapping[str, Tensor], base: Factors | None) -> Factors | None:
    a, b = (lora.get(f"{module}.lora_{side}.weight") for side in "AB")
    if a is None and b is None and f".{_SPLIT}.linears." in module:
        return _split_adapter(module, lora, base)
    if a is None and b is None:
        return None
    if a is None or b is None or a.shape[0] != b.shape[1]:
        shapes = [None if factor is None else tuple(factor.shape) for factor in (a, b)]
        raise WeightsError(
            f"the LoRA of {module} has A and B of shapes {shapes[0]} and {shapes[1]}; expected "
            "both, with rows of A equal to columns of B"
        )
    return Factors(a, b)


def _split_adapter(module: str, lora: Mapping[str, Tensor], base: Factors | None) -> Factors | None:
    """The share of one column part in an adapter of a whole ``proj_out``."""
    whole_name, _, part = module.partition(".linears.")
    whole = _adapter(whole_name, lora, base)
    if whole is None:
        return None
    if base is None:
        raise WeightsError(f"{module} has a LoRA, but the file has no branch for that layer")
    columns = base.down.shape[1]
    down = whole.down[:, :columns] if part == "0" else whole.down[:, -columns:]
    return Factors(down, whole.up)


def _appended(layer: str, base: Factors | None, extra: Factors | None) -> Factors | None:
    if base is None or extra is None:
        return base or extra
    widths = (base.down.shape[1], base.up.shape[0])
    # Packed factors are padded to whole tiles, an adapter is not.
    missing = (widths[0] - extra.down.shape[1], widths[1] - extra.up.shape[0])
    if min(missing) < 0:
        raise WeightsError(
            f"the LoRA of {layer} is {extra.up.shape[0]}x{extra.down.shape[1]}, the layer "
            f"{widths[1]}x{widths[0]}; it was trained for another model"
        )
    down = torch.nn.functional.pad(extra.down, (0, missing[0])).to(base.down.dtype)
    up = torch.nn.functional.pad(extra.up, (0, 0, 0, missing[1])).to(base.up.dtype)
    return Factors(torch.cat([base.down, down]), torch.cat([base.up, up], dim=1))
