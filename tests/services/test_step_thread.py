"""The denoising thread: it works while there is work, survives failures, and ends when told."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path

import pytest
from gesso_core.errors import Unavailable
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.draft import Draft
from gesso_core.pipelines.load import load_denoiser
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.step_batcher import StepBatcher, Ticket
from gesso_services.step_thread import StepThread


@pytest.fixture(scope="module")
def denoiser(tiny_pipeline: Path) -> Denoiser:
    return load_denoiser(tiny_pipeline)


@pytest.fixture
def batches() -> list[int]:
    return []


@pytest.fixture
def thread(batches: list[int]) -> Iterator[StepThread]:
    steps = StepThread(StepBatcher(), threads=1, on_batch=batches.append)
    steps.start()
    yield steps
    steps.stop()


def draft(denoiser: Denoiser, seed: int = 1, steps: int = 3) -> Draft:
    request = GenerationRequest(prompt="x", width=64, height=64, seed=seed, steps=steps)
    return denoiser.begin(denoiser.recipe(request))


def add(thread: StepThread, denoiser: Denoiser, drawn: Draft) -> Ticket:
    return thread.add(
        denoiser, drawn, job_id="j", on_step=lambda draft: None, is_withdrawn=lambda: False
    )


def test_pictures_that_come_at_any_time_are_finished(
    thread: StepThread, denoiser: Denoiser, batches: list[int]
) -> None:
    first = add(thread, denoiser, draft(denoiser))
    assert first.outcome.result(timeout=10).done
    second = add(thread, denoiser, draft(denoiser, seed=2, steps=2))
    assert second.outcome.result(timeout=10).done
    assert batches == [1] * 5


def test_a_failing_batcher_ends_its_pictures_and_the_thread_goes_on(
    denoiser: Denoiser, caplog: pytest.LogCaptureFixture
) -> None:
    failing = [True]

    class FailsOnce(StepBatcher):
        def step(self) -> int:
            if failing:
                raise ZeroDivisionError(failing.pop())
            return super().step()

    thread = StepThread(FailsOnce(), threads=1, on_batch=lambda size: None)
    thread.start()
    with pytest.raises(ZeroDivisionError):
        add(thread, denoiser, draft(denoiser)).outcome.result(timeout=10)
    assert add(thread, denoiser, draft(denoiser)).outcome.result(timeout=10).done
    thread.stop()
    assert "a step failed" in caplog.text


def test_who_is_still_here_when_the_thread_stops_is_told(denoiser: Denoiser) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        def advance(self, drafts: Sequence[Draft]) -> list[Draft]:
            entered.set()
            leave.wait(10)
            return denoiser.advance(drafts)

    thread = StepThread(StepBatcher(), threads=1, on_batch=lambda size: None)
    thread.start()
    ticket = thread.add(
        Slow(),
        draft(denoiser),
        job_id="j",
        on_step=lambda draft: None,
        is_withdrawn=lambda: False,
    )
    assert entered.wait(10)
    thread.stop()
    leave.set()
    assert wait([ticket.outcome], timeout=10).not_done == set()
    assert isinstance(ticket.outcome.exception(), Unavailable)
    with pytest.raises(Unavailable, match="stops"):
        add(thread, denoiser, draft(denoiser))
