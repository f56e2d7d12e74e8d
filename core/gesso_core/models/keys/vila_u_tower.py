"""Parameter names of VILA-U's vision tower and projector as they were published.

The folder ``vision_tower`` holds the tower under ``rqvaesiglip.`` and the depth transformer under
``rqtransformer.``. Some tensors have two names there and may be stored once: the table of a shared
codebook, and the scale and bias of the image-text loss. SigLIP's text tower is dropped.
"""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.models.keys.translate import KeyMap, Rule, translate, untranslate
from gesso_core.models.keys.vqgan import under, vqgan_keys
from gesso_core.models.vila_u.tower_config import TowerConfig

_WB = "{p:weight|bias}"
_SIGLIP = "siglip_model"
TOWER_PREFIX: Final = "rqvaesiglip."
DEPTH_PREFIX: Final = "rqtransformer."
DECODER: Final[KeyMap] = vqgan_keys("up", fused_qkv=False)
TABLES: Final[KeyMap] = (
    Rule("codebooks.{d}.weight", "codebooks.{d}.table_VC"),
    Rule("codebooks.{d}.cluster_size_ema", "codebooks.{d}.counts_V", optional=True),
    Rule("codebooks.{d}.embed_ema", "codebooks.{d}.sums_VC", optional=True),
)
PROJECTOR: Final[KeyMap] = (
    Rule(f"layers.{_WB}", "layers.{p}"),
    Rule(f"layers.{{i}}.{_WB}", "layers.{i}.{p}"),
)


def tower_rules(config: TowerConfig) -> KeyMap:
    """The table of a tower, without prefix and second names.

    What only the contrastive branch uses may be absent: the last encoder layer, what follows it,
    scale and bias.
    """
    last = config.encoder.num_hidden_layers - 1
    branch = rf"encoder\.layers\.{last}\..+|post_layernorm\..+|head\..+"
    return (
        *under(DECODER, "decoder.", "decoder."),
        *under(TABLES, "quantizer.", "quantizer."),
        Rule(f"post_quant_conv.{_WB}", "post_quant.{p}"),
        Rule(f"{_SIGLIP}.vision_model.{{k:{branch}}}", "encoder.{k}", optional=True),
        Rule(
            f"{_SIGLIP}.vision_model.{{k:(?!{branch}|embeddings\\.position_ids).+}}",
            "encoder.{k}",
        ),
        Rule(f"{_SIGLIP}.{{n:logit_scale|logit_bias}}", "{n}", optional=True),
        Rule(f"{_SIGLIP}.vision_model.embeddings.position_ids", None),
        Rule(f"{_SIGLIP}.text_model.{{k:.+}}", None),
    )


def read_tower(
    state: Mapping[str, Tensor],
    config: TowerConfig,
    expected: Mapping[str, Tensor] | None = None,
    prefix: str = TOWER_PREFIX,
) -> dict[str, Tensor]:
    """A published tower under our names.

    Args:
        state: tensors of the folder ``vision_tower``; those of the depth transformer are passed
            over.
        config: of the tower.
        expected: state dict of ours to compare with.
        prefix: before every name of the tower.

    Raises:
        WeightsError: names or shapes that do not fit; two names of one tensor that differ.
    """
    tower = {
        key.removeprefix(prefix): tensor
        for key, tensor in state.items()
        if not (prefix and key.startswith(DEPTH_PREFIX))
    }
    return translate(_without_aliases(tower, config), tower_rules(config), expected)


def write_tower(
    state: Mapping[str, Tensor], config: TowerConfig, prefix: str = TOWER_PREFIX
) -> dict[str, Tensor]:
    """Our tensors under the published names, every one of them; aliases share their memory."""
    tower = untranslate(state, tower_rules(config))
    for alias, name in _aliases(config):
        if name in tower:
            tower[alias] = tower[name]
    return {f"{prefix}{key}": tensor for key, tensor in tower.items()}


def tower_aliases(config: TowerConfig, prefix: str = TOWER_PREFIX) -> dict[str, str]:
    """Second names of tensors, each with the first one; a file may leave them out."""
    return {f"{prefix}{alias}": f"{prefix}{name}" for alias, name in _aliases(config)}


def read_tables(state: Mapping[str, Tensor], depth: int, *, shared: bool) -> dict[str, Tensor]:
    """Tables of a quantizer alone under our names."""
    return translate(_merged(state, _table_aliases("", depth) if shared else {}), TABLES)


def write_tables(state: Mapping[str, Tensor], depth: int, *, shared: bool) -> dict[str, Tensor]:
    """The inverse of `read_tables`; a shared table gets the names of all depths."""
    tables = untranslate(state, TABLES)
    again = _table_aliases("", depth) if shared else {}
    return tables | {alias: tables[name] for alias, name in again.items()}


def _aliases(config: TowerConfig) -> Iterator[tuple[str, str]]:
    for name in ("logit_scale", "logit_bias"):
        yield name, f"{_SIGLIP}.{name}"
    if config.shared_codebook:
        yield from _table_aliases("quantizer.", config.depth).items()


def _table_aliases(prefix: str, depth: int) -> dict[str, str]:
    kinds = ("weight", "cluster_size_ema", "embed_ema")
    return {
        f"{prefix}codebooks.{d}.{kind}": f"{prefix}codebooks.0.{kind}"
        for d in range(1, depth)
        for kind in kinds
    }


def _without_aliases(state: Mapping[str, Tensor], config: TowerConfig) -> dict[str, Tensor]:
    return _merged(state, dict(_aliases(config)))


def _merged(state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Every tensor under its first name; whichever of its names is there will do."""
    merged = {key: tensor for key, tensor in state.items() if key not in aliases}
    for alias, name in aliases.items():
        if alias in state and not _same(merged.setdefault(name, state[alias]), state[alias]):
            raise WeightsError(
                f"{alias} differs from {name}, of which it should be a second name; the "
                "configuration does not belong to these weights (shared_codebook?)"
            )
    return merged


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other or one.is_meta or other.is_meta:
        return one.shape == other.shape
    return torch.equal(one, other)
