"""Every way in which a quantized file is bad is refused, by name."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from gesso_core.errors import UnsafeFile, WeightsError
from gesso_core.interchange.formats import detect_format, export_quantized, import_quantized
from gesso_core.interchange.nunchaku.linear import pack_layer
from gesso_core.safe_files import read_header, read_tensors
from quantized_files import (
    flux_inputs,
    intermediate_folder,
    modelopt_tensors,
    random_layer,
    sana_config,
    sana_model,
    written_without,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "whole numbers": Tensor.long,
    "float64": Tensor.double,
    "8 bit": lambda t: t.to(torch.int8),
    "flat": Tensor.flatten,
    "a row less": lambda t: t[:-1] if t.ndim else t,
    "empty": lambda t: t[:0] if t.ndim else t,
    "one number": lambda t: t.flatten()[0],
    "transposed": lambda t: t.T if t.ndim == 2 else t[None],
    "infinite": lambda t: t / 0 if t.is_floating_point() and t.element_size() > 1 else t.float(),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["nunchaku-v1", "modelopt", "deepcompressor"])
def test_a_damaged_tensor_is_refused_or_makes_a_layer_that_can_run(
    tmp_path: Path, kind: str, damage: str
) -> None:
    for number, write in enumerate(files_with_each_tensor(kind)):
        path = tmp_path / str(number)
        write(path, DAMAGES[damage])
        try:
            model = import_quantized(path)
        except WeightsError:
            continue
        for layer, record in model.layers.items():
            record.require_valid(layer)


Write = Callable[[Path, Callable[[Tensor], Tensor]], object]


def files_with_each_tensor(kind: str) -> Iterator[Write]:
    """A writer of a file per tensor, in which that tensor is changed."""
    if kind == "deepcompressor":
        for part, tensors in flux_inputs().items():
            if part != "branch":
                for name in [n for n in tensors if n.startswith("transformer_blocks.0.")][::3]:
                    yield partial(changed_intermediate, part, name)
        return
    if kind == "modelopt":
        tensors, metadata = modelopt_tensors(), None
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder, "x.safetensors")
            export_quantized(sana_model(), path, config=sana_config())
            tensors, metadata = load_file(path), read_header(path)["__metadata__"]
    for name in [n for n in tensors if "_blocks.1." not in n]:
        yield partial(changed_file, tensors, metadata, name)


def changed_file(
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None,
    name: str,
    path: Path,
    damage: Callable[[Tensor], Tensor],
) -> None:
    save_file(tensors | {name: damage(tensors[name]).contiguous()}, path, metadata)


def changed_intermediate(
    part: str, name: str, path: Path, damage: Callable[[Tensor], Tensor]
) -> None:
    tensors: dict[str, object] = dict(flux_inputs()[part])
    tensors[name] = damage(flux_inputs()[part][name])
    extra = {"proj.fuse_when_possible": False} if part == "smooth" else {}
    intermediate_folder(path, **{part: tensors | extra})


@pytest.mark.parametrize("key", ["gesso_layers", "config", "quantization_config", "gesso_made_by"])
def test_damaged_metadata_of_a_nunchaku_file_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.safetensors"
    export_quantized(sana_model(), path, config=sana_config())
    tensors, metadata = load_file(path), read_header(path)["__metadata__"]
    for text in ("{", "[]", "5", "null", "[" * 50_000):
        save_file(tensors, path, metadata | {key: text})
        with pytest.raises(WeightsError, match=f"metadata entry {key!r} is not"):
            import_quantized(path)


@pytest.mark.parametrize("value", [-1, "x", 65, 10**9, 2.5, True, None])
def test_sizes_of_a_nunchaku_file_that_cannot_be_are_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.safetensors"
    export_quantized(sana_model(), path, config=sana_config())
    tensors, metadata = load_file(path), read_header(path)["__metadata__"]
    for count in ("out_features", "columns", "rank"):
        sizes = json.loads(metadata["gesso_layers"])
        sizes["transformer_blocks.0.attn.out_proj"][count] = value
        save_file(tensors, path, metadata | {"gesso_layers": json.dumps(sizes)})
        if (count, value) != ("out_features", 65):  # a layer may have any number of rows
            with pytest.raises(WeightsError):
                import_quantized(path)


@pytest.mark.parametrize("value", [-1, "x", [1], 1e308, float("nan"), True])
@pytest.mark.parametrize("key", ["num_attention_heads", "attention_head_dim", "mlp_ratio"])
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "x.safetensors"
    export_quantized(sana_model(), path, config=sana_config())
    tensors, metadata = load_file(path), read_header(path)["__metadata__"]
    config = sana_config() | {key: value}
    save_file(tensors, path, metadata | {"config": json.dumps(config)})
    with pytest.raises(WeightsError, match=f"has {key} .*expected a number from 0"):
        import_quantized(path)


def good_file(tmp_path: Path) -> Path:
    return written_without(tmp_path, sana_model())


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    tensors, metadata = read_tensors(path), read_header(path)["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = good_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        import_quantized(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is missing"):
        detect_format(tmp_path / "absent.safetensors")


def test_classic_and_v2_names_in_one_file_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        name = "transformer_blocks.0.attn.out_proj.lora_down"
        tensors[name.replace("lora_down", "proj_down")] = tensors.pop(name)

    with pytest.raises(WeightsError, match=r"classic names .* beside those of v2"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_fp4_tensors_with_int4_metadata_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        claims = json.loads(metadata["quantization_config"])
        claims["weight"]["dtype"] = "fp4_e2m1_all"
        metadata["quantization_config"] = json.dumps(claims)

    with pytest.raises(WeightsError, match="says fp4_e2m1_all weights, the tensors are int4"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_another_rank_in_the_metadata_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        claims = json.loads(metadata["quantization_config"])
        metadata["quantization_config"] = json.dumps(claims | {"rank": 128})

    with pytest.raises(WeightsError, match="says rank 128, the layers have rank 32"):
        import_quantized(rewritten(good_file(tmp_path), change))


@pytest.mark.parametrize("what", ["rank", "precision"])
def test_layers_that_differ_in_rank_or_precision_are_refused(tmp_path: Path, what: str) -> None:
    other = random_layer(96, 96, 64) if what == "rank" else random_layer(96, 96, 32, "nvfp4")

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        layer = "transformer_blocks.1.cross_attn.q_linear"
        tensors |= {f"{layer}.{leaf}": t for leaf, t in pack_layer(layer, other).items()}

    with pytest.raises(WeightsError, match=f"differ in {what}"):
        import_quantized(rewritten(good_file(tmp_path), change))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("lora_up", r"lacks \['lora_up'\]"),
        ("wscales", r"lacks \['wscales'\]"),
        ("qweight", "qweight is missing"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, leaf: str, message: str) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        del tensors[f"transformer_blocks.0.attn.out_proj.{leaf}"]

    with pytest.raises(WeightsError, match=message):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        name = "transformer_blocks.0.attn.out_proj.smooth"
        tensors[name] = tensors[name].repeat(2)

    with pytest.raises(WeightsError, match=r"transformer_blocks\.0\.attn\.out_proj"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_an_unknown_layer_of_a_sana_file_is_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        layer = "transformer_blocks.0.attn.gate_proj"
        packed = pack_layer(layer, random_layer(96, 96, 32))
        tensors |= {f"{layer}.{leaf}": t for leaf, t in packed.items()}

    with pytest.raises(WeightsError, match=r"gate_proj is no 4-bit layer of SANA"):
        import_quantized(rewritten(good_file(tmp_path), change))


def test_a_file_without_quantized_layers_is_refused(tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="no quantized layers of a known format"):
        import_quantized(tmp_path / "x.safetensors")


def test_sizes_larger_than_the_tensors_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        sizes = json.loads(metadata["gesso_layers"])
        sizes["transformer_blocks.0.cross_attn.q_linear"]["columns"] = 4096
        metadata["gesso_layers"] = json.dumps(sizes)

    with pytest.raises(WeightsError, match="smaller than the 96x4096"):
        import_quantized(rewritten(good_file(tmp_path), change))


@pytest.mark.parametrize("kind", ["deepcompressor", "modelopt", "gguf"])
def test_formats_that_are_import_only_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(WeightsError, match="use one of canonical, nunchaku-v1"):
        export_quantized(sana_model(), tmp_path / "x", format=kind)


def test_a_legacy_folder_with_one_file_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "legacy"
    export_quantized(sana_model(), folder, format="nunchaku-legacy", config=sana_config())
    rest = read_tensors(folder / "unquantized_layers.safetensors")
    rest["transformer_blocks.0.scale_shift_table"] = torch.zeros(6, 96)
    save_file(rest, folder / "unquantized_layers.safetensors")
    with pytest.raises(WeightsError, match="both hold transformer_blocks"):
        import_quantized(folder)
    (folder / "unquantized_layers.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"unquantized_layers\.safetensors is missing"):
        import_quantized(folder)


def test_a_pickle_given_as_a_file_stays_closed(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(UnsafeFile, match="is a pickle"):
        detect_format(tmp_path / "x.pt")
