"""Each role may do its work and nothing else, by the shipped nats.conf."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from gesso_contracts import subjects
from gesso_core.errors import Unavailable
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.nats_server import CONFIG_FILE, NatsServer
from gesso_services.runtime.settings import BusSettings, Role

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

Connect = Callable[[Role], Awaitable[Bus]]

GATEWAY_MAY = [
    "gesso.v1.rpc.autoencoder.decode",
    "gesso.v1.rpc.autoregressive.judge",
    "gesso.v1.job.diffusion.generate-image",
    "gesso.v1.job.autoregressive.answer",
    "gesso.v1.ctl.diffusion.cancel",
    "$KV.jobs.x",
    "$SRV.PING",
    "$JS.API.DIRECT.GET.KV_jobs.$KV.jobs.x",
    "$JS.API.CONSUMER.INFO.JOBS.diffusion",
]
GATEWAY_MAY_NOT = [
    "$JS.API.STREAM.DELETE.JOBS",
    "$JS.API.STREAM.CREATE.X",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.diffusion",
    "$JS.ACK.JOBS.diffusion.1",
    "gesso.v1.dlq.diffusion",
    "_INBOX_diffusion.x",
    "elsewhere",
]
DIFFUSION_MAY = [
    "gesso.v1.rpc.autoencoder.decode",
    "gesso.v1.evt.job.x.state",
    "gesso.v1.blob.x.0",
    "gesso.v1.dlq.diffusion",
    "$KV.jobs.x",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.diffusion",
    "$JS.ACK.JOBS.diffusion.1",
]
DIFFUSION_MAY_NOT = [
    "gesso.v1.job.diffusion.generate-image",
    "gesso.v1.ctl.diffusion.cancel",
    "gesso.v1.rpc.autoregressive.judge",
    "gesso.v1.dlq.autoencoder",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.autoencoder",
    "$JS.ACK.JOBS.autoencoder.1",
    "$JS.API.STREAM.PURGE.BLOBS",
    "$JS.API.STREAM.DELETE.JOBS",
    "_INBOX_gateway.x",
]
AUTOENCODER_MAY = [
    "gesso.v1.evt.job.x.state",
    "gesso.v1.dlq.autoencoder",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.autoencoder",
]
AUTOENCODER_MAY_NOT = [
    "gesso.v1.rpc.diffusion.embed-text",
    "gesso.v1.job.autoencoder.reconstruct",
    "gesso.v1.dlq.diffusion",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.diffusion",
]
AUTOREGRESSIVE_MAY = [
    "gesso.v1.rpc.autoencoder.decode",
    "gesso.v1.rpc.autoencoder.encode",
    "gesso.v1.evt.job.x.text",
    "gesso.v1.blob.x.0",
    "gesso.v1.dlq.autoregressive",
    "$KV.jobs.x",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.autoregressive",
    "$JS.ACK.JOBS.autoregressive.1",
]
AUTOREGRESSIVE_MAY_NOT = [
    "gesso.v1.rpc.diffusion.embed-text",
    "gesso.v1.job.autoregressive.answer",
    "gesso.v1.ctl.autoregressive.cancel",
    "gesso.v1.dlq.diffusion",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.diffusion",
    "$JS.ACK.JOBS.diffusion.1",
    "$JS.API.STREAM.PURGE.BLOBS",
    "$JS.API.STREAM.DELETE.JOBS",
    "_INBOX_gateway.x",
]
ANNOTATION_MAY = [
    "gesso.v1.job.diffusion.generate-image",
    "gesso.v1.ctl.diffusion.cancel",
    "gesso.v1.evt.job.x.progress",
    "gesso.v1.blob.x.0",
    "gesso.v1.dlq.annotation",
    "$KV.jobs.x",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.annotation",
    "$JS.ACK.JOBS.annotation.1",
]
ANNOTATION_MAY_NOT = [
    "gesso.v1.rpc.autoencoder.decode",
    "gesso.v1.job.annotation.annotate-text",
    "gesso.v1.job.diffusion.anything-else",
    "gesso.v1.job.autoregressive.generate-image",
    "gesso.v1.ctl.annotation.cancel",
    "gesso.v1.ctl.autoregressive.cancel",
    "gesso.v1.dlq.diffusion",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.diffusion",
    "$JS.ACK.JOBS.diffusion.1",
    "$JS.API.STREAM.PURGE.BLOBS",
    "_INBOX_gateway.x",
]

PUBLISH = {
    "gateway": (GATEWAY_MAY, GATEWAY_MAY_NOT),
    "diffusion": (DIFFUSION_MAY, DIFFUSION_MAY_NOT),
    "autoencoder": (AUTOENCODER_MAY, AUTOENCODER_MAY_NOT),
    "autoregressive": (AUTOREGRESSIVE_MAY, AUTOREGRESSIVE_MAY_NOT),
    "annotation": (ANNOTATION_MAY, ANNOTATION_MAY_NOT),
}
SUBSCRIBE = {
    "gateway": (
        ["gesso.v1.evt.job.*.state", "_INBOX_gateway.x"],
        ["_INBOX_diffusion.>", "gesso.v1.rpc.>", "gesso.v1.job.>", ">"],
    ),
    "diffusion": (
        ["gesso.v1.rpc.diffusion.>", "gesso.v1.ctl.diffusion.cancel", "$SRV.PING"],
        ["gesso.v1.rpc.autoencoder.>", "gesso.v1.evt.>", "_INBOX_gateway.>", "gesso.v1.job.>"],
    ),
    "autoencoder": (
        ["gesso.v1.rpc.autoencoder.decode", "gesso.v1.ctl.autoencoder.cancel"],
        ["gesso.v1.rpc.diffusion.>", "_INBOX_diffusion.>", "gesso.v1.dlq.>"],
    ),
    "autoregressive": (
        ["gesso.v1.rpc.autoregressive.judge", "gesso.v1.ctl.autoregressive.cancel", "$SRV.PING"],
        ["gesso.v1.rpc.autoencoder.>", "gesso.v1.evt.>", "_INBOX_gateway.>", "gesso.v1.job.>"],
    ),
    "annotation": (
        ["gesso.v1.rpc.annotation.segment", "gesso.v1.ctl.annotation.cancel", "$SRV.PING"],
        ["gesso.v1.rpc.autoencoder.>", "gesso.v1.evt.>", "_INBOX_gateway.>", "gesso.v1.job.>"],
    ),
}


async def refused(server: NatsServer, role: Role, verb: str, subjects_: list[str]) -> list[str]:
    """Those of the subjects about which the broker complains."""
    bus = await Bus.connect(role, server.bus_settings())
    complaints: list[str] = []

    async def remember(error: Exception) -> None:
        complaints.append(str(error))

    bus.nc._error_cb = remember
    for subject in subjects_:
        if verb == "publish":
            await bus.nc.publish(subject, b"")
        else:
            await bus.nc.subscribe(subject)
    await bus.ready()
    await bus.close()
    told = " ".join(complaints)  # the client writes them in lower case
    return [subject for subject in subjects_ if f'"{subject.lower()}"' in told]


@pytest.mark.parametrize("role", PUBLISH)
async def test_who_may_publish_what(nats_server: NatsServer, role: Role) -> None:
    may, may_not = PUBLISH[role]
    assert await refused(nats_server, role, "publish", may) == []
    assert await refused(nats_server, role, "publish", may_not) == may_not


@pytest.mark.parametrize("role", SUBSCRIBE)
async def test_who_may_listen_to_what(nats_server: NatsServer, role: Role) -> None:
    may, may_not = SUBSCRIBE[role]
    assert await refused(nats_server, role, "subscribe", may) == []
    assert await refused(nats_server, role, "subscribe", may_not) == may_not


@pytest.mark.parametrize(
    "change",
    [{"gateway_password": "wrong"}, {"gateway_password": None}, {"url": "nats://127.0.0.1:1"}],
)
async def test_who_cannot_connect_gets_one_clear_error(
    nats_server: NatsServer, change: dict[str, str | None]
) -> None:
    right = nats_server.bus_settings()
    wrong = BusSettings.model_validate({**right.model_dump(), "connect_timeout_s": 1, **change})
    with pytest.raises(Unavailable, match=r"cannot connect to NATS at nats://127\.0\.0\.1"):
        await Bus.connect("gateway", wrong)


async def test_a_worker_that_submits_a_job_is_refused_and_nothing_is_queued(
    broker: NatsServer, connect: Connect
) -> None:
    worker = await connect("diffusion")
    await worker.nc.publish(subjects.job("diffusion", "generate-image"), b"{}")
    await worker.ready()
    stream = await (await connect("admin")).js.stream_info(subjects.STREAM_JOBS)
    assert stream.state.messages == 0


async def test_a_message_over_8_mib_is_refused_and_monitoring_stays_on_this_host(
    nats_server: NatsServer, connect: Connect
) -> None:
    assert (await connect("gateway")).nc.max_payload == 8 * 1024 * 1024
    assert "http: 127.0.0.1:8222" in CONFIG_FILE.read_text()


def test_compose_and_the_tests_use_the_same_file() -> None:
    linked = Path(__file__).parents[2] / "deploy" / "nats.conf"
    assert linked.resolve() == CONFIG_FILE.resolve()


async def test_provisioning_twice_changes_nothing(broker: NatsServer, connect: Connect) -> None:
    from gesso_services.runtime.provision import provision

    admin = await connect("admin")
    before = await admin.js.consumer_info(subjects.STREAM_JOBS, "diffusion")
    await admin.js.publish(subjects.job("diffusion", "x"), json.dumps({}).encode())
    await asyncio.sleep(0)
    await provision(admin)
    after = await admin.js.consumer_info(subjects.STREAM_JOBS, "diffusion")
    assert (before.created, after.num_pending) == (after.created, 1)
    assert after.config.ack_wait == 30.0
