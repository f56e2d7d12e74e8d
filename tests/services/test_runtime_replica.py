"""Replicas under a real Ray Serve, with a real broker."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from gesso_services.runtime.job_events import wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.settings import ServiceSettings

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.broker,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # Ray's own imports warn
]

TOY = {
    "GESSO_DIFFUSION_NUM_CPUS": "0.1",
    "GESSO_DIFFUSION_MAX_REPLICAS": "2",
    "GESSO_DIFFUSION_SLOTS": "1",
    "GESSO_DIFFUSION_UPSCALE_DELAY_S": "0",
    "GESSO_DIFFUSION_DOWNSCALE_DELAY_S": "1",
    "GESSO_DIFFUSION_BACKLOG_POLL_S": "0.3",
    "GESSO_JOB_ACK_WAIT_S": "2",
    "GESSO_JOB_FETCH_EXPIRES_S": "1",
    "GESSO_JOB_STOP_GRACE_S": "1",
}


@pytest.fixture
def serve(broker: NatsServer, toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local Ray with Serve whose processes find the broker and the toy service."""
    import ray
    from ray import serve

    for key, value in {**broker.environment(), **TOY}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(str(toy.__file__)))
    ray.init(
        num_cpus=3,  # so many processes are started beforehand
        include_dashboard=False,
        object_store_memory=80 * 1024 * 1024,
        log_to_driver=False,
        configure_logging=False,
    )
    serve.start(proxy_location="Disabled")
    yield serve
    serve.shutdown()
    ray.shutdown()


async def test_replicas_follow_the_backlog_and_a_killed_one_loses_no_job(
    serve: Any, store: JobStore, toy: ModuleType
) -> None:
    from gesso_services.runtime.replica import ReplicaArguments, build_app

    app = build_app(ReplicaArguments(service="diffusion", factory="toy_service:build_service"))
    await asyncio.to_thread(serve.run, app, name="diffusion", route_prefix=None)
    asked, _ = await store.submit("diffusion", "who-am-i", toy.WhoAmI())
    answer = (await wait_for(store, asked.id, 30)).result
    assert answer is not None

    add_ten = toy.AddUp(numbers=[1] * 10, step_s=0.1)
    jobs = [(await store.submit("diffusion", "add-up", add_ten))[0] for _ in range(10)]
    while await asyncio.to_thread(_replicas, serve) < 2:  # more work comes until it has an effect
        jobs.append((await store.submit("diffusion", "add-up", add_ten))[0])
        await asyncio.sleep(0.5)
    os.kill(int(str(answer["pid"])), signal.SIGKILL)  # in the middle of a job

    ends = [await wait_for(store, job.id, 120) for job in jobs]
    assert [(state.status, state.result) for state in ends] == [("succeeded", {"total": 10})] * len(
        ends
    )
    assert max(state.attempt for state in ends) == 2
    await _until(lambda: _replicas(serve) == 1, 60)


def test_every_option_of_a_deployment_comes_from_settings() -> None:
    from gesso_services.runtime.replica import deployment_options

    settings = ServiceSettings(
        num_gpus=0.5, resources={"diffusion": 1}, min_replicas=1, max_replicas=3, slots=4
    )
    options = deployment_options("diffusion", settings)
    assert options["ray_actor_options"] == {
        "num_cpus": 0.5,
        "num_gpus": 0.5,
        "resources": {"diffusion": 1},
    }
    assert options["autoscaling_config"]["max_replicas"] == 3
    assert options["autoscaling_config"]["policy"]["policy_kwargs"]["jobs_per_replica"] == 8


def _replicas(serve: Any) -> int:
    deployment = serve.status().applications["diffusion"].deployments["diffusion"]
    return int(deployment.replica_states.get("RUNNING", 0))


async def _until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.2)
