"""The command line as a person types it: files appear, errors are one sentence and exit code 1."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gesso_core.pipelines.pictures import decode_picture, encode_picture
from gesso_core.pipelines.videos import decode_video, encode_video
from gesso_services.cli.main import app
from typer.testing import CliRunner, Result

Run = Any


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``gesso`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("GESSO_URL", "GESSO_API_KEY", "NATS_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str, env: dict[str, str] | None = None) -> Result:
        # A wide terminal, so that sentences are not broken into lines.
        return CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"} | (env or {}))

    return run


@pytest.fixture
def asked(run: Run, server: Any) -> Run:
    """Run ``gesso`` with a server at GESSO_URL."""
    return lambda *words: run(*words, env={"GESSO_URL": server.url})


def failed(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.stderr, result.stderr


def test_version(run: Run) -> None:
    assert run("version").stdout.startswith("gesso 0.")
    assert run("--version").stdout == run("version").stdout


@pytest.mark.broker
def test_generate_writes_the_picture_and_says_the_seed(asked: Run, tmp_path: Path) -> None:
    result = asked("generate", "a red apple", "-o", "apple.webp", "--seed", "7", "--steps", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout == "apple.webp  seed 7\n"
    assert decode_picture((tmp_path / "apple.webp").read_bytes()).shape == (64, 64, 3)


@pytest.mark.broker
def test_several_pictures_are_numbered(asked: Run, tmp_path: Path) -> None:
    result = asked("generate", "a red apple", "-n", "2", "--seed", "7")
    assert result.stdout == "gesso-1.png  seed 7\ngesso-2.png  seed 8\n"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.broker
def test_an_unknown_subject_comes_with_suggestions(asked: Run) -> None:
    result = asked("generate", "an unheard of thing")
    assert result.exit_code == 0
    assert "a red apple" in result.stderr


def test_generate_works_in_this_process_without_a_server(
    run: Run, tmp_path: Path, tiny_pipeline: Path
) -> None:
    words = ("--local", "--model", str(tiny_pipeline), "--size", "64x64", "--steps", "2")
    result = run("generate", "a red apple", "-o", "a.png", "--seed", "7", *words)
    assert result.stdout == "a.png  seed 7\n", result.output
    assert decode_picture((tmp_path / "a.png").read_bytes()).shape == (64, 64, 3)


@pytest.mark.broker
def test_generate_draws_many_and_keeps_the_best(asked: Run, tmp_path: Path) -> None:
    words = ("--model", "hart-tiny", "--seed", "7", "--best-of", "4", "-n", "2", "--top-k", "600")
    result = asked("generate", "a red apple", *words)
    assert result.stdout == (
        "gesso-1.png  seed 10  score 0.039\ngesso-2.png  seed 9  score 0.035\n"
    ), result.output


@pytest.fixture
def white(tmp_path: Path) -> str:
    (tmp_path / "white.png").write_bytes(encode_picture(np.full((64, 64, 3), 255, np.uint8)))
    return "white.png"


@pytest.mark.broker
def test_vary_writes_a_picture_that_begins_like_another(
    asked: Run, tmp_path: Path, white: str
) -> None:
    result = asked("vary", white, "a pear", "--keep", "2", "--seed", "5", "-o", "b.png")
    assert result.stdout == "b.png  seed 5\n", result.output
    pixels = decode_picture((tmp_path / "b.png").read_bytes())
    assert (pixels[:32] == 255).all()
    assert (pixels[32:, :, 2] == 5).all()


@pytest.mark.broker
def test_video_writes_a_file_that_plays(asked: Run, tmp_path: Path) -> None:
    result = asked("video", "a kite", "-o", "kite.gif", "--seed", "3", "--fps", "5")
    assert result.stdout == "kite.gif  seed 3  1 s\n", result.output
    assert len(decode_video((tmp_path / "kite.gif").read_bytes(), 100)) == 5


@pytest.mark.broker
def test_ask_says_what_is_in_pictures_and_videos(asked: Run, tmp_path: Path, white: str) -> None:
    seen = "A picture of 64 by 64, mostly red."
    assert asked("ask", white, "what is this?").stdout == f"{seen}\n"
    frames = np.zeros((3, 32, 32, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None]
    (tmp_path / "a.mp4").write_bytes(encode_video(frames))
    assert asked("ask", white, "a.mp4", "and?").stdout == f"{seen} A video of 3 frames.\n"
    cut = asked("ask", "hello", "--seed", "4", "--max-tokens", "2")
    assert cut.stdout == "I see\n"
    assert "cut after 2 tokens" in cut.stderr


@pytest.mark.broker
def test_judge_prints_a_score_for_each_picture(asked: Run, tmp_path: Path, white: str) -> None:
    (tmp_path / "black.png").write_bytes(encode_picture(np.zeros((8, 8, 3), np.uint8)))
    result = asked("judge", white, "black.png", "something blue")
    assert result.stdout == "white.png  1.0000\nblack.png  0.0000\n"


@pytest.mark.broker
def test_reconstruct_prints_the_quality(asked: Run, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(encode_picture(np.zeros((32, 32, 3), np.uint8)))
    result = asked("reconstruct", "in.png", "-o", "out.png")
    assert result.stdout == "out.png  PSNR 100.00 dB  SSIM 1.0000\n"


@pytest.mark.broker
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("generate", "x", "-o", "a.gif"), "use one of .png, .jpg"),
        (("generate", "x", "-o", "nowhere/a.png"), "the folder nowhere does not exist"),
        (("generate", "x", "--size", "63x63"), "multiple of 8"),
        (("generate", "x", "--model", "sanna"), "unknown model 'sanna'"),
        (("generate", ""), "at least 1 character"),
        (("generate", "too large"), "try a smaller size"),
        (("reconstruct", "missing.png"), "missing.png: No such file"),
        (("generate", "x", "--best-of", "2", "-n", "3"), "best_of 2 is less than the 3"),
        (("generate", "x", "--judge", "vilau-tiny"), "nothing to choose from"),
        (("vary", "missing.png", "x"), "missing.png: No such file"),
        (("vary", "in.txt", "x"), "do not begin like a picture"),
        (("vary", "in.txt", "x", "-o", "a.gif"), "use one of .png"),
        (("video", "x", "-o", "a.png"), "use one of .mp4, .webp, .gif"),
        (("video", "x", "--model", "hart-tiny"), "cannot make a video here"),
        (("ask", "missing.png", "what?"), "missing.png: No such file"),
        (("ask", "in.txt"), "put the question in quotes"),
        (("ask", "in.txt", "what?"), "do not begin like a picture"),
        (("ask", "what?", "--model", "sana-tiny"), "use vilau-tiny"),
        (("judge", "in.txt"), "put the prompt in quotes"),
        (("judge", "a cat"), "no picture before 'a cat'"),
        (("judge", "in.txt", "a cat"), "do not begin like a picture"),
        (("jobs", "watch", "nobody"), "no job 'nobody'"),
        (("jobs", "cancel", "nobody"), "no job 'nobody'"),
        (("models", "pull", "sanna"), "unknown model 'sanna'"),
        (("models", "verify", "sana-1.6b-1024"), "gesso models pull"),
        (("models", "convert", "missing.pth", "a.safetensors"), "does not exist"),
        (("serve", "kitchen"), "there is no service 'kitchen'"),
        (("deploy",), "RAY_ADDRESS is not set"),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_an_error_is_one_sentence(
    asked: Run, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "in.txt").write_text("hello, world")
    failed(asked(*words), sentence)


@pytest.mark.parametrize(
    "command",
    [("generate", "x"), ("video", "x"), ("ask", "x"), ("jobs", "list"), ("jobs", "watch", "x")],
)
def test_without_a_server_it_says_how_to_start_one(run: Run, command: tuple[str, ...]) -> None:
    failed(run(*command, "--url", "http://127.0.0.1:1"), "no gesso server", "gesso up")


def test_without_a_broker_services_say_where_they_looked(run: Run) -> None:
    failed(run("provision", env={"NATS_URL": "nats://127.0.0.1:1"}), "nats://127.0.0.1:1")


@pytest.mark.broker
def test_jobs_are_listed_watched_and_cancelled(asked: Run, http: Any) -> None:
    request = {"model": "sana-tiny", "prompt": "slowly, x", "width": 64, "height": 64, "seed": 1}
    for job_id, steps in (("cli-watch", 2), ("cli-cancel", 60)):
        body = {"kind": "generate-image", "request": request | {"steps": steps}}
        assert http.put(f"/v1/jobs/{job_id}", json=body).status_code == 202
    assert asked("jobs", "watch", "cli-watch").stdout == "cli-watch succeeded\n"
    assert asked("jobs", "cancel", "cli-cancel").exit_code == 0
    failed(asked("jobs", "watch", "cli-cancel"), "job cli-cancel cancelled")
    listed = asked("jobs", "list", "--limit", "5").stdout
    assert "cli-watch" in listed
    assert "cancelled" in listed


def test_models_list_names_every_model(run: Run) -> None:
    listed = run("models", "list").stdout
    for name in ("sana-tiny", "sana-1.5-4.8b", "dc-ae-f128c512-mix-1.0", "smollm2-l6"):
        assert name in listed


def test_a_pickle_is_converted_and_an_unsafe_one_stays_closed(run: Run, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "good.pth")
    torch.save({"weight": Path("/")}, tmp_path / "bad.pth")
    assert "1 tensors" in run("models", "convert", "good.pth", "good.safetensors").stdout
    failed(run("models", "convert", "bad.pth", "bad.safetensors"), "stays closed")


def test_a_damaged_model_folder_is_told_file_by_file(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json")
    failed(run("models", "verify", "model"), "model.safetensors", "1 of 1 files")


def test_doctor_says_for_each_thing_whether_it_is_well(run: Run) -> None:
    result = run("doctor", env={"GESSO_GATEWAY_PORT": "0"})
    for thing in ("python", "torch", "ray", "nats-server", "weights smollm2-l6", "port", "memory"):
        assert f" {thing}: " in result.stdout
    assert result.exit_code == ("to do" in result.stdout)


@pytest.mark.broker
def test_doctor_sees_that_the_port_is_taken(run: Run, server: Any) -> None:
    port = server.url.rpartition(":")[2]
    result = run("doctor", env={"GESSO_GATEWAY_PORT": port})
    assert result.exit_code == 1
    assert "GESSO_GATEWAY_PORT" in result.stdout


@pytest.mark.broker
@pytest.mark.parametrize("command", [("up",), ("serve", "gateway")])
def test_a_busy_port_is_one_sentence(run: Run, server: Any, command: tuple[str, ...]) -> None:
    port = server.url.rpartition(":")[2]
    failed(run(*command, env={"GESSO_GATEWAY_PORT": port}), f":{port} cannot be taken", "gesso up")


def test_the_command_starts_quickly_because_it_does_not_import_torch() -> None:
    code = (
        "import sys, gesso_services.cli.main; print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False False\n"
