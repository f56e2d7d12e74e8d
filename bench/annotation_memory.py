"""A folder of made pictures through ``gesso annotate text --local``: is the memory constant?

The process is watched from outside while it works: the most that it holds resident during each ten
pictures. The writer of the data set runs in a process of its own, over ten pictures and over all.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cpu_timing import Row
from gesso_contracts import TextLabels, parse
from gesso_core.annotate.char_sam.readers import words_to_json
from gesso_core.annotate.char_sam.synthetic import make_scene
from gesso_core.annotate.masks import Mask, Overlap, overlap
from gesso_core.pipelines.pictures import encode_picture
from gesso_services.annotation_labels import picture_result
from gesso_services.cli.annotated_folder import MANIFEST

PICTURES, SMOKE_PICTURES = 100, 2
WINDOW = 10  # pictures
FIRST_SEED = 3000
GROWTH = 0.05  # of the last window over the first
LOOK_EVERY_S = 0.02
EXPORT = Path(__file__).with_name("annotation_export.py")


@dataclass
class Watched:
    """The most memory while each picture was worked on, in bytes."""

    peaks: list[int] = field(default_factory=list)

    def see(self, done: int, resident: int) -> None:
        self.peaks += [0] * (done + 1 - len(self.peaks))
        self.peaks[done] = max(self.peaks[done], resident)

    def windows(self, pictures: int) -> list[float]:
        """Of each ten pictures, in MB."""
        starts = range(0, pictures, WINDOW)
        return [round(max(self.peaks[start : start + WINDOW]) / 1e6, 1) for start in starts]


def memory_rows(*, smoke: bool) -> Iterator[Row]:
    pictures = SMOKE_PICTURES if smoke else PICTURES
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "pictures", Path(place) / "out"
        truths = _make(folder, pictures)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        watched, wall_s = _annotate(folder, out)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        windows = watched.windows(pictures)
        growth = windows[-1] / windows[0] - 1
        yield {
            "what": "gesso annotate text FOLDER --local, a word per picture",
            "pictures": pictures,
            "peak_mb_of_each_10_pictures": windows,
            "growth": round(growth, 4),
            "target": GROWTH,
            "met": growth <= GROWTH,
            "cpu_s_per_picture": round(cpu_s / pictures, 3),
            "wall_s_per_picture": round(wall_s / pictures, 3),
            "fg_iou": round(_found(out, truths).iou, 4),
        }
        yield _export_row(folder, out, min(WINDOW, pictures // 2), pictures)


def _make(folder: Path, pictures: int) -> dict[str, Mask]:
    """The pictures with words.json beside them; their ink by name."""
    folder.mkdir()
    truths, words = {}, {}
    for seed in range(FIRST_SEED, FIRST_SEED + pictures):
        scene = make_scene(seed, words=1)
        name = f"{scene.name}.png"
        (folder / name).write_bytes(encode_picture(scene.picture_HW3))
        truths[name], words[name] = scene.truth(0), scene.words
    (folder / "words.json").write_text(json.dumps(words_to_json(words)))
    return truths


def _annotate(folder: Path, out: Path) -> tuple[Watched, float]:
    """Run the command to its end, and look at its memory all the while."""
    gesso = str(Path(sys.executable).with_name("gesso"))
    options = ["--words", str(folder / "words.json"), "--out", str(out), "--local"]
    watched, begun = Watched(), time.perf_counter()
    process = subprocess.Popen(
        [gesso, "annotate", "text", str(folder), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None:
        if resident := _resident(process.pid):
            watched.see(_done(out), resident)
        time.sleep(LOOK_EVERY_S)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode())
    return watched, time.perf_counter() - begun


def _resident(pid: int) -> int:
    """Bytes, 0 when the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def _done(out: Path) -> int:
    manifest = out / MANIFEST
    return manifest.read_bytes().count(b"\n") if manifest.is_file() else 0


def _found(out: Path, truths: dict[str, Mask]) -> Overlap:
    """What lies in the folder against the truth, pixels of all pictures together."""
    found = Overlap()
    for name, truth_HW in truths.items():
        result = picture_result(parse((out / f"labels/{name}.json").read_bytes(), TextLabels))
        found += overlap(result.words[0].mask.paint(result.size), truth_HW)
    return found


def _export_row(folder: Path, out: Path, few: int, all_of_them: int) -> Row:
    """The writer of COCO over the first pictures, and over all."""
    some = out.with_name("some")
    some.mkdir()
    (some / "labels").symlink_to(out / "labels")
    lines = (out / MANIFEST).read_text().splitlines(keepends=True)
    (some / MANIFEST).write_text("".join(lines[:few]))
    peaks, seconds, annotations = [], 0.0, 0
    for place in (some, out):
        command = [sys.executable, str(EXPORT), str(place), str(folder)]
        said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        peaks.append(said["peak"])
        seconds, annotations = said["seconds"], said["annotations"]
    growth = peaks[1] / peaks[0] - 1
    return {
        "what": "writing the COCO data set",
        "pictures": [few, all_of_them],
        "peak_mb": [round(peak / 1e6, 1) for peak in peaks],
        "growth": round(growth, 4),
        "target": GROWTH,
        "met": growth <= GROWTH,
        "wall_s": round(seconds, 3),
        "annotations": annotations,
    }
