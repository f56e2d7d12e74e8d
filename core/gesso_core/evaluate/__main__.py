"""``python -m gesso_core.evaluate``: measure the shipped small models against their gates."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from gesso_core.evaluate.run import table, write_gates
from gesso_core.evaluate.shipped import EVALUATIONS, evaluate_shipped
from gesso_core.hub import resolve


def main(arguments: list[str] | None = None) -> int:
    """Print the table and return 1 when a gate failed."""
    parser = argparse.ArgumentParser(prog="python -m gesso_core.evaluate", description=__doc__)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"all by default: {', '.join(EVALUATIONS)}"
    )
    parser.add_argument("--json", type=Path, help="also write all measures to this file")
    parser.add_argument("--limit", type=int, help="only the first prompts and pictures of each set")
    parser.add_argument(
        "--write-gates", action="store_true", help="store measured values beside the weights"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - EVALUATIONS.keys():
        parser.error(f"nothing is measured of {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    results = evaluate_shipped(options.models, options.limit)
    for name, measures in results.items():
        print(f"{name}\n{table(measures)}")
        if options.write_gates:
            write_gates(measures, resolve(name))
    if options.json:
        content = {name: [asdict(m) for m in measures] for name, measures in results.items()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    failed = [m.name for measures in results.values() for m in measures if not m.passed]
    if failed:
        print(f"below the gate: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
