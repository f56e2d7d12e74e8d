"""``gesso generate --lora`` as a person types it."""

from pathlib import Path

import numpy as np
import pytest
from gesso_core.pipelines.pictures import Pixels, decode_picture
from gesso_services.cli.main import app
from typer.testing import CliRunner, Result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    return tmp_path


def paint(*words: str, local: bool = True) -> Result:
    options = ("--seed", "3", "--steps", "2", "--model", "sana-tiny-int4", "-o", "a.png")
    where = ("--local",) if local else ("--url", "http://127.0.0.1:9")
    # A wide terminal, so that sentences are not broken into lines.
    return CliRunner().invoke(
        app, ["generate", "a dog", *where, *options, *words], env={"COLUMNS": "300", "TERM": "dumb"}
    )


def pixels(*words: str) -> Pixels:
    result = paint(*words)
    assert result.exit_code == 0, result.output
    return decode_picture(Path("a.png").read_bytes())


def test_a_lora_changes_the_picture_of_a_quantized_model_by_its_strength(here: Path) -> None:
    plain, nothing, some, whole = (
        pixels(*words)
        for words in ((), ("--lora", "ink:0"), ("--lora", "ink:0.5"), ("--lora", "ink"))
    )
    assert np.array_equal(plain, nothing)
    assert not np.array_equal(plain, some)
    assert not np.array_equal(some, whole)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--lora", "../ink"), "there is no LoRA '../ink'; available: ink"),
        (("--lora", ""), "there is no LoRA ''; available: ink"),
        (("--lora", "ink:"), "'' is not a number; write it like ink:0.8"),
        (("--lora", "ink:strong"), "'strong' is not a number; write it like ink:0.8"),
        (("--lora", "ink:nan"), "strength nan of the LoRA 'ink'; allowed are -4 to 4"),
        (("--lora", "ink:5"), "strength 5.0 of the LoRA 'ink'; allowed are -4 to 4"),
        (("--lora", "ink", "--lora", "ink"), "each once"),
        (tuple(w for n in "abcde" for w in ("--lora", n)), "5 LoRAs (a, b, c, d, e); ask for at"),
        (("--lora", "ink", "--lora-folder", "empty"), "files there that are named like"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_one_sentence(here: Path, words: tuple[str, ...], sentence: str) -> None:
    result = paint(*words)
    assert result.exit_code == 1, result.output
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert not (here / "a.png").exists()


def test_a_folder_of_loras_is_for_local_painting(here: Path) -> None:
    result = paint("--lora-folder", "empty", local=False)
    assert result.exit_code == 1
    assert "--lora-folder empty is for --local" in result.stderr
