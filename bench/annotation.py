"""Annotation on a CPU: prompts on one picture, words, cars, and the memory of a whole folder.

    python bench/annotation.py                  everything → bench/results/annotation.json
    python bench/annotation.py --only cars      one part; nothing is written
    python bench/annotation.py --smoke          the same code, tiny; measures nothing

What should come out, written before it was measured. A picture is looked at once, so ten prompts
cost at most 1.3 times one, and ten clicks a seventh of looking each time. Prompts decoded together
share what does not depend on them, a fourth of a lone one; the published formula, which projects
the picture for each prompt, and a file that takes one prompt per call, take twice as long. A word
of six letters takes less than 10 s and 25 calls of the decoder, and its masks are better than a
colour threshold, which is a hundred times as fast. Eight cars in a batch cost at most three
times one. A folder of a hundred pictures, and the data set written from it, take no more memory
at the end than at the beginning, within 5 %.

The default segmenter must be there: ``make models``.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from annotation_cars import car_rows
from annotation_memory import memory_rows
from annotation_segmenter import segmenter_rows
from annotation_text import text_rows
from cpu_timing import Row, about

RESULTS = Path(__file__).parent / "results" / "annotation.json"
PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "segmenter": segmenter_rows,
    "text": text_rows,
    "cars": car_rows,
    "memory": memory_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--smoke", action="store_true", help="tiny; not a result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = about(arguments.smoke)
    for part in arguments.only or PARTS:
        result[part] = []
        for row in PARTS[part](smoke=arguments.smoke):
            result[part].append(row)
            print(part, json.dumps(row), flush=True)
    if not arguments.smoke and not arguments.only:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
