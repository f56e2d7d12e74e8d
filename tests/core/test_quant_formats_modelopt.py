"""Files of ModelOpt: the weights they stand for, and what is refused."""

from pathlib import Path

import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.interchange.formats import detect_format, import_quantized
from gesso_kernels.number_formats import e2m1_values
from quantized_files import modelopt_folder, modelopt_tensors
from safetensors.torch import save_file
from torch import Tensor


def test_a_modelopt_layer_stands_for_the_same_weight(tmp_path: Path) -> None:
    tensors = modelopt_tensors()
    folder = modelopt_folder(tmp_path / "m", tensors)
    assert detect_format(folder) == "modelopt"
    model = import_quantized(folder)
    layer = model.layers["blocks.0.attn1.to_q"]
    assert (layer.in_features, layer.padded_in, layer.rank) == (80, 128, 8)
    parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if "to_q" in n}
    low, high = parts["weight"] & 15, parts["weight"] >> 4
    values = e2m1_values(torch.stack([low, high], -1).flatten(1)).double()
    scales = parts["weight_scale"].double().repeat_interleave(16, 1) * 0.03
    smoothed = parts["pre_quant_scale"].double()
    a, b = parts["svdquant_lora_a"].double(), parts["svdquant_lora_b"].double()
    wanted = (values * scales + b @ a) * smoothed
    # λ = 1/pre_quant_scale and the down factor are rounded to bfloat16, by 2⁻⁸ at most.
    bound = ((values * scales).abs() + b.abs() @ a.abs()) * smoothed * 1.01 * 2**-8
    assert ((layer.dense().double() - wanted).abs() <= bound + 1e-6).all()
    assert torch.equal(model.plain["proj_out.weight"], tensors["proj_out.weight"])


def test_a_modelopt_file_alone_is_recognised(tmp_path: Path) -> None:
    save_file(modelopt_tensors(), tmp_path / "x.safetensors")
    assert detect_format(tmp_path / "x.safetensors") == "modelopt"
    assert set(import_quantized(tmp_path / "x.safetensors").layers) == {"blocks.0.attn1.to_q"}


def modelopt_sana(*, other_scale: bool = False) -> dict[str, Tensor]:
    """q, k and v of one block and its table; k has the scale of another input if asked for."""
    tensors = {"transformer_blocks.0.scale_shift_table": torch.ones(6, 80)}
    for number, part in enumerate("qkv"):
        for name, tensor in modelopt_tensors().items():
            if name.startswith("blocks.0.attn1.to_q."):
                leaf = name.rpartition(".")[2]
                changes = leaf.startswith("svdquant") or (leaf == "pre_quant_scale" and other_scale)
                moved = tensor + number if changes else tensor
                tensors[f"transformer_blocks.0.attn1.to_{part}.{leaf}"] = moved
    return tensors


def test_a_modelopt_sana_gets_our_names_with_q_k_and_v_fused(tmp_path: Path) -> None:
    tensors = modelopt_sana()
    save_file(tensors, tmp_path / "x.safetensors")
    model = import_quantized(tmp_path / "x.safetensors")
    assert set(model.layers) == {"blocks.0.attention.qkv"}
    assert set(model.plain) == {"blocks.0.table"}
    layer = model.layers["blocks.0.attention.qkv"]
    assert (layer.out_features, layer.rank) == (3 * 48, 3 * 8)
    branch = layer.up.double() @ layer.down.double()[:, :80]
    m = "transformer_blocks.0.attn1.to_v"
    scale, a = tensors[f"{m}.pre_quant_scale"].double(), tensors[f"{m}.svdquant_lora_a"].double()
    wanted = tensors[f"{m}.svdquant_lora_b"].double() @ (a * scale)
    torch.testing.assert_close(branch[96:], wanted, atol=0.1, rtol=2**-8)


def test_modelopt_layers_with_different_scales_of_one_input_are_refused(tmp_path: Path) -> None:
    save_file(modelopt_sana(other_scale=True), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="scale the same input differently"):
        import_quantized(tmp_path / "x.safetensors")


def test_another_modelopt_algorithm_is_refused(tmp_path: Path) -> None:
    folder = modelopt_folder(tmp_path / "m", modelopt_tensors(), "FP8")
    with pytest.raises(WeightsError, match="quantized as FP8"):
        import_quantized(folder)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("svdquant_lora_b", None, "one factor of its branch"),
        ("weight_scale_2", None, "lacks weight_scale_2"),
        ("weight_scale", torch.ones(128, 8).to(torch.float8_e4m3fn), "padded or swizzled"),
        ("weight_scale", torch.ones(48, 5), "expected uint8 with"),
        ("weight_scale", None, "lacks its weight_scale"),
    ],
)
def test_a_damaged_modelopt_layer_is_named(
    tmp_path: Path, leaf: str, change: Tensor | None, message: str
) -> None:
    tensors = modelopt_tensors()
    name = f"blocks.0.attn1.to_q.{leaf}"
    tensors = {n: t for n, t in tensors.items() if n != name}
    tensors |= {} if change is None else {name: change}
    with pytest.raises(WeightsError, match=message):
        import_quantized(modelopt_folder(tmp_path / "m", tensors))
