"""Layers that read the same input: quantized as one, stored as several."""

from pathlib import Path

import pytest
import torch
from gesso_core.pipelines.load import load_denoiser
from gesso_core.ptq import driver
from gesso_core.ptq.driver import quantize_model
from gesso_core.ptq.joined import join, split_rows
from gesso_core.ptq.measuring import behind_parent
from gesso_core.quant.canonical import CANONICAL_FILE, read_canonical
from gesso_core.quant.layer import QuantOptions, quantize_linear
from gesso_core.quant.layer_map import LayerRule
from gesso_core.quant.record import WeightFormat
from gesso_core.quant.reference import svdquant_linear_ref
from torch import Tensor, nn


class TwoProjections(nn.Module):
    """A stand-in for an attention with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(64, 48), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).sum(-1, keepdim=True) * self.v(x)


def parent() -> TwoProjections:
    torch.manual_seed(0)
    return TwoProjections().requires_grad_(False)


@pytest.mark.parametrize("weight", ["int4", "nvfp4", "int8"])
def test_the_parts_compute_what_the_whole_computes(weight: WeightFormat) -> None:
    module = parent()
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    matrices = [(module.q.weight, module.q.bias), (module.v.weight, None)]
    options = QuantOptions(weight=weight, activation=weight, rank=4, dtype=torch.float16)
    whole, _ = quantize_linear(*join(matrices), x, options, parts=(48, 64))
    parts = split_rows(whole, matrices)
    assert [part.out_features for part in parts] == [48, 64]
    assert parts[0].bias is not None
    assert parts[1].bias is None
    for part in parts:
        part.require_valid("part")
        assert part.down.equal(whole.down)
    outputs = torch.cat([svdquant_linear_ref(part, x) for part in parts], dim=1)
    torch.testing.assert_close(outputs, svdquant_linear_ref(whole, x))


def test_the_error_of_several_layers_is_taken_behind_their_parent() -> None:
    module = parent()
    x = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(1))
    evaluate = behind_parent(module, {"q": 48, "v": 64}, {"x": x})
    y = torch.cat([module.q(x), module.v(x)], dim=-1).flatten(0, 1)
    rows = torch.arange(48)
    torch.testing.assert_close(evaluate(y, rows), module(x).flatten(0, 1))
    assert isinstance(module.q, nn.Linear)


def test_the_driver_quantizes_what_a_rule_says_shares_its_input_as_one(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small model has no such layers; these two have inputs of the same width."""
    rules = tuple(
        LayerRule(pattern=f"blocks.*.attention.{name}", share="both") for name in ("qkv", "out")
    )
    monkeypatch.setattr(driver, "layer_map", lambda name: rules)
    report = quantize_model(
        tiny_pipeline, tmp_path, to="int4", rank=4, steps=1, prompts=("a cat",), max_tokens=64
    )
    content = read_canonical(tmp_path / CANONICAL_FILE)
    assert len(report.layers) == len(content.layers) == 4
    qkv, out = (content.layers[f"blocks.0.attention.{name}"] for name in ("qkv", "out"))
    assert qkv.down.equal(out.down)
    assert not qkv.down.equal(content.layers["blocks.1.attention.qkv"].down)
    weight = load_denoiser(tiny_pipeline).model.get_submodule("blocks.0.attention.qkv").weight
    assert isinstance(weight, Tensor)
    assert (qkv.dense() - weight).norm() < 0.2 * weight.norm()
