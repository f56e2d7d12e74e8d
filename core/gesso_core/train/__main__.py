"""``python -m gesso_core.train STAGE --profile cpu``: train the small models, resumable."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from gesso_core.hub.store import SHIPPED
from gesso_core.train.profiles import PROFILES
from gesso_core.train.stages import (
    Workspace,
    limit_threads,
    run_autoencoder,
    run_data,
    run_denoiser,
    run_publish,
)

STAGES: dict[str, Callable[[Workspace], None]] = {
    "data": run_data,
    "autoencoder": run_autoencoder,
    "denoiser": run_denoiser,
    "publish": run_publish,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one stage, or all of them in order."""
    parser = argparse.ArgumentParser(prog="python -m gesso_core.train", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("--data", type=Path, default=Path("data"), help="packages and sprites")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="states of the runs")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="where 'publish' writes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    limit_threads(options.threads)
    workspace = Workspace(PROFILES[options.profile], options.data, options.runs, options.weights)
    for name in STAGES if options.stage == "all" else [options.stage]:
        STAGES[name](workspace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
