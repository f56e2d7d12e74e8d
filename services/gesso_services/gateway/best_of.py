"""Best of N: any model draws N pictures, a model that sees judges all of them, the best come back.

The judge says for each picture how probable it is that the picture shows what the prompt asks for.
"""

from contextlib import suppress
from dataclasses import dataclass

from gesso_contracts import (
    CheckJudgement,
    ImageReady,
    ImagesJudged,
    JudgeImages,
    JudgementChecked,
)
from gesso_core.errors import InvalidRequest, Unavailable

from gesso_services.gateway.catalog import Catalog, Served
from gesso_services.gateway.fabric import Fabric
from gesso_services.gateway.schemas import ImageRequest
from gesso_services.runtime import rpc


@dataclass(frozen=True)
class Chosen:
    """A picture that goes out: the number of its job, and its score where one was given."""

    index: int
    ready: ImageReady
    score: float | None = None
    judge: str | None = None


@dataclass(frozen=True)
class Contest:
    """Who judges, for which prompt, and how many win."""

    judge: Served
    prompt: str
    winners: int

    async def choose(self, fabric: Fabric, made: list[ImageReady]) -> list[Chosen]:
        """The winners, best first; of equals the one with the smaller seed."""
        judged = await judge(
            fabric,
            self.judge,
            JudgeImages(
                model=self.judge.name, prompt=self.prompt, images=[ready.image for ready in made]
            ),
        )
        ranked = sorted(range(len(made)), key=lambda index: -judged.scores[index])
        return [
            Chosen(index, made[index], judged.scores[index], self.judge.name)
            for index in ranked[: self.winners]
        ]


async def contest_of(body: ImageRequest, models: Catalog, fabric: Fabric) -> Contest | None:
    """The contest that ``body`` asks for, if any; InvalidRequest for one that nobody can judge."""
    if body.best_of is None:
        if body.judge is not None:
            raise InvalidRequest(
                f"judge {body.judge!r} has nothing to choose from; say with best_of how many "
                "pictures to draw, or leave it out",
                field="judge",
            )
        return None
    if body.best_of < body.n:
        raise InvalidRequest(
            f"best_of {body.best_of} is less than the {body.n} pictures asked for; draw at least "
            "as many",
            field="best_of",
        )
    judge_of = await models.find("judge", body.judge, field="judge")
    await check_prompt(fabric, judge_of, body.prompt)
    return Contest(judge_of, body.prompt, body.n)


async def check_prompt(fabric: Fabric, served: Served, prompt: str) -> None:
    """InvalidRequest for a prompt by which the model cannot judge, before there is a picture.

    A service that does not answer now may be there by the time that it has to judge.
    """
    with suppress(Unavailable):
        await rpc.call(
            fabric.bus,
            served.service,
            "check-judgement",
            CheckJudgement(model=served.name, prompt=prompt),
            JudgementChecked,
            timeout=fabric.settings.ready_timeout_s,
        )


async def judge(fabric: Fabric, served: Served, question: JudgeImages) -> ImagesJudged:
    """Ask the service for its scores, one per picture."""
    return await rpc.call(
        fabric.bus,
        served.service,
        "judge",
        question,
        ImagesJudged,
        timeout=fabric.settings.deadline_s,
    )
