"""API keys. ``GESSO_API_KEYS`` empty means an open server; else every ``/v1`` route wants one."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import (
    HTTPAuthorizationCredentials,
    HTTPBasic,
    HTTPBasicCredentials,
    HTTPBearer,
)

from gesso_services.gateway.problems import EdgeError

_bearer = HTTPBearer(auto_error=False, description="One of the keys in GESSO_API_KEYS.")
_basic = HTTPBasic(auto_error=False, description="Any name, and a key as the password.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyRing:
    """The keys that may enter, kept as digests; comparison takes the same time for every guess."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @property
    def is_open(self) -> bool:
        """Does anybody get in without a key?"""
        return not self._digests

    def admits(self, key: str) -> bool:
        """Is ``key`` one of the ring? Looks at all of them, whatever it finds."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


async def caller(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str:
    """A short name for who calls (never the key itself); refuses with 401 without a valid key."""
    key = credentials.credentials if credentials else None
    return _admitted(request, key, "'Authorization: Bearer <key>'")


async def basic_caller(
    request: Request, credentials: Annotated[HTTPBasicCredentials | None, Depends(_basic)]
) -> str:
    """The same for clients that know a name and a password only; the key is the password."""
    key = credentials.password if credentials else None
    return _admitted(request, key, "'Authorization: Basic', as its password,")


def _admitted(request: Request, key: str | None, header: str) -> str:
    keys: KeyRing = request.app.state.keys
    if keys.is_open:
        return "anyone"
    if key is None or not keys.admits(key):
        given = "a key that is not known here" if key else "no key"
        raise EdgeError(
            401,
            "invalid_api_key",
            f"the request carries {given}; send the header {header} with one of the server's keys",
            headers={"WWW-Authenticate": "Basic" if "Basic" in header else "Bearer"},
        )
    return f"key-{_digest(key).hex()[:12]}"


Caller = Annotated[str, Depends(caller)]
