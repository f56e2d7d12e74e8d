"""Streams, buckets and consumers, created or brought up to date by the admin role.

Running it twice changes nothing. Services never create anything: their roles may not.
"""

from gesso_contracts import limits, operations, subjects
from nats.js import api
from nats.js.errors import NotFoundError

from gesso_services.runtime.connection import Bus
from gesso_services.runtime.settings import JobSettings


def stream_configs(settings: JobSettings) -> list[api.StreamConfig]:
    """The four streams: queue, dead letters, blobs, and the bucket of job states."""
    return [
        api.StreamConfig(
            name=subjects.STREAM_JOBS,
            description="jobs that wait or run",
            subjects=[subjects.ALL_JOBS],
            retention=api.RetentionPolicy.WORK_QUEUE,
            storage=api.StorageType.FILE,
            # A full queue refuses new jobs; it never forgets accepted ones.
            discard=api.DiscardPolicy.NEW,
            max_bytes=settings.max_queue_bytes,
            max_msg_size=limits.JOB_MESSAGE_BYTES,
            duplicate_window=settings.duplicate_window_s,
        ),
        api.StreamConfig(
            name=subjects.STREAM_DEAD_LETTERS,
            description="jobs that nobody could work on",
            subjects=[subjects.ALL_DEAD_LETTERS],
            storage=api.StorageType.FILE,
            max_age=settings.dead_letter_ttl_s,
            allow_direct=True,
        ),
        api.StreamConfig(
            name=subjects.STREAM_BLOBS,
            description="bytes too large for a message, in chunks",
            subjects=[subjects.ALL_BLOBS],
            storage=api.StorageType.FILE,
            max_age=settings.blob_ttl_s,
            max_bytes=settings.max_blob_bytes,
            max_msgs_per_subject=1,
            allow_direct=True,
        ),
        api.StreamConfig(
            name=f"KV_{subjects.BUCKET_JOBS}",
            description="states of jobs",
            subjects=[f"$KV.{subjects.BUCKET_JOBS}.>"],
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.NEW,
            max_age=settings.state_ttl_s,
            max_msgs_per_subject=1,
            allow_direct=True,
            allow_rollup_hdrs=True,
            deny_delete=True,
        ),
    ]


def consumer_config(service: str, settings: JobSettings) -> api.ConsumerConfig:
    """The durable pull consumer that all replicas of ``service`` share."""
    return api.ConsumerConfig(
        durable_name=service,
        filter_subject=subjects.all_jobs(service),
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=settings.ack_wait_s,
        # The worker counts attempts and buries a job itself, so no delivery may be withheld.
        max_deliver=-1,
        max_ack_pending=settings.max_ack_pending,
    )


async def provision(
    bus: Bus,
    settings: JobSettings | None = None,
    services: tuple[str, ...] = operations.SERVICES,
) -> None:
    """Create what is missing and update what differs."""
    settings = settings or JobSettings()
    for config in stream_configs(settings):
        assert config.name is not None
        try:
            await bus.js.stream_info(config.name)
        except NotFoundError:
            await bus.js.add_stream(config)
        else:
            await bus.js.update_stream(config)
    for service in services:
        # The server treats a durable consumer with the same name as an update.
        await bus.js.add_consumer(subjects.STREAM_JOBS, consumer_config(service, settings))
