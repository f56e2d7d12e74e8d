"""The pictures of Label Studio's tasks: inside the task, or in folders that both servers see.

No address is ever opened over the network. What Label Studio calls ``/data/upload/3/a.png`` or
``/data/local-files/?d=signs/a.png`` is a file on its disk; where an operator says under which
folder this server sees the same disk, the file is read from there, and nothing beside that folder.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from gesso_contracts.codec import shorten
from gesso_core.errors import InvalidRequest

from gesso_services.gateway.settings import GatewaySettings
from gesso_services.gateway.uploads import from_data_url

UPLOADS: Final = "/data/upload/"
LOCAL_FILES: Final = "/data/local-files/?d="


@dataclass(frozen=True)
class TaskPictures:
    """Reads the picture of a task.

    Attributes:
        folders: what an address of Label Studio goes on from, and the folder that stands for it.
        most_bytes: of one file.
    """

    folders: dict[str, Path]
    most_bytes: int

    @classmethod
    def of(cls, settings: GatewaySettings) -> "TaskPictures":
        """With the folders that the operator has named."""
        named = {
            UPLOADS: settings.label_studio_uploads,
            LOCAL_FILES: settings.label_studio_local_files,
        }
        folders = {mark: folder for mark, folder in named.items() if folder is not None}
        return cls(folders, settings.max_upload_bytes)

    async def read(self, address: str, field: str) -> bytes:
        """The bytes behind ``address``; InvalidRequest says which addresses would do."""
        if address.startswith("data:"):
            return from_data_url(address, field)
        for mark, folder in self.folders.items():
            # Label Studio may write its own name, or the path that it is served under, before.
            _, found, rest = address.partition(mark)
            if found:
                return await asyncio.to_thread(self._file, folder, unquote(rest), field)
        raise InvalidRequest(
            f"{shorten(address)} cannot be opened: this server reads no address over the network; "
            f"put the picture into the task as a data: URL{self._others()}",
            field=field,
        )

    def _file(self, folder: Path, name: str, field: str) -> bytes:
        """One answer for what is missing and what lies elsewhere: nobody learns what is there."""
        root = folder.resolve()
        try:
            path = (root / name).resolve()
            if path.is_relative_to(root) and path.is_file():
                if path.stat().st_size > self.most_bytes:
                    raise InvalidRequest(
                        f"{shorten(name)} has {path.stat().st_size:,} bytes, over the limit of "
                        f"{self.most_bytes:,}",
                        field=field,
                    )
                return path.read_bytes()
        except (OSError, ValueError):  # not readable, or no name that a file could have
            pass
        raise InvalidRequest(
            f"{shorten(name)} is no file in the folder that this server shares with Label Studio",
            field=field,
        )

    def _others(self) -> str:
        if self.folders:
            return "".join(f", or name it {mark}…" for mark in self.folders)
        return (
            ", or share Label Studio's files with GESSO_GATEWAY_LABEL_STUDIO_UPLOADS or "
            "GESSO_GATEWAY_LABEL_STUDIO_LOCAL_FILES"
        )
