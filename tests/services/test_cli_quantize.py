"""``gesso quantize`` as a person types it, on the model that ships; and files of other tools."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gesso_core.hub.store import SHIPPED
from gesso_core.interchange.nunchaku.sana import with_dense_text_layers
from gesso_core.pipelines.pictures import decode_picture
from gesso_core.ptq.report import load_report
from gesso_core.quant.canonical import CANONICAL_FILE, read_canonical
from gesso_core.quant.record import QuantizedLinear
from gesso_services.cli import quantize as command
from gesso_services.cli.main import app
from torch import Tensor
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.slow  # as a whole

PROMPTS = "a red apple\nan owl on a blue background, 3D style\n\na rocket\na birthday cake\n"
QUICK = ("--rank", "8", "--steps", "1", "--prompts", "prompts.txt")


def gesso(*words: str) -> Result:
    # A wide terminal, so that sentences are not broken into lines.
    return CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The shipped model quantized, and what the command said."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "prompts.txt").write_text(PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("--to", "int4", "--out", "small", "--plot", "errors.png", *QUICK)
        return folder / "small", gesso("quantize", "sana-tiny", *words)


def failed(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr, result.stderr


def test_it_writes_the_model_and_ends_with_the_errors_of_the_layers(
    int4: tuple[Path, Result],
) -> None:
    folder, result = int4
    assert result.exit_code == 0, result.output
    report = load_report(folder)
    assert len(report.layers) == 56
    assert report.markdown() in result.stdout
    assert "gesso generate --local --model small" in result.stdout
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        CANONICAL_FILE,
        "quantization_report.json",
        "quantization_report.md",
    }
    assert (folder.parent / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_the_quantized_folder_paints(int4: tuple[Path, Result], here: Path) -> None:
    words = ("--local", "--model", str(int4[0]), "--steps", "2", "--seed", "3", "-o", "a.png")
    result = gesso("generate", "a red apple", *words)
    assert result.exit_code == 0, result.output
    assert decode_picture((here / "a.png").read_bytes()).shape == (64, 64, 3)
    assert gesso("models", "verify", str(int4[0]), "--deep").exit_code == 0


def test_the_same_command_again_is_done_at_once_and_another_is_refused(
    int4: tuple[Path, Result], here: Path
) -> None:
    words = ("quantize", "sana-tiny", "--out", str(int4[0]), *QUICK)
    again = gesso(*words, "--to", "int4")
    assert again.exit_code == 0, again.output
    assert load_report(int4[0]).markdown() in again.stdout
    failed(gesso(*words, "--to", "w8a8"), "to int4 instead of w8a8", "--fresh")
    failed(gesso(*words, "--to", "int4", "--keep-cross-kv"), "layers sana instead of")


def test_stopped_by_hand_it_says_that_it_can_go_on(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: object, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command._Lines, "show", stop)
    result = gesso("quantize", "sana-tiny", "--to", "nvfp4", *QUICK)
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.stderr
    assert (here / "sana-tiny-nvfp4" / ".work").is_dir()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("sanna", "--to", "int4"), "unknown model 'sanna'"),
        (("dcae-tiny", "--to", "int4"), "expected a Sana"),
        (("sana-1.6b-1024", "--to", "int4"), "gesso models pull"),
        (("sana-tiny", "--to", "int4", "--prompts", "none.txt"), "none.txt cannot be read"),
        (("sana-tiny", "--to", "int4", "--rank", "500"), "at most 160"),
        (("sana-tiny", "--to", "int4", "--plot", "errors.pdf"), "must end in .png"),
        (("sana-tiny", "--to", "int4", "--captured", "."), "give another folder"),
        (("sana-tiny", "--to", "int4", "--out", "prompts.txt"), "name a new folder"),
        (("sana-tiny", "--to", "int4", "--out", "prompts.txt/x"), "name a new folder"),
        (("sana-tiny-int4", "--to", "int4"), "is quantized already"),
        (("prompts.txt", "--to", "int4"), "prompts.txt is a file; give the folder of a model"),
        (("./none", "--to", "int4"), "./none does not exist; give the folder of a model"),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_an_error_is_one_sentence(here: Path, words: tuple[str, ...], sentence: str) -> None:
    quick = () if "--prompts" in words else QUICK[2:]
    failed(gesso("quantize", *words, *quick), sentence)


def test_an_unknown_format_is_refused_by_the_command_line(here: Path) -> None:
    result = gesso("quantize", "sana-tiny", "--to", "int3")
    assert result.exit_code == 2
    assert "nvfp4" in result.output


@pytest.fixture(scope="module")
def tiny_int4(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> tuple[Path, Result]:
    """A pipeline folder quantized with dense text layers, and what the command said."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "prompts.txt").write_text(PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("--to", "int4", "--out", "ours", *QUICK, "--keep-cross-kv")
        return folder / "ours", gesso("quantize", str(tiny_pipeline), *words)


def test_a_folder_pipeline_says_where_its_result_belongs(
    tiny_int4: tuple[Path, Result], tiny_pipeline: Path
) -> None:
    _, result = tiny_int4
    assert result.exit_code == 0, result.output
    assert f"in the place of {tiny_pipeline / 'transformer'}" in result.stdout


@pytest.mark.parametrize("file_format", ["nunchaku-v1", "nunchaku-v2"])
def test_a_model_goes_out_to_nunchaku_and_comes_back(
    here: Path, tiny_int4: tuple[Path, Result], file_format: str
) -> None:
    source, theirs = tiny_int4[0], "theirs.safetensors"
    exported = gesso("models", "export-quantized", str(source), theirs, "--format", file_format)
    assert exported.exit_code == 0, exported.output
    assert f"12 quantized layers, as {file_format}" in exported.stdout
    imported = gesso("models", "import-quantized", theirs, "back", "--model", "sana-tiny")
    assert imported.exit_code == 0, imported.output
    ours, back = (read_canonical(Path(name, CANONICAL_FILE)) for name in (source, "back"))
    assert back.made_by["model"] == "sana-tiny"
    assert ours.layers.keys() == back.layers.keys()
    for name, layer in ours.layers.items():
        assert layer.codes.equal(back.layers[name].codes), name
        assert layer.scale.equal(back.layers[name].scale), name
    assert (here / "back" / "config.json").is_file()
    failed(gesso("models", "import-quantized", theirs, "back"), "is there already")
    failed(gesso("models", "export-quantized", str(source), theirs), "is there already")
    lite = gesso("models", "export-quantized", str(source), "lite", "--format", "nunchaku-lite")
    failed(lite, "export this model as nunchaku-v1")


@pytest.mark.parametrize("file_format", ["nunchaku-v1", "nunchaku-v2"])
@pytest.mark.parametrize("name", ["sana-tiny-int4", "sana-tiny-nvfp4"])
def test_a_shipped_model_returns_from_nunchaku_tensor_by_tensor(
    here: Path, name: str, file_format: str
) -> None:
    theirs = f"{name}.safetensors"
    exported = gesso("models", "export-quantized", name, theirs, "--format", file_format)
    assert exported.exit_code == 0, exported.output
    assert "keys and values of the text (8 layers) were written in 16 bit" in exported.stderr
    assert gesso("models", "import-quantized", theirs, "back").exit_code == 0
    shipped = with_dense_text_layers(read_canonical(SHIPPED / name / CANONICAL_FILE))
    back = read_canonical(here / "back" / CANONICAL_FILE)
    assert len(shipped.layers) == 48
    assert back.layers.keys() == shipped.layers.keys()
    for layer, ours in shipped.layers.items():
        theirs_again = back.layers[layer]
        assert facts(theirs_again) == facts(ours), layer
        assert same(theirs_again.tensors(), ours.tensors()), layer
    assert same(back.plain, shipped.plain)
    config = json.loads((here / "back" / "config.json").read_text())
    assert back.made_by == {**shipped.made_by, "config": config}
    painted = gesso("generate", "a dog", "--local", "--model", "back", "--steps", "1")
    assert painted.exit_code == 0, painted.output


def facts(layer: QuantizedLinear) -> tuple[object, ...]:
    return layer.weight, layer.activation, layer.in_features, layer.shift


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype
        and tensor.shape == expected[name].shape
        and tensor.view(torch.uint8).equal(expected[name].view(torch.uint8))
        for name, tensor in found.items()
    )


def test_what_cannot_be_exported_is_told(here: Path) -> None:
    for model, sentence in (
        ("sana-tiny", "sana-tiny is not quantized"),
        ("sana-tiny-w8a8", "quantize again --to int4 or nvfp4"),
        ("prompts.txt", "prompts.txt is a file; give the folder of a model"),
    ):
        failed(gesso("models", "export-quantized", model, "out.safetensors"), sentence)
    assert [path.name for path in here.iterdir()] == ["prompts.txt"]


def test_a_model_of_ours_is_imported_with_its_configuration(here: Path) -> None:
    source = SHIPPED / "sana-tiny-int4"
    assert gesso("models", "import-quantized", str(source), "copy").exit_code == 0
    for name in ("config.json", CANONICAL_FILE):
        assert (here / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_a_file_of_no_known_format_is_told(here: Path, tiny_pipeline: Any) -> None:
    file = tiny_pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    failed(gesso("models", "import-quantized", str(file), "out"), "no quantized layers")
    assert not (here / "out").exists()
