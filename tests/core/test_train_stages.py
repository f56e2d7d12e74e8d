"""The whole training in seconds, on made-up sprites, and its continuation after a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gesso_core.hub import load_dc_ae, load_sana, require_its_autoencoder
from gesso_core.train.__main__ import main
from gesso_core.train.run_state import read_counters
from gesso_core.train.sprites import SpriteSet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


@pytest.fixture
def options(sprite_set: SpriteSet, tmp_path: Path) -> list[str]:
    sprite_set.save(tmp_path / "data" / "sprites-128.safetensors")
    folders = {"--data": "data", "--runs": "runs", "--weights": "weights"}
    paths = [part for name, folder in folders.items() for part in (name, str(tmp_path / folder))]
    return ["--profile", "smoke", *paths]


def test_all_stages_end_in_weight_folders_that_load(options: list[str], tmp_path: Path) -> None:
    assert main(["all", *options]) == 0
    autoencoder, denoiser = tmp_path / "weights" / "dcae-tiny", tmp_path / "weights" / "sana-tiny"
    require_its_autoencoder(denoiser, autoencoder)
    assert load_dc_ae(autoencoder).config.scaling_factor > 0
    assert load_sana(denoiser).config.caption_channels == 576
    card = json.loads((denoiser / "card.json").read_text())
    assert card["samples"] > 0
    assert len(card["autoencoder_sha256"]) == 64
    assert (tmp_path / "runs" / "smoke" / "denoiser" / "loss.png").exists()
    for name in ("hart-tiny", "vilau-tiny"):
        card = json.loads((tmp_path / "weights" / name / "card.json").read_text())
        assert card["samples"] > 0


def test_a_killed_run_continues_where_it_was_saved(options: list[str], tmp_path: Path) -> None:
    state = tmp_path / "runs" / "smoke" / "autoencoder" / "state.safetensors"
    command = [sys.executable, "-m", "gesso_core.train", "autoencoder", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = read_counters(state)
    assert main(["autoencoder", *options]) == 0
    finished = read_counters(state)
    assert finished["stage"] == "done"
    assert finished["step"] >= saved["step"] > 0
    assert finished["used_s"] < saved["used_s"] + 15
