"""The dead letters: jobs that nobody could work on, kept for a person to look at."""

import logging
from datetime import UTC, datetime

from gesso_contracts import encode, headers, subjects
from gesso_contracts.jobs import DeadLetter, Job
from nats.aio.msg import Msg

from gesso_services.runtime.connection import Bus

log = logging.getLogger(__name__)

REASON = "Reason"


async def bury(bus: Bus, job: Job, *, deliveries: int, reason: str) -> None:
    """Keep ``job`` with the ``reason`` it failed for; twice is once."""
    letter = DeadLetter(job=job, deliveries=deliveries, reason=reason, buried_at=datetime.now(UTC))
    data, header = encode(letter)
    header[headers.MESSAGE_ID] = f"dead-{job.id}"
    await _publish(bus, job.service, data, header)
    log.error("moved to the dead letters: %s", reason)


async def bury_unreadable(bus: Bus, service: str, message: Msg, reason: str) -> None:
    """Keep a message that is not a job, byte for byte."""
    await _publish(bus, service, message.data, {**(message.headers or {}), REASON: reason})
    log.error("an unreadable job was moved to the dead letters: %s", reason)


async def _publish(bus: Bus, service: str, data: bytes, header: dict[str, str]) -> None:
    async def publish() -> None:
        await bus.js.publish(
            subjects.dead_letter(service),
            data,
            headers=header,
            stream=subjects.STREAM_DEAD_LETTERS,
        )

    await bus.until_done(publish)
