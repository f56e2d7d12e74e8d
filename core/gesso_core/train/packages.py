"""The npm packages that the small models are trained on, as ``data.lock.json`` pins them."""

import hashlib
import json
from importlib.resources import files

from gesso_core.npm_packages import Package

LOCK_TEXT = (files("gesso_core.train") / "data.lock.json").read_text()
LOCK_HASH = hashlib.sha256(LOCK_TEXT.encode()).hexdigest()


def locked_packages() -> dict[str, Package]:
    """The packages of ``data.lock.json`` by name."""
    entries = [Package(**entry) for entry in json.loads(LOCK_TEXT)["packages"]]
    return {package.name: package for package in entries}
