"""Best of N through the whole stack: the small Sana draws, the small VILA-U judges.

Starts ``gesso up`` and asks over HTTP, as anybody would: eight pictures of a prompt with eight
seeds, and the judge's score of each. The accuracy of the picture that the judge picks is the
retrieval measure of the evaluation (nearest reference sprite), beside a random pick and beside the
best possible pick. The pictures are drawn once; N = 1, 2, 4 are the parts of the same eight, all of
them counted, so N = 1 is the random pick.

    python bench/best_of_n.py             → bench/results/best_of_n.json
    python bench/best_of_n.py --smoke     two prompts of each set; not a result

What should come out: the accuracy of the picked picture rises with N on prompts that the drawing
model was not trained on.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from cpu_timing import processor
from embedded import free_port, stack, until_ready
from gesso_core.evaluate import prompts as fixed
from gesso_core.evaluate.prompts import EvaluationPrompt
from gesso_core.evaluate.references import References, load_references
from gesso_core.evaluate.retrieval import score
from gesso_core.hub import resolve
from gesso_core.pipelines.pictures import decode_picture
from gesso_services.client import AsyncGesso

RESULTS = Path(__file__).parent / "results" / "best_of_n.json"
CANDIDATES, SIZES = 8, (1, 2, 4, 8)
AT_ONCE, CONFIRMED = 3, 5
MEASURES = ("top1", "styled", "background", "all")
SETS = {
    "held-out compositions": fixed.held_out,
    "everyday words": fixed.everyday,
    "trained keywords, new arrangement": fixed.trained_keywords,
    "trained keywords, new wording": partial(fixed.trained_keywords, template=fixed.NEW_WORDING),
}


@dataclass(frozen=True)
class Candidates:
    """The pictures of one prompt: what each of them gets right, and what the judge says."""

    first_seed: int
    right: dict[str, list[bool]]
    scores: list[float]

    def groups(self, size: int) -> Iterator[range]:
        """The candidates in parts of ``size``."""
        for start in range(0, len(self.scores), size):
            yield range(start, start + size)

    def picked(self, measure: str, size: int) -> float:
        """Share of the groups whose picture with the highest score is right."""
        best = [max(group, key=self.scores.__getitem__) for group in self.groups(size)]
        return sum(self.right[measure][index] for index in best) / len(best)

    def best_possible(self, measure: str, size: int) -> float:
        """Share of the groups that have a right picture."""
        groups = list(self.groups(size))
        return sum(any(self.right[measure][i] for i in group) for group in groups) / len(groups)


async def candidates_of(
    gesso: AsyncGesso,
    prompt: EvaluationPrompt,
    first_seed: int,
    references: References,
    models: tuple[str, str],
) -> Candidates:
    """Draw and judge the eight pictures of a prompt."""
    painter, judge = models
    drawn = await gesso.generate(prompt.text, model=painter, n=CANDIDATES, seed=first_seed)
    scores = await gesso.judge(prompt.text, *(picture.data for picture in drawn), model=judge)
    right: dict[str, list[bool]] = {measure: [] for measure in MEASURES}
    for picture in drawn:
        pixels_HWC = torch.from_numpy(decode_picture(picture.data).copy())
        signal = pixels_HWC.permute(2, 0, 1)[None].float() / 127.5 - 1
        found = score([prompt], signal, references)
        hits = {name: getattr(found, name) == 1.0 for name in MEASURES[:-1]}
        hits["all"] = hits["styled"] and hits["background"]
        for name, hit in hits.items():
            right[name].append(hit)
    return Candidates(first_seed, right, scores)


async def confirmed(
    gesso: AsyncGesso, prompt: EvaluationPrompt, found: Candidates, models: tuple[str, str]
) -> bool:
    """Whether ``best_of`` of the API gives back the picture that was picked here."""
    painter, judge = models
    (picture,) = await gesso.generate(
        prompt.text, model=painter, n=1, seed=found.first_seed, best_of=CANDIDATES, judge=judge
    )
    return found.scores[picture.seed - found.first_seed] >= max(found.scores) - 1e-6


async def measured(
    url: str, models: tuple[str, str], references: References, limit: int
) -> dict[str, Any]:
    """All sets."""
    result: dict[str, Any] = {}
    places = asyncio.Semaphore(AT_ONCE)
    async with AsyncGesso(url) as gesso:

        async def one(number: int, prompt: EvaluationPrompt) -> Candidates:
            async with places:
                first_seed = CANDIDATES * number
                return await candidates_of(gesso, prompt, first_seed, references, models)

        for name, build in SETS.items():
            prompts, begun = build(references)[:limit], time.perf_counter()
            found = await asyncio.gather(*(one(*numbered) for numbered in enumerate(prompts)))
            checks = [
                await confirmed(gesso, prompt, candidates, models)
                for prompt, candidates in list(zip(prompts, found, strict=True))[:CONFIRMED]
            ]
            result[name] = {
                "prompts": len(prompts),
                "seconds": round(time.perf_counter() - begun, 1),
                "api_picks_the_same": f"{sum(checks)} of {len(checks)}",
                **table(found),
            }
            print(name, json.dumps(result[name]), flush=True)
    return result


def table(found: Sequence[Candidates]) -> dict[str, Any]:
    """Per measure and N the accuracy of the pick, of a random pick and of the best possible one."""
    rows: dict[str, Any] = {}
    for measure in MEASURES:
        rows[measure] = {
            "random": _mean([one.picked(measure, 1) for one in found]),
            "judged": {n: _mean([one.picked(measure, n) for one in found]) for n in SIZES},
            "best_possible": {
                n: _mean([one.best_possible(measure, n) for one in found]) for n in SIZES
            },
        }
    return rows


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def environment(painter: str, judge: str) -> dict[str, str]:
    """The two models and nothing else; ``judge`` may be a folder."""
    folder = Path(judge) if Path(judge).is_dir() else None
    name = judge if folder is None else folder.name
    return {
        "GESSO_DIFFUSION_MODELS": json.dumps([painter]),
        "GESSO_AUTOREGRESSIVE_MODELS": json.dumps([judge] if folder is None else []),
        "GESSO_AUTOREGRESSIVE_FOLDERS": json.dumps({} if folder is None else {name: judge}),
        "GESSO_AUTOENCODER_MODELS": json.dumps(
            ["dcae-tiny", *([f"{judge}-tower"] if folder is None else [])]
        ),
        "GESSO_AUTOENCODER_FOLDERS": json.dumps({} if folder is None else {name: judge}),
        "GESSO_LOG_LEVEL": "warning",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two prompts of each set")
    parser.add_argument("--prompts", type=int, default=100, help="most prompts of a set")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--painter", default="sana-tiny")
    parser.add_argument("--judge", default="vilau-tiny", help="registry name or folder")
    arguments = parser.parse_args()
    references = load_references(resolve("sana-tiny") / "references.safetensors")
    models = (arguments.painter, Path(arguments.judge).name)
    os.environ |= environment(arguments.painter, arguments.judge)
    port, load = free_port(), os.getloadavg()[0]
    url, limit = f"http://127.0.0.1:{port}", 2 if arguments.smoke else arguments.prompts
    with stack(uuid4().hex, port) as process:
        until_ready(process, url)
        sets = asyncio.run(measured(url, models, references, limit))
    result = {
        "painter": models[0],
        "judge": models[1],
        "device": processor(),
        "load_average_before": round(load, 2),
        "smoke": arguments.smoke,
        "measured": date.today().isoformat(),
        "sets": sets,
    }
    if not arguments.smoke:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
