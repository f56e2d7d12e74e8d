"""The outermost layer: body limits, security headers, request ids and the count of every answer."""

import re
import time
import uuid
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gesso_services.gateway.problems import make_problem, problem_response
from gesso_services.runtime import trace

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)

SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class EdgeMetrics:
    """What the gateway counts about itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gesso_http_requests",
            "Answers by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "gesso_http_request_seconds",
            "From the request's first byte to the answer's last, streams included.",
            ["method", "route"],
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
            registry=self.registry,
        )


class Edge:
    """Pure ASGI, so that streams stay streams and a disconnect reaches the route."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: EdgeMetrics,
        max_body_bytes: int,
        max_body_bytes_of: Mapping[str, int],
    ) -> None:
        self.app, self.metrics = app, metrics
        self.max_body_bytes, self.max_body_bytes_of = max_body_bytes, max_body_bytes_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; everything but HTTP passes through untouched."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._limit(scope))
        try:
            if exchange.announced_too_much:
                await exchange.refuse()
                return
            with trace.use_trace(exchange.traceparent):
                await self.app(scope, exchange.receive, exchange.send)
        finally:
            self._count(scope, exchange)

    def _limit(self, scope: Scope) -> int:
        for beginning, limit in self.max_body_bytes_of.items():
            if scope["path"].startswith(beginning):
                return limit
        return self.max_body_bytes

    def _count(self, scope: Scope, exchange: "_Exchange") -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope.get("route") else "any"
        self.metrics.requests.labels(method, route, exchange.status).inc()
        self.metrics.seconds.labels(method, route).observe(time.monotonic() - exchange.began)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self.scope, self._receive, self._send, self.limit = scope, receive, send, limit
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        self.announced_too_much = length.isdecimal() and int(length[:20]) > limit
        given = headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.traceparent = headers.get("traceparent")
        self.began = time.monotonic()
        self.status = 499  # the client left before an answer
        self._received = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self.limit:
                raise HTTPException(413, self._too_large())
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)

    async def refuse(self) -> None:
        problem = make_problem(413, "request_entity_too_large", self._too_large())
        await problem_response(problem)(self.scope, self._receive, self.send)

    def _too_large(self) -> str:
        return (
            f"the body is larger than the {self.limit:,} bytes that {self.scope['path']} takes; "
            "send less"
        )
