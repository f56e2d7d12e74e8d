"""Import of the folder that the deepcompressor quantizer saves: FLUX transformers.

    model.pt    dequantized weights and everything else; wrapped layers as ``<m>.linear.weight``
                with ``<m>.shift``, layers split by input columns as ``<m>.linears.<i>.weight``
    scale.pt    ``<m>.weight.scale.0`` and ``.1``, [N, 1, G, 1]
    smooth.pt   λ by module, and the flag ``proj.fuse_when_possible``
    branch.pt   by module ``{"a.weight": [R, K], "b.weight": [N, R]}``

These are pickles. They are opened here alone, by the command that imports them, through
`hub.convert.open_pickle`, which reads tensors and plain containers and nothing that runs; a service
never does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.hub.convert import open_pickle
from gesso_core.interchange.nunchaku.flux import BLOCK, IntermediateState, flux_layers
from gesso_core.quant.canonical import QuantizedModel
from gesso_core.safe_files import inside

FILES: Final = ("model.pt", "scale.pt", "smooth.pt", "branch.pt")
_FUSED: Final = "proj.fuse_when_possible"


def is_intermediate(folder: Path) -> bool:
    """Whether a folder looks like one of these."""
    return (folder / "model.pt").exists() and (folder / "scale.pt").exists()


def import_deepcompressor(folder: Path) -> QuantizedModel:
    """The layers under the classic names of the nunchaku engine.

    Raises:
        UnsafeFile: a file holds more than tensors.
        WeightsError: a file is missing or damaged, or the model is not a FLUX transformer.
    """
    state = read_intermediate(folder)
    if not any(BLOCK.fullmatch(name) for name in state.model):
        raise WeightsError(
            f"{folder / 'model.pt'} has no transformer_blocks; only FLUX transformers can be "
            "imported from deepcompressor: quantize other models with: gesso quantize"
        )
    layers, plain = flux_layers(state)
    ranks = {layer.rank for layer in layers.values() if layer.zero is None}
    about = {"imported_from": "deepcompressor", "rank": max(ranks, default=0)}
    return QuantizedModel(layers=layers, plain=plain, made_by=about)


def read_intermediate(folder: Path) -> IntermediateState:
    """The four files; raises like `import_deepcompressor`."""
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise WeightsError(
            f"{', '.join(missing)} is missing in {folder}; expected {', '.join(FILES)} as "
            "deepcompressor saves them"
        )
    model, scale, smooth, branch = (_mapping(inside(folder, name)) for name in FILES)
    fused = smooth.pop(_FUSED, None)
    if not isinstance(fused, bool):
        raise WeightsError(
            f"smooth.pt in {folder} lacks the flag {_FUSED!r}, which says where λ of the output "
            "projection is; add it, as in the configuration of the run: True or False"
        )
    return IntermediateState(
        model=_tensors("model.pt", model),
        scale=_tensors("scale.pt", scale),
        smooth=_tensors("smooth.pt", {k: v for k, v in smooth.items() if not isinstance(v, bool)}),
        branch=_tensors("branch.pt", _flat(branch)),
        out_fused=fused,
    )


def _mapping(path: Path) -> dict[str, Any]:
    content = open_pickle(path)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected names and tensors")
    return dict(content)


def _flat(branch: Mapping[str, Any]) -> dict[str, Any]:
    """``{m: {"a.weight": …}}`` to ``{"m.a.weight": …}``."""
    flat: dict[str, Any] = {}
    for module, factors in branch.items():
        if isinstance(factors, Mapping):
            flat |= {f"{module}.{name}": factor for name, factor in factors.items()}
        else:
            flat[module] = factors
    return flat


def _tensors(file: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries that are tensors; None marks what a run left out."""
    for name, value in content.items():
        if value is not None and not isinstance(value, Tensor):
            raise WeightsError(
                f"{file}: {name[:80]} is a {type(value).__name__}, expected a tensor; was it saved "
                "by another tool?"
            )
    return {name: value.detach() for name, value in content.items() if value is not None}
