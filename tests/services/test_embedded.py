"""All of gesso as one command: it starts, paints, survives a dead broker, and ends cleanly."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from gesso_core.errors import ConfigError, Unavailable
from gesso_core.pipelines.pictures import decode_picture
from gesso_services.client import Gesso
from gesso_services.embedded import Stack, StackSettings, refuse_busy_port
from gesso_services.embedded_ray import last_line, read_config
from gesso_services.gateway.settings import GatewaySettings

START_S, STOP_S = 240, 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment(
    tiny_pipeline: Path, tiny_hart: Path, tiny_vila_u: Path, tmp_path: Path
) -> dict[str, str]:
    """Models of random weights, the default one under its name, and a place of its own for all."""
    autoencoder = str(tiny_pipeline / "vae")
    token_models = {"scales": str(tiny_hart), "seer": str(tiny_vila_u)}
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("GESSO_")},
        "GESSO_DIFFUSION_MODELS": "[]",
        "GESSO_DIFFUSION_FOLDERS": json.dumps({"sana-tiny": str(tiny_pipeline)}),
        "GESSO_AUTOENCODER_MODELS": "[]",
        "GESSO_AUTOENCODER_FOLDERS": json.dumps(
            {"dcae-tiny": autoencoder, "sana-tiny": autoencoder, **token_models}
        ),
        "GESSO_AUTOREGRESSIVE_MODELS": "[]",
        "GESSO_AUTOREGRESSIVE_FOLDERS": json.dumps(token_models),
        "GESSO_ANNOTATION_STORE": str(tmp_path / "no-models"),
        "GESSO_STATE_DIR": str(tmp_path / "state"),
        "GESSO_GATEWAY_PORT": str(free_port()),
        "COLUMNS": "300",
    }


@pytest.fixture
def up(environment: dict[str, str], tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """``gesso up`` in a process of its own; its lines go to ``up.log``."""
    with (tmp_path / "up.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "gesso_services.cli.main", "up"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield child
    if child.poll() is None:
        child.terminate()
        child.wait(STOP_S)


def wait_for_line(child: "subprocess.Popen[bytes]", log: Path, words: str, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while words not in (text := log.read_text()):
        assert child.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
    return text


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.timeout(600)
def test_up_paints_restarts_its_broker_and_ends_with_all_of_its_processes(
    up: "subprocess.Popen[bytes]", environment: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "up.log"
    wait_for_line(up, log, "READY", START_S)
    url = f"http://127.0.0.1:{environment['GESSO_GATEWAY_PORT']}"
    with Gesso(url) as gesso:
        (picture,) = gesso.generate("a red apple", seed=7)
        assert decode_picture(picture.data).shape == (64, 64, 3)

        family = psutil.Process(up.pid).children(recursive=True)
        (broker,) = [one for one in family if one.name() == "nats-server"]
        broker.send_signal(signal.SIGKILL)
        wait_for_line(up, log, "died; starting it again", 10)
        (again,) = gesso.generate("a red apple", seed=7)
        assert again.data == picture.data
        assert gesso.job(picture.job_id).status == "succeeded"

    family = psutil.Process(up.pid).children(recursive=True)
    up.send_signal(signal.SIGINT)
    assert up.wait(STOP_S) == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [one.name() for one in alive] == []
    assert log.read_text().rstrip().endswith("stopped")
    assert "Traceback" not in log.read_text()


def test_a_busy_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be taken.*gesso up"):
            refuse_busy_port("127.0.0.1", port)
        settings = StackSettings(state_dir=tmp_path, nats_url=None)
        with pytest.raises(ConfigError), Stack(settings, GatewaySettings(port=port)):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.broker
def test_two_stacks_cannot_share_a_folder(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "nats").mkdir()
    with (tmp_path / "nats" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = StackSettings(state_dir=tmp_path, nats_url=None)
        gateway = GatewaySettings(port=free_port())
        with pytest.raises(ConfigError, match="another broker uses"), Stack(settings, gateway):
            pass


def test_joining_a_broker_that_is_not_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
    settings = StackSettings(state_dir=tmp_path)
    gateway = GatewaySettings(port=free_port())
    with pytest.raises(Unavailable, match=r"nats://127\.0\.0\.1:1"), Stack(settings, gateway):
        pass


def test_the_configuration_names_every_service() -> None:
    names = ["autoencoder", "diffusion", "autoregressive", "annotation"]
    assert [one.name for one in read_config()] == names


def test_a_broken_configuration_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    for text in ("", "applications: 3", "applications: [{name: x}]", "{", "- a"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"serve\.yaml is not a Serve configuration"):
            read_config(file)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "Traceback\n  File x\ngesso_core.errors.WeightsError: no weights; pull them\n\n",
            "no weights",
        ),
        ("Traceback\n  File x\nRuntimeError: boom\nnote", "RuntimeError: boom"),
        ("something else", "something else"),
        ("", "no reason given"),
    ],
)
def test_the_reason_of_a_failed_start_is_the_line_that_says_it(message: str, reason: str) -> None:
    assert last_line(message).startswith(reason)
