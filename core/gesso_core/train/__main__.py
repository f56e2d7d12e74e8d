"""``python -m gesso_core.train STAGE --profile cpu``: train the small models, resumable."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from gesso_core.hub.store import SHIPPED
from gesso_core.train.hart import run_hart
from gesso_core.train.hart_tokenizer import run_hart_tokenizer
from gesso_core.train.lora import STYLES, LoraProfile, run_lora
from gesso_core.train.profiles import PROFILES
from gesso_core.train.publish_hart import run_publish_hart
from gesso_core.train.publish_vila_u import run_publish_vila_u
from gesso_core.train.stages import (
    Workspace,
    limit_threads,
    run_autoencoder,
    run_data,
    run_denoiser,
    run_publish,
)
from gesso_core.train.vila_u import run_vila_u
from gesso_core.train.vila_u_tower import run_vila_u_tower

STAGES: dict[str, Callable[[Workspace], None]] = {
    "data": run_data,
    "autoencoder": run_autoencoder,
    "denoiser": run_denoiser,
    "publish": run_publish,
    "hart-tokenizer": run_hart_tokenizer,
    "hart": run_hart,
    "publish-hart": run_publish_hart,
    "vila-u-tower": run_vila_u_tower,
    "vila-u": run_vila_u,
    "publish-vila-u": run_publish_vila_u,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one stage, or all of them in order; ``lora`` stands beside them."""
    parser = argparse.ArgumentParser(prog="python -m gesso_core.train", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all", "lora"])
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("--data", type=Path, default=Path("data"), help="packages and sprites")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="states of the runs")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="where 'publish' writes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--style", choices=list(STYLES), default="ink", help="of 'lora'")
    parser.add_argument("--updates", type=int, default=LoraProfile.updates, help="of 'lora'")
    options = parser.parse_args(arguments)
    limit_threads(options.threads)
    workspace = Workspace(PROFILES[options.profile], options.data, options.runs, options.weights)
    if options.stage == "lora":
        run_lora(workspace, options.style, LoraProfile(updates=options.updates))
        return 0
    for name in STAGES if options.stage == "all" else [options.stage]:
        STAGES[name](workspace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
