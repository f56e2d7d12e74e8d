"""Adapter of the text cases: Gemma-2 states through transformers, and the positions Sana keeps."""

from collections.abc import Callable
from typing import Any

from gesso_core.text.gemma2 import kept_window
from golden_case import Adapter, Case
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model


def gemma2(case: Case) -> Gemma2Model:
    """The model of the case, with its weights, with the attention that applies the soft cap."""
    options = dict(case.meta["constructor"])
    rope = {"rope_type": "default", "rope_theta": options.pop("rope_theta", 10000.0)}
    config = Gemma2Config(**options, rope_parameters=rope, attn_implementation="eager")
    model = Gemma2Model(config).eval()
    state = {key.removeprefix("model."): tensor for key, tensor in case.state.items()}
    model.load_state_dict(state, strict=True)
    return model


def gemma2_text_states(case: Case) -> dict[str, Tensor]:
    model = gemma2(case)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Any], None]:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            seen[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    model.embed_tokens.register_forward_hook(keep("embeddings_scaled"))
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(keep(f"hidden_after_layer{index}"))
    mask_BT = case.inputs["attention_mask"]
    output = model(case.inputs["input_ids"], attention_mask=mask_BT, use_cache=False)
    seen["last_hidden_state"] = output.last_hidden_state
    length = case.meta.get("chi", {}).get("model_max_length", mask_BT.shape[1])
    window = kept_window(output.last_hidden_state, mask_BT, length)
    seen["prompt_embeds"], seen["prompt_mask"] = window
    return {name: seen[name] for name in case.outputs}


ADAPTERS: dict[tuple[str, str], Adapter] = {("sana", "gemma2_text_states"): gemma2_text_states}
