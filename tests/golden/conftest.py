"""Which directory of golden cases is replayed, and how a case becomes a test."""

import json
from pathlib import Path

import pytest
from golden_case import case_folders

OWN_CASES = Path(__file__).parent / "cases"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=OWN_CASES,
        help="directory of golden cases to replay: <system>/<case>/case.json",
    )
    parser.addoption(
        "--golden-covered",
        action="store_true",
        help="replay only the kinds that tests/golden/cases has a case of",
    )


def kind_of(folder: Path) -> tuple[str, str]:
    meta = json.loads((folder / "case.json").read_text())
    return meta["system"], meta["kind"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_folder" not in metafunc.fixturenames:
        return
    folders = list(case_folders(metafunc.config.getoption("--golden-dir")))
    if metafunc.config.getoption("--golden-covered"):
        covered = {kind_of(folder) for folder in case_folders(OWN_CASES)}
        folders = [folder for folder in folders if kind_of(folder) in covered]
    ids = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    metafunc.parametrize("golden_folder", folders, ids=ids)
