"""``gesso up``, ``gesso demo`` and ``gesso serve``: start things and say how far they are."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from gesso_core.errors import ConfigError

from gesso_services.cli.common import err, one_sentence, out, progress_bars
from gesso_services.cli.output import format_of

if TYPE_CHECKING:
    from gesso_services.client import Gesso, Progress
    from gesso_services.embedded import StackSettings
    from gesso_services.gateway.settings import GatewaySettings

DEMO_PROMPT = "a red apple, 3D style, on a blue background"
SERVICES = ("autoencoder", "diffusion", "autoregressive", "annotation")

Port = Annotated[int | None, typer.Option(help="Default: GESSO_GATEWAY_PORT, or 8080.")]
State = Annotated[Path | None, typer.Option(help="Where jobs and pictures are kept between runs.")]


@one_sentence
def up(
    *,
    port: Port = None,
    host: Annotated[str | None, typer.Option(help="Default: 127.0.0.1.")] = None,
    state: State = None,
) -> None:
    """Start broker, services and gateway here, and keep them running until Ctrl-C."""
    from gesso_services.embedded import Stack

    begun = time.monotonic()
    with stop_signals(), Stack(*_settings(port, host, state), report=_Lines().show) as stack:
        seconds = time.monotonic() - begun
        out.print(f"[bold green]READY[/] in {seconds:.1f} s: {stack.url}   (Ctrl-C stops it)")
        stack.wait()


@one_sentence
def demo(
    *,
    prompt: Annotated[str, typer.Argument(help="What to paint.")] = DEMO_PROMPT,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(min=0)] = 1,
    port: Port = None,
    state: State = None,
) -> None:
    """Paint one picture through the whole stack: start it (or use the one that runs), ask, stop."""
    from gesso_services.client import Gesso
    from gesso_services.embedded import Stack, is_ready

    settings = _settings(port, None, state)
    stack = Stack(*settings, report=_Lines().show)
    with Gesso(stack.url, settings[1].keys()[0] if settings[1].keys() else None) as gesso:
        if is_ready(gesso):
            err.print(f"using the gateway at {stack.url}", highlight=False)
            _paint(gesso, prompt, seed, output)
            return
        with stop_signals(), stack:
            _paint(gesso, prompt, seed, output)


@one_sentence
def serve(
    service: Annotated[str, typer.Argument(help="gateway, or one of the services.")],
) -> None:
    """Run one service, or the gateway, in this process, joined to the broker at NATS_URL."""
    import asyncio
    import importlib

    if service == "gateway":
        from gesso_services.embedded import refuse_busy_port
        from gesso_services.gateway.server import run
        from gesso_services.gateway.settings import GatewaySettings

        settings = GatewaySettings()
        refuse_busy_port(settings.host, settings.port)
        err.print(f"gateway at http://{settings.host}:{settings.port}", highlight=False)
        run(settings)
        return
    if service not in SERVICES:
        raise ConfigError(
            f"there is no service {service!r}; serve one of gateway, {', '.join(SERVICES)}"
        )
    from gesso_services.runtime.log import configure_logging
    from gesso_services.runtime.service import run_service

    configure_logging(service)
    build = importlib.import_module(f"gesso_services.{service}").build_service
    asyncio.run(run_service(build()))


@one_sentence
def provision() -> None:
    """Create the streams, buckets and consumers of gesso in the broker at NATS_URL."""
    import asyncio

    from gesso_services.runtime.connection import Bus
    from gesso_services.runtime.provision import provision as prepare

    async def run() -> None:
        bus = await Bus.connect("admin")
        try:
            await prepare(bus)
        finally:
            await bus.close()

    asyncio.run(run())
    out.print("the broker is provisioned")


@one_sentence
def deploy(
    *,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait.")] = 600.0,
) -> None:
    """Deploy every service of serve_config.yaml to the Ray at RAY_ADDRESS."""
    from gesso_services.embedded import StackSettings
    from gesso_services.embedded_ray import LocalRay

    settings = StackSettings()
    if settings.ray_address is None:
        raise ConfigError("RAY_ADDRESS is not set; give the address of the Ray to deploy to")
    ray = LocalRay(
        address=settings.ray_address,
        cpus=settings.ray_cpus,
        object_store_bytes=settings.object_store_bytes,
        report=_Lines().show,
    )
    try:
        ray.start()
        ray.deploy(timeout_s=timeout, meanwhile=lambda: None)
    finally:
        ray.stop()


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the block in order; a second one hurries the ending up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # a shell's background job starts with it ignored
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped")
        raise typer.Exit(0) from None


class _Lines:
    """One line per news of a part, with the seconds since the start."""

    def __init__(self) -> None:
        self.begun = time.monotonic()

    def show(self, part: str, state: str) -> None:
        seconds = time.monotonic() - self.begun
        err.print(
            f"[dim]{seconds:5.1f} s[/]  [cyan]{part:<12}[/] {state}",
            highlight=False,
            soft_wrap=True,
        )


def _settings(
    port: int | None, host: str | None, state: Path | None
) -> "tuple[StackSettings, GatewaySettings]":
    from gesso_services.embedded import StackSettings
    from gesso_services.gateway.settings import GatewaySettings

    place = {name: value for name, value in (("port", port), ("host", host)) if value is not None}
    kept: dict[str, Any] = {"state_dir": state} if state else {}
    return StackSettings(**kept), GatewaySettings(**cast("dict[str, Any]", place))


def _paint(gesso: "Gesso", prompt: str, seed: int, output: Path) -> None:
    begun = time.monotonic()
    with progress_bars() as bars:
        line = bars.add_task("painting", total=1.0, note="waiting")

        def show(at: "Progress") -> None:
            bars.update(line, completed=at.progress, note=f"step {at.step}/{at.total_steps}")

        (picture,) = gesso.generate(
            prompt, seed=seed, output_format=format_of(output), on_progress=show
        )
    path = picture.save(output).resolve()
    out.print(f"{prompt!r}, painted in {time.monotonic() - begun:.1f} s, is in:", highlight=False)
    out.print(str(path), highlight=False, soft_wrap=True)
