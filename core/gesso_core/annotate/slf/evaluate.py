"""``python -m gesso_core.annotate.slf.evaluate``: measure SLF on KITTI frames and on made scenes.

Prints a line per variant for both sets, a line per real car, and every failure. ``--kitti`` names a
folder with KITTI's layout in ``training`` and stored masks in ``sam_masks``.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gesso_core.annotate.slf.measure import (
    VARIANTS,
    CarScore,
    Sample,
    Summary,
    car_lines,
    failures,
    real_samples,
    run_variant,
    summarize,
    synthetic_samples,
    table,
)
from gesso_core.annotate.slf.prior import ShapePrior, load_prior
from gesso_core.errors import GessoError, InvalidRequest

FRAMES = 24  # of the synthetic set: more than a hundred cars

Results = dict[str, tuple[Summary, list[CarScore]]]


def measure(
    samples: Sequence[Sample], prior: ShapePrior, variants: Sequence[str], *, with_ap: bool
) -> Results:
    """Every variant on the same samples."""
    results = {}
    for name in variants:
        outcomes, seconds = run_variant(samples, prior, VARIANTS[name])
        results[name] = summarize(name, samples, outcomes, seconds, with_ap=with_ap)
    return results


def report(title: str, results: Results, *, every_car: bool) -> str:
    """The table, the cars of the first variant if asked for, and its failures."""
    _, cars = next(iter(results.values()))
    parts = [title, table([summary for summary, _ in results.values()])]
    if every_car:
        sparse = [c for c in cars if not c.counted]
        parts += [f"cars, {next(iter(results))}:", car_lines([c for c in cars if c.counted])]
        parts += [f"fewer than 5 points, not counted ({len(sparse)}):", car_lines(sparse)]
    failed = failures(cars)
    parts += [f"failures ({len(failed)}):", car_lines(failed)]
    return "\n".join(filter(None, parts))


def as_json(results: Results) -> Mapping[str, Any]:
    """Everything measured, by variant."""
    return {
        name: {"summary": asdict(summary), "cars": [asdict(car) for car in cars]}
        for name, (summary, cars) in results.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 2 where a folder cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m gesso_core.annotate.slf.evaluate", description=__doc__
    )
    parser.add_argument("--kitti", type=Path, help="folder with training/ and sam_masks/")
    parser.add_argument("--masks", type=Path, help="stored masks, if not in <kitti>/sam_masks")
    parser.add_argument("--frames", type=int, default=FRAMES, help="synthetic frames; 0 for none")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="only these")
    parser.add_argument("--json", type=Path, help="also write all measures to this file")
    parser.add_argument("--prior", type=Path, help="folder with a shape prior of your own")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    variants = options.variant or list(VARIANTS)
    try:
        results = _measure_all(options, load_prior(folder=options.prior), variants)
    except GessoError as error:
        print(error.message, file=sys.stderr)
        return 2
    if options.json:
        content = {title: as_json(result) for title, result in results.items()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def _measure_all(
    options: argparse.Namespace, prior: ShapePrior, variants: Sequence[str]
) -> dict[str, Results]:
    results = {}
    if options.kitti is not None:
        samples = real_samples(options.kitti, options.masks or options.kitti / "sam_masks")
        if not samples:
            raise InvalidRequest(f"{options.kitti} has no car with a stored mask", field="path")
        results["KITTI frames"] = measure(samples, prior, variants, with_ap=False)
        print(report("KITTI frames", results["KITTI frames"], every_car=True))
    if options.frames:
        samples = synthetic_samples(options.frames)
        results["synthetic"] = measure(samples, prior, variants, with_ap=True)
        print(report(f"synthetic, {options.frames} frames", results["synthetic"], every_car=False))
    return results


if __name__ == "__main__":
    sys.exit(main())
