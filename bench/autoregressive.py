"""HART and VILA-U on a CPU: caching, batching in the service, and time per text token.

    python bench/autoregressive.py                 everything → bench/results/autoregressive.json
    python bench/autoregressive.py --only tokens   one part; nothing is written
    python bench/autoregressive.py --smoke         the same code, tiny; measures nothing

What should come out: keeping keys and values makes the small HART and VILA-U's depth transformer
at least 3 times as fast as computing them again, with the same codes; a service that gets 8
requests at once answers at least 3 times as many per second as one that gets them one by one; a
text token costs at most 1.1 times what it costs with ``generate`` of transformers.

``--hart`` and ``--vila-u`` take other models, by registry name or folder.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from autoregressive_caching import FULL, SMOKE, caching
from autoregressive_service import REPLICAS, Served, replica, throughput
from autoregressive_tokens import text_tokens
from cpu_timing import Row, about, name_or_path
from gesso_core.hub import resolve
from gesso_core.hub.load_vila_u import LLM
from gesso_core.pipelines.hart_load import load_hart
from gesso_core.pipelines.vila_u_load import load_vila_u

RESULTS = Path(__file__).parent / "results" / "autoregressive.json"
PARTS = ("caching", "tokens", "service")


def rows_of(part: str, arguments: argparse.Namespace) -> Iterator[Row]:
    hart, vila_u = name_or_path(arguments.hart), name_or_path(arguments.vila_u)
    if part == "caching":
        sizes = SMOKE if arguments.smoke else FULL
        yield from caching(load_hart(hart), load_vila_u(vila_u), sizes)
    elif part == "tokens":
        folder = resolve(vila_u) / LLM
        yield from text_tokens(load_vila_u(vila_u), folder, smoke=arguments.smoke)
    else:
        yield from throughput(Served(hart, vila_u), smoke=arguments.smoke)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--smoke", action="store_true", help="tiny; not a result")
    parser.add_argument("--hart", default="hart-tiny", help="registry name or folder")
    parser.add_argument("--vila-u", default="vilau-tiny", help="registry name or folder")
    parser.add_argument("--replica", choices=REPLICAS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.replica:
        replica(arguments.replica)
        return
    result: dict[str, Any] = about(arguments.smoke)
    for part in arguments.only or PARTS:
        result[part] = []
        for row in rows_of(part, arguments):
            result[part].append(row)
            print(part, json.dumps(row), flush=True)
    if not arguments.smoke and not arguments.only:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
