"""The driver: resumes to the same bytes, refuses what does not belong together, tells errors."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gesso_core.errors import ConfigError, InvalidRequest, WeightsError
from gesso_core.hub import load_sana
from gesso_core.metrics import psnr
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import TextToImage
from gesso_core.ptq.calibration import MAXIMA
from gesso_core.ptq.driver import WORK, quantize_model
from gesso_core.ptq.report import QuantizationReport, load_report, plot_errors
from gesso_core.ptq.settings import Format, Settings
from gesso_core.quant.canonical import CANONICAL_FILE, read_canonical
from gesso_core.quant.record import QuantizedLinear
from gesso_core.safe_files import read_tensors
from torch import Tensor, from_numpy, nn

pytestmark = pytest.mark.slow  # as a whole

PROMPTS = ("a red apple", "an owl on a blue background")
CHOICES = {"rank": 4, "steps": 2, "prompts": PROMPTS, "max_tokens": 64, "layers": "sana"}
Quantize = Callable[..., QuantizationReport]


@pytest.fixture
def quantize(tiny_pipeline: Path) -> Quantize:
    def run(folder: Path, to: Format = "int4", **changes: object) -> QuantizationReport:
        choices = CHOICES | {"to": to} | changes
        return quantize_model(tiny_pipeline, folder, **choices)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captured inputs that several tests use."""
    return tmp_path_factory.mktemp("captured") / "inputs"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, captured: Path) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "int4"
    quantize_model(tiny_pipeline, folder, to="int4", captured=captured, **CHOICES)  # type: ignore[arg-type]
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from gesso_core.ptq.driver import quantize_model

torch.set_num_threads(1)

def on_progress(stage, done, total, name):
    if stage == "quantizing" and done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

pipeline, folder = map(Path, sys.argv[1:])
quantize_model(pipeline, folder, to="int4", on_progress=on_progress, **{choices!r})
"""


def test_killed_after_a_layer_it_ends_with_the_same_bytes(
    tiny_pipeline: Path, int4: Path, quantize: Quantize, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    code = KILLED.replace("{choices!r}", repr(CHOICES))
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tiny_pipeline), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert answer.returncode == -signal.SIGKILL
    assert not (folder / CANONICAL_FILE).exists()
    assert len(list((folder / WORK / "layers").iterdir())) == 5
    done: list[int] = []
    quantize(folder, on_progress=lambda stage, n, total, name: done.append(n))
    assert done == list(range(1, 15))  # nothing was drawn again
    for name in (CANONICAL_FILE, "quantization_report.json", "config.json"):
        assert sha256(folder / name) == sha256(int4 / name), name
    assert not (folder / WORK).exists()


def test_half_a_layer_is_never_taken_for_a_whole_one(
    int4: Path, captured: Path, quantize: Quantize, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, captured=captured, on_progress=stop)
    (whole,) = (folder / WORK / "layers").iterdir()
    whole.rename(whole.with_suffix(".partial"))  # as a kill in the middle of writing leaves it
    quantize(folder, captured=captured)
    assert sha256(folder / CANONICAL_FILE) == sha256(int4 / CANONICAL_FILE)


def test_a_finished_model_is_not_made_again(int4: Path, quantize: Quantize, captured: Path) -> None:
    before = (int4 / CANONICAL_FILE).stat().st_mtime_ns
    calls: list[str] = []
    report = quantize(int4, captured=captured, on_progress=lambda stage, *_: calls.append(stage))
    assert calls == []
    assert report == load_report(int4)
    assert (int4 / CANONICAL_FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": 8}, "rank 4 instead of 8"),
        ({"gptq": True}, "gptq False instead of True"),
        ({"steps": 3}, "calibration steps 2 instead of 3"),
        ({"prompts": ("a cat", "a dog")}, "prompts_sha256"),
    ],
)
def test_other_choices_are_refused_for_a_finished_and_an_unfinished_run(
    int4: Path,
    captured: Path,
    quantize: Quantize,
    tmp_path: Path,
    change: dict[str, object],
    told: str,
) -> None:
    with pytest.raises(WeightsError, match="--fresh") as error:
        quantize(int4, captured=captured, **change)
    assert told in error.value.message

    def stop(stage: str, done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "unfinished", captured=captured, on_progress=stop)
    with pytest.raises(WeightsError, match=r"unfinished work.*--fresh") as error:
        quantize(tmp_path / "unfinished", captured=captured, **change)
    assert told in error.value.message


def test_fresh_begins_anew_with_other_choices(quantize: Quantize, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, name: str) -> None:
        if stage == "quantizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path, on_progress=stop)
    report = quantize(tmp_path, rank=8, steps=3, resume=False)
    assert report.rank == 8


def test_a_folder_of_other_things_is_never_emptied(quantize: Quantize, tmp_path: Path) -> None:
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("x")
    for resume in (True, False):
        with pytest.raises(WeightsError, match="not captured inputs"):
            quantize(tmp_path / "out", captured=precious.parent, resume=resume)
    assert precious.exists()


def test_lost_captures_of_a_half_done_run_are_made_again(
    quantize: Quantize, int4: Path, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int, name: str) -> None:
        if done == 3 and stage == "quantizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path, on_progress=stop)
    (tmp_path / WORK / "calibration" / "calibration.json").unlink()
    for path in (tmp_path / WORK / "calibration").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(WeightsError, match="not captured inputs"):
        quantize(tmp_path)
    quantize(tmp_path, captured=tmp_path / "elsewhere")
    assert sha256(tmp_path / CANONICAL_FILE) == sha256(int4 / CANONICAL_FILE)


def test_the_report_has_every_layer_and_counts_the_bytes(
    int4: Path, captured: Path, tiny_pipeline: Path
) -> None:
    report, content = load_report(int4), read_canonical(int4 / CANONICAL_FILE)
    assert [layer.name for layer in report.layers] == sorted(
        content.layers, key=[layer.name for layer in report.layers].index
    )
    assert len(report.layers) == 14
    stored = [*content.plain.values()]
    stored += [t for layer in content.layers.values() for t in layer.tensors().values()]
    assert report.nbytes == sum(tensor.nbytes for tensor in stored)
    dense = load_sana(tiny_pipeline / "transformer")
    assert report.nbytes_16bit == 2 * sum(p.numel() for p in dense.parameters())
    assert report.nbytes < report.nbytes_16bit
    maxima = read_tensors(captured / MAXIMA)
    assert report.error < report.naive
    for layer in report.layers:
        assert 0 < layer.error < 0.5
        assert layer.largest_input == float(maxima[layer.name].max()) > 0
        assert f"| {layer.name} |" in report.markdown()
    assert (int4 / "quantization_report.md").read_text() == report.markdown() + "\n"


def test_a_damaged_report_is_told(tmp_path: Path) -> None:
    (tmp_path / "quantization_report.json").write_text('{"layers": [{"name": 1}]}')
    with pytest.raises(WeightsError, match="not a report of gesso quantize"):
        load_report(tmp_path)


def test_the_errors_are_plotted(int4: Path, tmp_path: Path) -> None:
    plot_errors([load_report(int4)], tmp_path / "plots" / "errors.png")
    assert (tmp_path / "plots" / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_says_what_to_install(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"gesso\[train\]"):
        plot_errors([load_report(int4)], tmp_path / "errors.png")


def test_every_format_can_be_had_and_eight_bits_are_the_finest(
    int4: Path, captured: Path, quantize: Quantize, tmp_path: Path
) -> None:
    nvfp4 = quantize(tmp_path / "nvfp4", "nvfp4", captured=captured)
    w8a8 = quantize(tmp_path / "w8a8", "w8a8", captured=captured)
    assert min(load_report(int4).error, nvfp4.error) > 3 * w8a8.error
    kinds = {
        name: {(r.weight, r.activation) for r in layers(tmp_path / name).values()}
        for name in ("nvfp4", "w8a8")
    }
    assert kinds == {
        "nvfp4": {("nvfp4", "nvfp4"), ("nvfp4", "16bit")},
        "w8a8": {("int8", "int8"), ("int8", "16bit")},
    }


def layers(folder: Path) -> dict[str, QuantizedLinear]:
    return dict(read_canonical(folder / CANONICAL_FILE).layers)


def test_another_map_leaves_keys_and_values_in_16_bit(
    tiny_pipeline: Path, quantize: Quantize, tmp_path: Path
) -> None:
    quantize(tmp_path, layers="sana-nunchaku")
    content = read_canonical(tmp_path / CANONICAL_FILE)
    assert "blocks.0.cross.kv.weight" in content.plain
    assert not any(name.endswith("cross.kv") for name in content.layers)
    assert set(content.made_by["calibration"]["layers"]) == set(content.layers)


def test_the_result_draws_nearly_the_same_picture(
    tiny_pipeline: Path, int4: Path, tmp_path: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    for part in ("vae", "text_encoder"):
        (pipeline / part).symlink_to(tiny_pipeline / part)
    (pipeline / "transformer").symlink_to(int4)
    exact, quantized = (picture(TextToImage.load(folder)) for folder in (tiny_pipeline, pipeline))
    assert not np.array_equal(exact, quantized)
    assert float(psnr(quantized, exact)) > 15


def picture(pipeline: TextToImage) -> Tensor:
    request = GenerationRequest(prompt="a red apple", width=64, height=64, seed=1, steps=4)
    (made,) = pipeline(request)
    return from_numpy(made.pixels_HWC.copy()).permute(2, 0, 1)[None] / 127.5 - 1


def test_a_quantized_model_is_not_quantized_again(
    tmp_path: Path, int4: Path, tiny_pipeline: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    for part in ("vae", "text_encoder"):
        (pipeline / part).symlink_to(tiny_pipeline / part)
    (pipeline / "transformer").symlink_to(int4)
    with pytest.raises(InvalidRequest, match="quantized already"):
        quantize_model(pipeline, tmp_path / "out", to="int4", prompts=PROMPTS)


def test_a_rank_that_a_layer_has_not_is_refused_before_anything_is_drawn(
    quantize: Quantize, tmp_path: Path
) -> None:
    calls: list[str] = []
    with pytest.raises(InvalidRequest, match="at most 64"):
        quantize(tmp_path, rank=65, on_progress=lambda stage, *_: calls.append(stage))
    assert calls == []


def test_a_folder_that_cannot_be_written_is_refused(quantize: Quantize, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/quantized")):
        with pytest.raises(InvalidRequest, match="name a new folder") as error:
            quantize(folder)
        assert str(folder) in error.value.message


def test_gptq_keeps_rows_enough_for_the_widest_layer() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(64, 64), nn.Linear(5600, 64)

    def kept(*, gptq: bool, keep_tokens: bool = False) -> int:
        settings = Settings(
            to="int4", rank=32, gptq=gptq, svd="randomized", layers="sana", steps=None, seed=0,
            max_tokens=4096,
        )  # fmt: skip
        return settings.for_layers(Wide(), ("narrow", "wide"), keep_tokens=keep_tokens).max_tokens

    assert kept(gptq=True) == 2 * 5600
    assert kept(gptq=False) == kept(gptq=True, keep_tokens=True) == 4096


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"to": "int3"}, InvalidRequest, "int4, nvfp4, w8a8"),
        ({"rank": -1}, InvalidRequest, "rank -1"),
        ({"rank": 100}, InvalidRequest, "at most 64"),
        ({"prompts": ()}, InvalidRequest, "has no prompts"),
        ({"prompts": None}, InvalidRequest, "--prompts FILE"),
        ({"layers": "lumina"}, ConfigError, "no layer map 'lumina'"),
        ({"steps": 1000}, InvalidRequest, "1000 steps"),
        ({"gptq": True}, InvalidRequest, "with more prompts"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_told(
    quantize: Quantize,
    captured: Path,
    tmp_path: Path,
    change: dict[str, object],
    error: type[Exception],
    told: str,
) -> None:
    with pytest.raises(error, match=told):
        quantize(tmp_path, **({"max_tokens": 32} | change))
