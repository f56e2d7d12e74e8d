"""Names of DC-AE checkpoints, and the table machinery that reads them."""

import json
from pathlib import Path

import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.models.dc_ae import DC_AE_CONFIGS, DCAE, DCAEConfig
from gesso_core.models.keys.dc_ae import Layout, dc_ae_rules, layout_of, translate_dc_ae
from gesso_core.models.keys.translate import Rule, translate, untranslate
from torch import Tensor

LAYOUTS = Path(__file__).parents[1] / "golden" / "key_layouts"
FAMILIES = {
    "dc-ae-f32c32-in-1.0": "f32c32_in_mix",
    "dc-ae-f32c32-mix-1.0": "f32c32_in_mix",
    "dc-ae-f64c128-in-1.0": "f64c128_in_mix",
    "dc-ae-f64c128-mix-1.0": "f64c128_in_mix",
    "dc-ae-f128c512-in-1.0": "f128c512_in_mix",
    "dc-ae-f128c512-mix-1.0": "f128c512_in_mix",
    "dc-ae-f32c32-sana-1.0": "f32c32_sana",
    "dc-ae-f32c32-sana-1.1": "f32c32_sana",
}
SUFFIX: dict[Layout, str] = {"diffusers": "", "original": ".original"}

QKV = Rule(("to_q.{p:weight|bias}", "to_k.{p}", "to_v.{p}"), "qkv.{p}")
KV = Rule("blocks.{i}.kv.weight", ("blocks.{i}.k.weight", "blocks.{i}.v.weight"))


def published(family: str, layout: Layout) -> dict[str, list[int]]:
    values = json.loads((LAYOUTS / f"dc_ae_{family}{SUFFIX[layout]}.json").read_text())
    return values.get("tensors", values)


def on_meta(config: DCAEConfig) -> DCAE:
    with torch.device("meta"):
        return DCAE(config)


def meta_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("layout", SUFFIX)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_published_name_and_shape_has_a_home(name: str, layout: Layout) -> None:
    config, shapes = DC_AE_CONFIGS[name], published(FAMILIES[name], layout)
    expected = on_meta(config).state_dict()
    state = meta_state(shapes)
    assert layout_of(state) == layout
    assert translate_dc_ae(state, config, expected).keys() == expected.keys()


@pytest.mark.parametrize("layout", SUFFIX)
@pytest.mark.parametrize("name", FAMILIES)
def test_our_names_go_back_to_exactly_the_published_ones(name: str, layout: Layout) -> None:
    config = DC_AE_CONFIGS[name]
    back = untranslate(on_meta(config).state_dict(), dc_ae_rules(layout, config))
    assert {key: list(t.shape) for key, t in back.items()} == published(FAMILIES[name], layout)


def test_batch_counters_may_be_absent() -> None:
    config = DC_AE_CONFIGS["dc-ae-f32c32-in-1.0"]
    shapes = published("f32c32_in_mix", "diffusers")
    fewer = {k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")}
    assert len(fewer) < len(shapes)
    translate_dc_ae(meta_state(fewer), config, on_meta(config).state_dict())


def test_one_error_names_every_key_that_is_wrong() -> None:
    config = DC_AE_CONFIGS["dc-ae-f32c32-sana-1.0"]
    state = meta_state(published("f32c32_sana", "diffusers"))
    state["surprise.weight"] = torch.empty(1, device="meta")
    del state["encoder.conv_in.bias"]
    del state["encoder.down_blocks.3.0.attn.to_k.weight"]
    state["decoder.conv_in.weight"] = torch.empty(3, 3, device="meta")
    with pytest.raises(WeightsError) as caught:
        translate_dc_ae(state, config, on_meta(config).state_dict())
    for name in (
        "surprise.weight",
        "encoder.project_in.bias",
        "encoder.down_blocks.3.0.attn.to_k.weight",
        "decoder.project_in.weight [3, 3], expected [1024, 32, 3, 3]",
    ):
        assert name in caught.value.message


def test_weights_of_something_else_are_refused_at_once() -> None:
    with pytest.raises(WeightsError, match="not the weights of a DC-AE"):
        layout_of({"transformer.block.weight": torch.zeros(1)})


def test_parts_are_stacked_in_the_order_of_the_rule() -> None:
    state = {f"to_{n}.weight": torch.full((2, 3), float(i)) for i, n in enumerate("qkv")}
    fused = translate(state, [QKV])
    assert fused["qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    back = untranslate(fused, [QKV])
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_a_fused_tensor_is_split_into_tensors_of_their_own() -> None:
    state = {"blocks.7.kv.weight": torch.arange(8.0).view(4, 2)}
    split = translate(state, [KV])
    assert split["blocks.7.v.weight"].tolist() == [[4, 5], [6, 7]]
    storages = {t.untyped_storage().data_ptr() for t in split.values()}
    assert len(storages) == 2
    assert torch.equal(untranslate(split, [KV])["blocks.7.kv.weight"], state["blocks.7.kv.weight"])


def test_a_dropped_key_disappears_and_does_not_come_back() -> None:
    rules = [Rule("pos_embed", None), Rule("x.weight", "y.weight")]
    ours = translate({"pos_embed": torch.zeros(2), "x.weight": torch.ones(2)}, rules)
    assert list(ours) == ["y.weight"]
    assert list(untranslate(ours, rules)) == ["x.weight"]


def test_a_linear_layer_becomes_a_convolution_and_back() -> None:
    rule = [Rule("to_out.weight", "project.weight", ranks=(2, 4))]
    ours = translate({"to_out.weight": torch.ones(5, 3)}, rule)
    assert ours["project.weight"].shape == (5, 3, 1, 1)
    assert untranslate(ours, rule)["to_out.weight"].shape == (5, 3)


@pytest.mark.parametrize(
    ("state", "rules", "complaint"),
    [
        (["a.weight"], [Rule("a.weight", "x"), Rule("{n:a|b}.weight", "{n}")], "by two rules"),
        (["a", "b"], [Rule("a", "x"), Rule("b", "x")], "given twice: x"),
        (["to_q.weight", "to_v.weight"], [QKV], "missing: to_k.weight"),
        (["A"], [Rule("a", "x")], "unknown: A"),
    ],
    ids=["two rules", "one home for two", "part missing", "unknown"],
)
def test_ambiguous_or_incomplete_keys_are_refused(
    state: list[str], rules: list[Rule], complaint: str
) -> None:
    with pytest.raises(WeightsError, match=complaint):
        translate({key: torch.zeros(2, 2) for key in state}, rules)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    uneven = {"to_q.weight": torch.zeros(2), "to_k.weight": torch.zeros(2)}
    with pytest.raises(WeightsError, match="unequal shape"):
        translate({**uneven, "to_v.weight": torch.zeros(3)}, [QKV])
    with pytest.raises(WeightsError, match="not divisible by 2"):
        translate({"blocks.0.kv.weight": torch.zeros(3)}, [KV])
    with pytest.raises(WeightsError, match="expected rank 2"):
        translate({"a": torch.zeros(2, 2, 3, 3)}, [Rule("a", "b", ranks=(4, 2))])


def test_a_rule_with_parts_on_both_sides_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="only one side"):
        translate({}, [Rule(("a", "b"), ("c", "d"))])
