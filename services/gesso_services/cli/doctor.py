"""``gesso doctor``: is everything there that gesso needs? One line per thing, and what to do."""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from gesso_core.errors import GessoError
from gesso_core.registry import MODELS, ModelEntry

from gesso_services.cli.common import one_sentence, out
from gesso_services.embedded import StackSettings
from gesso_services.gateway.settings import GatewaySettings
from gesso_services.runtime.nats_server import find_binary
from gesso_services.runtime.settings import BusSettings

GIB = 1024**3
MEMORY_GIB = 3.5
DISK_GIB = 2.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``advice`` says what to do when it is not well."""

    what: str
    seen: str
    advice: str = ""

    @property
    def well(self) -> bool:
        """Is there nothing to do?"""
        return not self.advice


@one_sentence
def doctor() -> None:
    """Check this machine, and say for each thing whether it is well or what to do."""
    findings = list(examine())
    for finding in findings:
        mark = "[green]ok   [/]" if finding.well else "[red]to do[/]"
        out.print(f"{mark} ", end="")
        text = f"{finding.what}: {finding.seen}"
        out.print(
            text if finding.well else f"{text}; {finding.advice}", markup=False, soft_wrap=True
        )
    if not all(finding.well for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Every check in turn; one that fails itself is a finding, too."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _torch,
        _ray,
        _nats_server,
        _weights,
        _ports,
        _memory,
        _disk,
        _joins,
    )
    for check in checks:
        try:
            yield from check()
        except (GessoError, ImportError, OSError, subprocess.SubprocessError) as error:
            name = check.__name__.strip("_").replace("_", "-")
            yield Finding(name, str(error) or type(error).__name__, "see the message")


def _python() -> Iterator[Finding]:
    seen = f"{platform.python_version()} at {sys.executable}"
    old = sys.version_info < (3, 11)
    yield Finding("python", seen, "install Python 3.11 or newer" if old else "")


def _torch() -> Iterator[Finding]:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    yield Finding("torch", f"{torch.__version__}, {device}, {torch.get_num_threads()} threads")


def _ray() -> Iterator[Finding]:
    yield Finding("ray", importlib.metadata.version("ray"))


def _nats_server() -> Iterator[Finding]:
    if StackSettings().nats_url:
        return  # a broker that runs elsewhere needs no binary here
    answer = subprocess.run(
        [find_binary(), "--version"], capture_output=True, text=True, timeout=10, check=True
    )
    yield Finding("nats-server", answer.stdout.strip().removeprefix("nats-server: "))


def _weights() -> Iterator[Finding]:
    from gesso_core import hub

    for entry in MODELS.values():
        if entry.shipped is None:
            continue
        try:
            folder = hub.resolve(entry.name)
            yield Finding(f"weights {entry.name}", f"{_fingerprint(entry, folder)} in {folder}")
        except GessoError as error:
            advice = "a clone without trained models can make them with `make train-tiny`"
            yield Finding(f"weights {entry.name}", error.message, advice)


def _fingerprint(entry: ModelEntry, folder: Path) -> str:
    """The beginning of the hash of the weights; of each part where a model lies in several."""
    from gesso_core import hub

    if entry.family == "slf":
        from gesso_core.annotate.slf.prior import load_prior

        return load_prior().sha256[:12]
    parts = [part for part in sorted(folder.iterdir()) if any(part.glob("*.safetensors"))]
    return " ".join(hub.weights_hash(part)[:12] for part in parts or [folder])


def _ports() -> Iterator[Finding]:
    settings = GatewaySettings()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
            yield Finding("port", f"{settings.host}:{settings.port} is free")
        except OSError as error:
            yield Finding(
                "port",
                f"{settings.host}:{settings.port} cannot be taken ({error.strerror})",
                "stop what uses it (is `gesso up` running?) or set GESSO_GATEWAY_PORT",
            )


def _memory() -> Iterator[Finding]:
    free = available_memory() / GIB
    advice = f"the whole stack wants {MEMORY_GIB} GiB; close something"
    yield Finding("memory", f"{free:.1f} GiB available", advice if free < MEMORY_GIB else "")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.home()).free / GIB
    advice = f"jobs and pictures want up to {DISK_GIB} GiB; delete something"
    yield Finding(
        "disk", f"{free:.1f} GiB free in {Path.home()}", advice if free < DISK_GIB else ""
    )


def _joins() -> Iterator[Finding]:
    """Only where the environment names a broker: does anything listen there?"""
    if not StackSettings().nats_url:
        return
    place = BusSettings().url.rpartition("@")[2].rpartition("/")[2]
    host, _, port = place.partition(":")
    try:
        socket.create_connection((host, int(port or 4222)), timeout=2).close()
        yield Finding("NATS_URL", f"{place} answers")
    except OSError as error:
        yield Finding("NATS_URL", f"{place}: {error}", "start that broker, or unset NATS_URL")


def available_memory() -> int:
    """Bytes that can still be used; from the kernel where it says, else from the page count."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
