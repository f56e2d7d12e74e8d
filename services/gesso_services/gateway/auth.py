"""API keys. ``GESSO_API_KEYS`` empty means an open server; else every ``/v1`` route wants one."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from gesso_services.gateway.problems import EdgeError

_bearer = HTTPBearer(auto_error=False, description="One of the keys in GESSO_API_KEYS.")


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
    keys: KeyRing = request.app.state.keys
    if keys.is_open:
        return "anyone"
    if credentials is None or not keys.admits(credentials.credentials):
        given = "a key that is not known here" if credentials else "no key"
        raise EdgeError(
            401,
            "invalid_api_key",
            f"the request carries {given}; send the header 'Authorization: Bearer <key>' with one "
            "of the server's keys",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return f"key-{_digest(credentials.credentials).hex()[:12]}"


Caller = Annotated[str, Depends(caller)]
