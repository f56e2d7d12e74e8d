"""The canonical file: what one says comes back exactly, and a damaged one names its layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.hub.quantized import load_quantized_sana
from gesso_core.hub.store import SHIPPED
from gesso_core.quant.canonical import (
    CANONICAL_FILE,
    METADATA_KEY,
    read_about,
    read_canonical,
    write_canonical,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "blocks.0.cross.q"
Json = dict[str, Any]


@pytest.fixture
def file(quantized_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of a canonical file, beside its configuration, that a test may damage."""
    for name in (CANONICAL_FILE, "config.json"):
        (tmp_path / name).write_bytes((quantized_pipeline / "transformer" / name).read_bytes())
    return tmp_path / CANONICAL_FILE


def refused(file: Path, told: str) -> None:
    """Both readers refuse it: the file alone, and the loader of the model."""
    with pytest.raises(WeightsError, match=told):
        read_canonical(file)
    with pytest.raises(WeightsError, match=told):
        load_quantized_sana(file.parent)


def with_facts(file: Path, **facts: Any) -> None:
    about = read_about(file)
    about["layers"][NAME] |= facts
    with_about(file, about)


def with_about(file: Path, about: Any) -> None:
    save_file(load_file(file), file, {METADATA_KEY: json.dumps(about)})


def with_tensor(file: Path, part: str, tensor: Tensor) -> None:
    about = json.dumps(read_about(file))
    tensors = load_file(file) | {f"{NAME}.{part}": tensor.contiguous()}
    save_file(tensors, file, {METADATA_KEY: about})


@pytest.mark.parametrize("name", ["sana-tiny-int4", "sana-tiny-nvfp4", "sana-tiny-w8a8"])
def test_a_file_read_and_written_again_is_the_same_byte_for_byte(name: str, tmp_path: Path) -> None:
    source = SHIPPED / name / CANONICAL_FILE
    write_canonical(tmp_path / "again.safetensors", read_canonical(source))
    assert (tmp_path / "again.safetensors").read_bytes() == source.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_others_may_read_the_file_as_they_may_read_any_other(file: Path) -> None:
    write_canonical(file, read_canonical(file))
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


@pytest.mark.parametrize(
    ("fact", "values"),
    [
        ("weight", ["int2", ["int4"], {}, None, "nvfp4", "int8"]),
        ("activation", ["fp8", 3, None, "nvfp4"]),
        ("in_features", [-1, 0, 65, "64", 64.0, True, None, [64]]),
        ("shift", ["0.1", float("nan"), float("inf"), 1e30, None, [], True]),
    ],
)
def test_facts_of_a_wrong_kind_name_the_layer(file: Path, fact: str, values: list[Any]) -> None:
    for value in values:
        with_facts(file, **{fact: value})
        refused(file, NAME.replace(".", r"\."))


def test_unknown_and_missing_facts_name_the_layer(file: Path) -> None:
    about = read_about(file)
    wrong: list[Any] = [[], None, 5, {}, {**about["layers"][NAME], "colour": "red"}]
    for facts in wrong:
        with_about(file, {**about, "layers": {**about["layers"], NAME: facts}})
        refused(file, rf"^{NAME} in .* is incomplete")


Damage = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("part", "damages"),
    [
        (
            "codes",
            [
                Tensor.long,
                Tensor.float,
                lambda t: t.view(torch.int8),
                Tensor.flatten,
                lambda t: t[:, :0],
                lambda t: t[:0],
                lambda t: t[None],
                lambda t: t[0, 0],
                lambda t: t[:, :-1],
            ],
        ),
        (
            "scale",
            [
                Tensor.double,
                Tensor.int,
                Tensor.bool,
                lambda t: t * torch.nan,
                lambda t: t.to(torch.float8_e4m3fn),
                Tensor.flatten,
            ],
        ),
        ("smooth", [torch.zeros_like, Tensor.double, lambda t: t / 0, lambda t: t[:-1]]),
        ("down", [Tensor.long, lambda t: t / 0, lambda t: t[0], lambda t: t[:1], lambda t: t.T]),
        ("up", [Tensor.long, lambda t: t.to(torch.complex64), lambda t: t.T, lambda t: t[0]]),
        ("bias", [Tensor.long, Tensor.double, lambda t: t * torch.nan, lambda t: t[0]]),
    ],
)
def test_tensors_of_a_wrong_kind_name_the_layer(
    file: Path, part: str, damages: list[Damage]
) -> None:
    whole = load_file(file)[f"{NAME}.{part}"]
    for damage in damages:
        with_tensor(file, part, damage(whole))
        refused(file, NAME.replace(".", r"\."))
    with_tensor(file, part, whole)
    read_canonical(file)


@pytest.mark.parametrize("part", ["zero", "tensor_scale"])
def test_tensors_that_the_format_does_not_have_are_refused(file: Path, part: str) -> None:
    scale = load_file(file)[f"{NAME}.scale"]
    with_tensor(file, part, scale if part == "zero" else torch.ones(1))
    refused(file, rf"{NAME}\.{part} is for")


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "a..b", "", "blocks.0", "__class__", "blocks.0.__class__.q"],
)
def test_a_layer_with_a_strange_name_is_refused(file: Path, name: str) -> None:
    about = read_about(file)
    about["layers"][name] = about["layers"].pop(NAME)
    renamed = {
        name + key.removeprefix(NAME) if key.startswith(f"{NAME}.") else key: tensor
        for key, tensor in load_file(file).items()
    }
    save_file(renamed, file, {METADATA_KEY: json.dumps(about)})
    with pytest.raises(WeightsError, match="which is no linear layer of this Sana"):
        load_quantized_sana(file.parent)


def test_whole_numbers_in_the_place_of_plain_weights_are_refused(file: Path) -> None:
    about = json.dumps(read_about(file))
    tensors = load_file(file)
    tensors["blocks.0.table"] = tensors["blocks.0.table"].long()
    save_file(tensors, file, {METADATA_KEY: about})
    with pytest.raises(WeightsError, match=r"no real numbers: blocks\.0\.table is torch\.int64"):
        load_quantized_sana(file.parent)


def test_damaged_metadata_is_told(file: Path) -> None:
    about = read_about(file)
    damaged: list[Any] = [
        [],
        5,
        {**about, "layers": list(about["layers"])},
        {**about, "layers": {}},
        {**about, "made_by": [1]},
        {"version": 1},
    ]
    for content in damaged:
        with_about(file, content)
        refused(file, "damaged 'gesso_quantization' metadata")
    for version in (2, "1", True, 1.0, None):
        with_about(file, {**about, "version": version})
        refused(file, "is a quantized file of version")
    for text in ("{", "[" * 100_000, ""):
        save_file(load_file(file), file, {METADATA_KEY: text})
        refused(file, "damaged 'gesso_quantization' metadata")


def test_a_file_cut_anywhere_is_told(file: Path) -> None:
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    cuts = (0, 1, 7, 8, 9, 100, header, header + 8, header + 9, len(whole) // 2, len(whole) - 1)
    for cut in cuts:
        file.write_bytes(whole[:cut])
        refused(file, "not a complete safetensors file")
    file.write_bytes(whole + b"\0")
    refused(file, "not a complete safetensors file")


def test_a_header_that_lies_is_told(file: Path) -> None:
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + length].decode(), whole[8 + length :]

    def with_header(header: str) -> None:
        content = header.encode()
        file.write_bytes(len(content).to_bytes(8, "little") + content + data)

    file.write_bytes((10**18).to_bytes(8, "little") + whole[8:])
    refused(file, "a header of 1000000000000000000 bytes")
    for start, lie in (
        ('"data_offsets":[0,', '"data_offsets":[1,'),
        ('"shape":[', '"shape":[-'),
        ('"shape":[', '"shape":[99999999999,'),
        ('"U8"', '"F99"'),
        ('"__metadata__":{', '"__metadata__":[{'),
    ):
        with_header(text.replace(start, lie, 1))
        refused(file, "not a complete safetensors file")
    for header in ('{"__metadata__":[1]}', '{"__metadata__":{"a":1}}', "[]", '{"x":5}'):
        with_header(header)
        refused(file, "not a complete safetensors file")
    with_header('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1e999]}}')
    refused(file, "no readable header")
