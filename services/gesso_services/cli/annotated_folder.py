"""A folder annotated file by file: so many at once, each result written as it comes, resumable.

``manifest.jsonl`` in the output folder has a line for every file that is done or has failed. The
same command again skips what is done, tries again what failed, and joins the jobs that were under
way when it was stopped: their keys are made from what the files hold and what was asked for.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from gesso_core.errors import GessoError

from gesso_services.client import NotReachable
from gesso_services.client_labels import JobFailed
from gesso_services.client_wire import Json

SetFormat = Literal["coco", "textseg", "yolo", "label-studio"]
CarFormat = Literal["kitti", "nuscenes", "openlabel", "sustech"]
MANIFEST: Final = "manifest.jsonl"
BUSY: Final = (429, 503)  # the server has no place now
WAIT_S, PATIENCE_S = 1.0, 300.0
KEY_CHARS: Final = 40
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One file, or one frame, to annotate; ``parts`` are read when its turn comes."""

    name: str
    parts: Callable[[], Mapping[str, bytes]]


@dataclass(frozen=True)
class Made:
    """What came of one item: files by their place in the output folder, and what to note."""

    files: Mapping[str, bytes]
    note: Json


class Annotates(Protocol):
    """Annotates items: begun now, fetched later. Failures are a GessoError."""

    def begin(self, item: Item, parts: Mapping[str, bytes], key: str) -> str:
        """Begin the work and return its name; the same key again is the same work."""

    def finish(self, item: Item, parts: Mapping[str, bytes], name: str) -> Made:
        """Wait for the work of that name and return what it made."""


@dataclass
class Counts:
    """How many items were done before, are done now, or have failed."""

    skipped: int = 0
    done: int = 0
    failed: int = 0


@dataclass(frozen=True)
class _Open:
    """An item under way."""

    item: Item
    content: str
    attempt: int
    name: str


class Folder:
    """One run over many items, whose bytes are in memory only when it is their turn.

    Args:
        options: everything that changes the result; part of every key.
        window: how many may be under way at once.
        tell: called with every line that is noted.
    """

    def __init__(
        self,
        out: Path,
        annotates: Annotates,
        options: Json,
        *,
        window: int = 8,
        tell: Callable[[Json], None] = lambda line: None,
    ) -> None:
        self.out, self.annotates, self.options = out, annotates, options
        self.window, self.tell = window, tell
        self.counts = Counts()
        out.mkdir(parents=True, exist_ok=True)
        self._before = {line["name"]: line for line in lines_of(out)}

    def run(self, items: Iterable[Item]) -> Counts:
        """Annotate all of them. Only a server that is gone ends this early."""
        waiting, under_way = iter(items), deque[_Open]()
        path = self.out / MANIFEST
        with path.open("a", encoding="utf-8", errors="backslashreplace") as manifest:
            _end_line(manifest, path)
            for item in waiting:
                begun = self._noted(manifest, item.name, partial(self._begin, item))
                if isinstance(begun, _Open):
                    under_way.append(begun)
                if len(under_way) >= self.window:
                    self._close(manifest, under_way.popleft())
            while under_way:
                self._close(manifest, under_way.popleft())
        return self.counts

    def _begin(self, item: Item) -> _Open | None:
        parts = item.parts()
        content = self._content(item, parts)
        before = self._before.get(item.name, {})
        attempt = 0
        if before.get("content") == content:
            if before["status"] == "done" and self._has(before["files"]):
                self.counts.skipped += 1
                return None
            attempt = before["attempt"] + 1
        name = _patiently(lambda: self.annotates.begin(item, parts, _key(content, attempt)))
        return _Open(item, content, attempt, name)

    def _close(self, manifest: Any, under_way: _Open) -> None:
        item = under_way.item
        made = self._noted(manifest, item.name, partial(self._finish, under_way), under_way)
        if not isinstance(made, Made):
            return
        self.counts.done += 1
        self._note(manifest, _line(under_way, "done", files=sorted(made.files), **made.note))

    def _finish(self, under_way: _Open) -> Made:
        item = under_way.item
        made = _patiently(lambda: self.annotates.finish(item, item.parts(), under_way.name))
        for name, data in made.files.items():
            write(self.out / name, data)
        return made

    def _noted(
        self,
        manifest: Any,
        name: str,
        work: Callable[[], _Open | Made | None],
        under_way: _Open | None = None,
    ) -> _Open | Made | None:
        """What ``work`` gives; a failure of this one item becomes a line."""
        try:
            return work()
        except NotReachable:
            raise
        except (GessoError, OSError) as error:
            self.counts.failed += 1
            about = {"error": str(error), "field": getattr(error, "field", None)}
            line = _line(under_way, "failed") if under_way else {"name": name, "status": "failed"}
            self._note(manifest, line | about)
            return None

    def _note(self, manifest: Any, line: Json) -> None:
        manifest.write(json.dumps(line, ensure_ascii=False) + "\n")
        manifest.flush()
        self.tell(line)

    def _has(self, names: Iterable[str]) -> bool:
        return all((self.out / name).is_file() for name in names)

    def _content(self, item: Item, parts: Mapping[str, bytes]) -> str:
        """A hash of all that the labels depend on, and of the name, which they carry."""
        asked = json.dumps([item.name, self.options], sort_keys=True)
        whole = hashlib.sha256(asked.encode())
        for name, data in sorted(parts.items()):
            whole.update(f"{name} {len(data)} ".encode())
            whole.update(data)
        return whole.hexdigest()


def lines_of(out: Path) -> Iterator[Json]:
    """The lines of a manifest; one that was cut off by a sudden end is left out."""
    path = out / MANIFEST
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and "name" in value and "status" in value:
                yield value


def done(out: Path) -> Iterator[Json]:
    """The last line of every item that is done, by name."""
    last = {line["name"]: line for line in lines_of(out)}
    yield from (line for _, line in sorted(last.items()) if line["status"] == "done")


def write(path: Path, data: bytes) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _line(under_way: _Open, status: str, **more: Any) -> Json:
    return {
        "name": under_way.item.name,
        "status": status,
        "job": under_way.name,
        "content": under_way.content,
        "attempt": under_way.attempt,
        **more,
    }


def _key(content: str, attempt: int) -> str:
    return f"{content[:KEY_CHARS]}-{attempt}"


def _end_line(manifest: Any, path: Path) -> None:
    """End a line that was cut off, so that the next one stands alone."""
    with path.open("rb") as written:
        written.seek(max(0, path.stat().st_size - 1))
        if written.read() not in (b"", b"\n"):
            manifest.write("\n")


def _patiently(ask: Callable[[], T]) -> T:
    """What the server answers, asked again and again while it has no place."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except GessoError as error:
            if isinstance(error, NotReachable | JobFailed) or error.status not in BUSY:
                raise
            if time.monotonic() > deadline:
                raise
            time.sleep(WAIT_S)
