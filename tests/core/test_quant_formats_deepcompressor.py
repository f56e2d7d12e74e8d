"""The folders of a DeepCompressor run on FLUX, and the files that they become."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gesso_core.errors import UnsafeFile, WeightsError
from gesso_core.interchange.formats import detect_format, export_quantized, import_quantized
from gesso_core.safe_files import read_header, read_tensors
from quantized_files import (
    CASES,
    assert_same_model,
    assert_same_tensors,
    flux_inputs,
    intermediate_folder,
)
from safetensors.torch import load_file
from torch import Tensor


def flux_outputs() -> dict[str, Tensor]:
    outputs = {}
    for case in ("nunchaku_flux_single_block", "nunchaku_flux_double_block"):
        for name, tensor in load_file(CASES / case / "tensors.safetensors").items():
            kind, _, rest = name.partition(".")
            if kind == "output":
                outputs[rest.partition(".")[2]] = tensor
    return outputs


def test_a_deepcompressor_folder_becomes_the_file_its_own_exporter_makes(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run")
    assert detect_format(folder) == "deepcompressor"
    model = import_quantized(folder)
    assert model.made_by["rank"] == 16
    export_quantized(model, tmp_path / "flux.safetensors")
    assert_same_tensors(read_tensors(tmp_path / "flux.safetensors"), flux_outputs())


def test_lambda_folded_into_the_values_is_kept_beside_the_layer(tmp_path: Path) -> None:
    smooth = flux_inputs()["smooth"] | {"proj.fuse_when_possible": True}
    model = import_quantized(intermediate_folder(tmp_path / "run", smooth=smooth))
    name = "single_transformer_blocks.0.out_proj"
    assert (model.layers[name].smooth == 1).all()
    wanted = smooth["single_transformer_blocks.0.proj_out.linears.0"]
    assert torch.equal(model.plain[f"{name}.smooth_orig"], wanted)
    export_quantized(model, tmp_path / "x.safetensors")
    assert_same_model(import_quantized(tmp_path / "x.safetensors"), model)


@pytest.mark.parametrize("kind", ["nunchaku-v1", "nunchaku-v2", "nunchaku-legacy"])
def test_a_flux_model_returns_from_every_nunchaku_format(tmp_path: Path, kind: str) -> None:
    model = import_quantized(intermediate_folder(tmp_path / "run"))
    path = tmp_path / "flux.safetensors"
    export_quantized(model, path, format=kind)
    assert detect_format(path) == kind
    again = import_quantized(path)
    assert_same_model(again, model)
    shifted = again.layers["transformer_blocks.0.mlp_context_fc2"]
    assert (shifted.activation, shifted.shift) == ("uint4", 0.171875)
    assert again.layers["transformer_blocks.0.norm1.linear"].activation == "16bit"


def test_v2_files_have_the_names_of_the_python_models(tmp_path: Path) -> None:
    model = import_quantized(intermediate_folder(tmp_path / "run"))
    export_quantized(model, tmp_path / "x.safetensors", format="nunchaku-v2")
    names = set(read_header(tmp_path / "x.safetensors"))
    assert "single_transformer_blocks.0.attn.to_out.proj_down" in names
    assert "transformer_blocks.0.attn.add_qkv_proj.smooth_factor" in names
    assert "transformer_blocks.0.attn.norm_added_q.weight" in names
    assert not any("lora_" in name or "mlp_fc2.lora" in name for name in names)


def test_a_deepcompressor_folder_names_what_it_lacks(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run")
    (folder / "branch.pt").unlink()
    with pytest.raises(WeightsError, match=r"branch\.pt is missing"):
        import_quantized(folder)


def test_a_deepcompressor_folder_must_say_where_lambda_is(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run", smooth=flux_inputs()["smooth"])
    with pytest.raises(WeightsError, match=r"proj\.fuse_when_possible"):
        import_quantized(folder)


def test_scales_of_another_run_are_noticed(tmp_path: Path) -> None:
    scale = flux_inputs()["scale"]
    name = "single_transformer_blocks.0.proj_mlp.weight.scale.0"
    scale[name] = scale[name] * 1.37
    folder = intermediate_folder(tmp_path / "run", scale=scale)
    with pytest.raises(WeightsError, match="do not lie on the grid"):
        import_quantized(folder)


def test_a_missing_weight_of_a_deepcompressor_run_is_named(tmp_path: Path) -> None:
    model = flux_inputs()["model"]
    del model["transformer_blocks.0.attn.to_k.weight"]
    folder = intermediate_folder(tmp_path / "run", model=model)
    with pytest.raises(WeightsError, match=r"transformer_blocks\.0\.attn\.to_k\.weight is missing"):
        import_quantized(folder)


def test_another_model_than_flux_is_refused_from_deepcompressor(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run", model={"blocks.0.weight": torch.ones(2, 2)})
    with pytest.raises(WeightsError, match="only FLUX transformers"):
        import_quantized(folder)


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("opened",)


def test_a_deepcompressor_pickle_that_holds_code_stays_closed(tmp_path: Path) -> None:
    folder = intermediate_folder(tmp_path / "run", scale={"x": Malicious()})
    with pytest.raises(UnsafeFile, match="more than tensors"):
        import_quantized(folder)
