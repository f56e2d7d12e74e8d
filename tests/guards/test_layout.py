"""The house keeps its shape: arrows between packages, no stray packages, no unsafe loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "contracts": set(),
    "kernels": set(),
    "core": {"gesso_kernels"},
    "services": {"gesso_contracts", "gesso_kernels", "gesso_core"},
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room / f"gesso_{room}").rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_downhill(room: str) -> None:
    allowed = ROOMS[room] | {f"gesso_{room}"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imported_modules(path)
        if name.startswith("gesso_") and name.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_contracts_need_pydantic_only() -> None:
    third_party = {
        name.split(".")[0] for path in sources("contracts") for name in imported_modules(path)
    } & {"torch", "numpy", "nats", "ray", "fastapi", "safetensors", "PIL", "transformers"}
    assert third_party == set()


@pytest.mark.parametrize("folder", [*ROOMS, "tests", "bench", "docs", "deploy"])
def test_top_folders_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_every_source_file_starts_with_a_docstring(room: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(room)
        if path.read_text().strip() and not ast.get_docstring(tree_of(path))
    ]
    assert silent == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_source_file_is_longer_than_400_lines(room: str) -> None:
    long = [
        str(p.relative_to(ROOT)) for p in sources(room) if len(p.read_text().splitlines()) > 400
    ]
    assert long == []


def test_weights_are_never_unpickled_without_the_safe_mode() -> None:
    for room in ROOMS:
        for path in sources(room):
            for node in ast.walk(tree_of(path)):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)  # spelling every call out takes long
                    and node.func.attr == "load"
                    and ast.unparse(node.func) == "torch.load"
                ):
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords.get("weights_only") == "True", path


def test_the_gateway_stays_without_torch_and_ray() -> None:
    """It only translates; loading a framework would cost each copy seconds and memory."""
    program = "import sys, gesso_services.gateway.app; print({'torch', 'ray'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.strip() == "set()"
