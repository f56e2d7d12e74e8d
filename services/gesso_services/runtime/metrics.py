"""What one replica counts and measures, in a Prometheus registry of its own."""

import logging
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)

log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CALL_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters and histograms of one replica; ``service`` is a label of each."""

    def __init__(self, service: str) -> None:
        self.registry = CollectorRegistry()
        self.service = service
        self._jobs = Counter(
            "gesso_jobs",
            "jobs by the state they ended in, or 'retried'",
            ["service", "kind", "status"],
            registry=self.registry,
        )
        self._running = Gauge(
            "gesso_jobs_running", "jobs that run now", ["service"], registry=self.registry
        )
        self._backlog = Gauge(
            "gesso_jobs_backlog",
            "jobs that wait or run, all replicas",
            ["service"],
            registry=self.registry,
        )
        self._queue_wait = Histogram(
            "gesso_job_queue_wait_seconds",
            "from submission to start",
            ["service", "kind"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._duration = Histogram(
            "gesso_job_seconds",
            "from start to final state",
            ["service", "kind"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batch = Histogram(
            "gesso_batch_size",
            "requests that shared one forward pass",
            ["service"],
            buckets=BATCH_SIZES,
            registry=self.registry,
        )
        self._weights = Gauge(
            "gesso_model_weight_bytes",
            "memory of a loaded model's weights; 'quantization' names format and mode",
            ["service", "model", "quantization"],
            registry=self.registry,
        )
        self._calls = Histogram(
            "gesso_rpc_seconds",
            "from arrival of a call to its answer",
            ["service", "verb", "code"],
            buckets=CALL_SECONDS,
            registry=self.registry,
        )

    def job_started(self, kind: str, waited_s: float) -> None:
        """A job left the queue."""
        self._running.labels(self.service).inc()
        self._queue_wait.labels(self.service, kind).observe(max(0.0, waited_s))

    def job_ended(self, kind: str, status: str, seconds: float) -> None:
        """A job gave its slot back: in a final state, or to be tried again ('retried')."""
        self._running.labels(self.service).dec()
        self._jobs.labels(self.service, kind, status).inc()
        self._duration.labels(self.service, kind).observe(seconds)

    def job_skipped(self, kind: str, status: str) -> None:
        """A job reached a final state without running here."""
        self._jobs.labels(self.service, kind, status).inc()

    def batch(self, size: int) -> None:
        """``size`` requests shared one forward pass."""
        self._batch.labels(self.service).observe(size)

    def call(self, verb: str, code: str, seconds: float) -> None:
        """A call was answered; ``code`` is 'ok' or the code of the problem."""
        self._calls.labels(self.service, verb, code).observe(seconds)

    def model_loaded(self, model: str, quantization: str, weight_bytes: int) -> None:
        """A model is in memory."""
        self._weights.labels(self.service, model, quantization).set(weight_bytes)

    def backlog(self, jobs: int) -> None:
        """How many jobs wait or run for this service, over all replicas."""
        self._backlog.labels(self.service).set(jobs)

    def text(self) -> str:
        """Everything in the Prometheus text format."""
        return generate_latest(self.registry).decode()

    def listen(self, port: int) -> WSGIServer:
        """Serve the metrics over HTTP on the loopback interface; port 0 takes a free one."""
        server, _ = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        log.info("metrics at http://127.0.0.1:%d/metrics", server.server_port)
        return server
