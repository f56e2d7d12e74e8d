"""``/label-studio``: the ML-backend protocol of Label Studio, for text in pictures.

Give ``http://<this server>/label-studio`` as the URL of a model. A task is answered with the words
and characters of its picture, by the same jobs as ``/v1/annotations/text``; a click or a box of a
smart tool with what it points at. Access tokens that Label Studio sends are not used.

One bad picture costs nothing but its own labels: it gets a prediction without regions and the
reason. What this server could not do in time, or not at all, gets the reason and no prediction:
Label Studio keeps the others and asks for this one again.
"""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Request, Response
from gesso_contracts import AnnotateText, TextAnnotated, TextLabels
from gesso_core.annotate.char_sam.label_studio import least_score, regions
from gesso_core.errors import GessoError, InvalidRequest
from pydantic import BaseModel, Field, JsonValue

from gesso_services.annotation_labels import picture_result
from gesso_services.gateway import annotation_results, orders
from gesso_services.gateway.admission import Admission, Door
from gesso_services.gateway.auth import basic_caller
from gesso_services.gateway.catalog import Models, Served
from gesso_services.gateway.fabric import Fabric, Here
from gesso_services.gateway.label_studio_clicks import Context, Incoming, cut_out
from gesso_services.gateway.label_studio_files import TaskPictures
from gesso_services.gateway.labeling_config import Control, LabelingConfig, read_config
from gesso_services.gateway.orders import Order
from gesso_services.gateway.problems import EdgeError, documented
from gesso_services.gateway.uploads import INLINE_BYTES_PER_JOB, Intake

PATH: Final = "/label-studio"
PREDICT: Final = f"{PATH}/predict"
WEBHOOK: Final = f"{PATH}/webhook"
KIND: Final = "annotate-text"
AT_ONCE: Final = 8  # pictures of one call that are in work
MOST_TASKS: Final = 10_000  # Label Studio sends all that a person has chosen in one call
Caller = Annotated[str, Depends(basic_caller)]
router = APIRouter(prefix=PATH, tags=["label studio"])
ConfigText = Annotated[str, Field(max_length=100_000)]


class Setup(Incoming):
    """A project connects to this server."""

    label_config: ConfigText = Field(alias="schema", description="the labelling interface")


class Task(Incoming):
    """One picture to label."""

    id: JsonValue = None
    data: dict[str, JsonValue] = Field(
        description="the picture: a data: URL, or a file that both servers see"
    )


class Parameters(Incoming):
    """How to predict."""

    context: Context | None = None


class Predict(Incoming):
    """Tasks that want predictions."""

    tasks: list[Task] = Field(min_length=1, max_length=MOST_TASKS)
    label_config: ConfigText
    params: Parameters | None = None


class Health(BaseModel):
    """The protocol's word for: alive."""

    status: Literal["UP"] = "UP"
    model_class: str = "gesso"


class ModelVersion(BaseModel):
    """Under which name predictions are kept."""

    model_version: str


class Prediction(BaseModel):
    """The regions of one task; ``error`` tells why a picture could have none."""

    model_version: str
    score: float = Field(ge=0, le=1)
    result: list[dict[str, JsonValue]]
    error: str | None = None


class Unanswered(BaseModel):
    """No prediction, and why; Label Studio writes that into its log and asks again."""

    error: str


class Predictions(ModelVersion):
    """One answer per task, in their order."""

    results: list[Prediction | Unanswered]


class Heard(BaseModel):
    """Nothing is learned from what people label."""

    status: Literal["ignored"] = "ignored"


@router.get("/health")
async def health() -> Health:
    """This server answers."""
    return Health()


@router.post("/setup", responses=documented(400, 401, 404, 413, 422, 429, 500, 503))
async def setup(_: Caller, body: Setup, models: Models) -> ModelVersion:
    """Refuse a labelling interface that could not show masks; 422 says what it needs."""
    read_config(body.label_config, "schema")
    return ModelVersion(model_version=(await models.find(KIND, None)).name)


@router.post("/webhook", responses=documented(413, 429, 500))
async def webhook() -> Heard:
    """Label Studio tells every model of its projects what people do; nothing follows from it."""
    return Heard()


@router.post(
    "/predict",
    response_model=Predictions,
    response_model_exclude_none=True,
    responses=documented(400, 401, 404, 409, 413, 422, 429, 500, 503, 504, 507),
)
async def predict(
    caller: Caller, body: Predict, request: Request, fabric: Here, models: Models, door: Door
) -> Any:
    """Label the pictures of all tasks; with `params.context`, cut out what the tools point at."""
    config = read_config(body.label_config, "label_config")
    pictures = TaskPictures.of(fabric.settings)
    with door.place(caller):
        context = body.params and body.params.context
        if context and context.result:
            served = await models.find("segment", None)
            field = _field(0, config)
            data = await pictures.read(_address(body.tasks[0], config, field), field)
            region = await cut_out(data, field, context, config, served, fabric)
            return Predictions(model_version=served.name, results=[_prediction(served, [region])])
        served = await models.find(KIND, None)
        control = config.for_text
        if control is None:
            return Predictions(
                model_version=served.name, results=[_prediction(served, []) for _ in body.tasks]
            )
        labeller = _Labeller(fabric, door, served, config, control, pictures)
        answers = await orders.while_connected(request, labeller.all(body.tasks))
        if answers is None:
            return Response(status_code=499)
        return Predictions(model_version=served.name, results=answers)


@dataclass(frozen=True)
class _Labeller:
    """Labels the pictures of one call, each for itself."""

    fabric: Fabric
    door: Admission
    served: Served
    config: LabelingConfig
    control: Control
    pictures: TaskPictures

    async def all(self, tasks: list[Task]) -> list[Prediction | Unanswered]:
        """An answer per task; raises only what kept all of them from being answered."""
        slots = asyncio.Semaphore(AT_ONCE)
        work = [
            asyncio.create_task(self._one(index, task, slots)) for index, task in enumerate(tasks)
        ]
        try:
            await asyncio.wait(work, timeout=self.fabric.settings.label_studio_deadline_s)
        finally:
            for one in work:
                one.cancel()  # what is under way takes its job back, which nobody waits for
            self.fabric.in_background(_settle(work))
        found = [one.result() if one.done() else self._late() for one in work]
        failures = [one for one in found if isinstance(one, GessoError)]
        if len(failures) == len(found):
            raise failures[0]
        return [
            Unanswered(error=one.message) if isinstance(one, GessoError) else one for one in found
        ]

    async def _one(
        self, index: int, task: Task, slots: asyncio.Semaphore
    ) -> Prediction | GessoError:
        try:
            async with slots:
                return _prediction(self.served, await self._regions(index, task))
        except InvalidRequest as error:
            reason = f"{error.field}: {error.message}" if error.field else error.message
            return _prediction(self.served, [], reason)
        except GessoError as error:
            return error

    def _late(self) -> EdgeError:
        return EdgeError(
            504,
            "deadline_exceeded",
            "the picture was not labelled within "
            f"{self.fabric.settings.label_studio_deadline_s:g} s; what is done counts, so ask "
            "again for the rest",
        )

    async def _regions(self, index: int, task: Task) -> list[dict[str, Any]]:
        field = _field(index, self.config)
        data = await self.pictures.read(_address(task, self.config, field), field)
        async with self.door.admitted(self.served.service):
            intake = Intake(self.fabric, inline_bytes=INLINE_BYTES_PER_JOB)
            message = AnnotateText(model=self.served.name, image=await intake.picture(data, field))
        name = f"label-{uuid.uuid4().hex}"
        order = Order(
            service=self.served.service, kind=KIND, jobs=((name, message),), lasting=False
        )
        (state,) = await orders.fulfil(self.fabric, order)
        made = orders.result_of(state, TextAnnotated)
        labels = await annotation_results.labels_of(self.fabric, made.labels, TextLabels)
        return await asyncio.to_thread(_drawn, labels, self.control, self.config.to_name)


async def _settle(work: Sequence["asyncio.Future[Prediction | GessoError]"]) -> None:
    """Until the last of them has ended; whatever they raise now is of no interest."""
    await asyncio.gather(*work, return_exceptions=True)


def _drawn(labels: TextLabels, control: Control, to_name: str) -> list[dict[str, Any]]:
    """The regions whose label the project has."""
    result = picture_result(labels)
    found = regions(result, shape=control.shape, from_name=control.name, to_name=to_name)
    return [one for one in found if set(one["value"][one["type"]]) <= control.labels]


def _field(index: int, config: LabelingConfig) -> str:
    return f"tasks.{index}.data.{config.key}"


def _address(task: Task, config: LabelingConfig, field: str) -> str:
    address = task.data.get(config.key)
    if not isinstance(address, str):
        raise InvalidRequest(
            f"the task has no text under {config.key!r}, where the labelling interface looks for "
            "its picture; send a base64 data: URL",
            field=field,
        )
    return address


def _prediction(
    served: Served, drawn: list[dict[str, Any]], error: str | None = None
) -> Prediction:
    score = least_score(drawn)
    return Prediction(model_version=served.name, score=score, result=drawn, error=error)
