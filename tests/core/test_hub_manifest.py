"""Manifests: what a model folder should hold, and whether it does."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from gesso_core.errors import NumericalError, WeightsError
from gesso_core.hub import verify, weights_hash, write_manifest
from gesso_core.hub.manifest import require_finite
from safetensors.torch import save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"a": 1}')
    save_file({"proj_out.bias": torch.ones(3)}, tmp_path / WEIGHTS)
    return tmp_path


def test_a_folder_that_matches_its_manifest_is_well(folder: Path) -> None:
    write_manifest(folder, model="sana", commit="abc")
    reports = verify(folder, deep=True)
    assert [report.name for report in reports] == ["config.json", WEIGHTS]
    assert all(report.ok for report in reports)
    assert json.loads((folder / "gesso_manifest.json").read_text())["commit"] == "abc"


def test_verify_names_every_file_that_differs(folder: Path) -> None:
    (folder / "extra.json").write_text("{}")
    write_manifest(folder)
    (folder / "extra.json").unlink()
    (folder / "config.json").write_text("{}")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    problems = {report.name: report.problem or "" for report in verify(folder)}
    assert "expected" in problems["config.json"]
    assert "is missing" in problems["extra.json"]
    assert "sha256" in problems[WEIGHTS]


def test_verify_without_a_manifest_checks_the_structure(folder: Path) -> None:
    assert all(report.ok for report in verify(folder))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    assert [report.ok for report in verify(folder)] == [True, False]


def test_verify_looks_for_nan_when_asked(folder: Path) -> None:
    save_file({"proj_out.bias": torch.tensor([1.0, torch.nan])}, folder / WEIGHTS)
    write_manifest(folder)
    assert all(report.ok for report in verify(folder))
    (bad,) = (report for report in verify(folder, deep=True) if not report.ok)
    assert "proj_out.bias" in (bad.problem or "")
    with pytest.raises(NumericalError, match=r"proj_out\.bias"):
        require_finite(folder / WEIGHTS)


def test_a_manifest_cannot_name_files_elsewhere(folder: Path) -> None:
    entry = {"size": 1, "sha256": "0"}
    manifest = {"files": {"../../secret": entry}}
    (folder / "gesso_manifest.json").write_text(json.dumps(manifest))
    (report,) = verify(folder)
    assert "not a file name inside" in (report.problem or "")
    (folder / "gesso_manifest.json").write_text('{"files": {"a": 1}}')
    with pytest.raises(WeightsError, match="'size' and 'sha256'"):
        verify(folder)


def test_the_hash_of_one_file_is_its_sha256(folder: Path) -> None:
    want = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert weights_hash(folder) == weights_hash(folder / WEIGHTS) == want


def test_the_hash_of_shards_covers_all_of_them(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    hashes = set()
    for a, b in ((0, 0), (0, 1), (1, 0)):
        save_file({"a": torch.full((2,), a)}, folder / "one.safetensors")
        save_file({"b": torch.full((2,), b)}, folder / "two.safetensors")
        hashes.add(weights_hash(folder))
    assert len(hashes) == 3
