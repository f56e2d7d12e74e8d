"""The step batcher: who shares a step, who goes first, and who is to blame."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import Cancelled, NumericalError, OutOfMemory
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.draft import Draft
from gesso_core.pipelines.load import load_denoiser
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.step_batcher import StepBatcher, Ticket


@dataclass
class Recorder:
    """A real denoiser that notes which seeds share a forward, and fails where it is told to."""

    denoiser: Denoiser
    forwards: list[list[int]] = field(default_factory=list)
    fail: Callable[[Sequence[Draft]], Exception | None] = lambda drafts: None

    def advance(self, drafts: Sequence[Draft]) -> list[Draft]:
        self.forwards.append([draft.recipe.seed for draft in drafts])
        if error := self.fail(drafts):
            raise error
        return self.denoiser.advance(drafts)

    def draft(self, seed: int, **wishes: object) -> Draft:
        size = {"width": 64, "height": 64, "steps": 3}
        request = GenerationRequest(prompt="a red apple", seed=seed, **(size | wishes))
        return self.denoiser.begin(self.denoiser.recipe(request))


@pytest.fixture(scope="module")
def denoiser(tiny_pipeline: Path) -> Denoiser:
    return load_denoiser(tiny_pipeline)


@pytest.fixture
def recorder(denoiser: Denoiser) -> Recorder:
    return Recorder(denoiser)


def run(batcher: StepBatcher) -> None:
    while batcher.step():
        pass


def latent(ticket: Ticket) -> torch.Tensor:
    return ticket.outcome.result(timeout=0).result


def alone(recorder: Recorder, draft: Draft) -> torch.Tensor:
    while not draft.done:
        (draft,) = recorder.denoiser.advance([draft])
    return draft.result


def test_pictures_of_one_size_share_every_step(recorder: Recorder) -> None:
    batcher = StepBatcher()
    for seed in range(3):
        batcher.add(recorder, recorder.draft(seed))
    run(batcher)
    assert recorder.forwards == [[0, 1, 2]] * 3


def test_a_picture_is_the_same_alone_and_in_a_batch(recorder: Recorder) -> None:
    wishes = [
        {"steps": 5},
        {"steps": 8, "guidance_scale": 2.0},
        {"steps": 3, "sampler": "flow-euler"},
        {"steps": 7, "negative_prompt": "a very long list of things that nobody wants to see"},
    ]
    drafts = [recorder.draft(seed, **wish) for seed, wish in enumerate(wishes)]
    batcher = StepBatcher()
    tickets = [batcher.add(recorder, draft) for draft in drafts]
    run(batcher)
    for ticket, draft in zip(tickets, drafts, strict=True):
        torch.testing.assert_close(latent(ticket), alone(recorder, draft), atol=1e-4, rtol=1e-4)


def test_pictures_enter_and_leave_between_steps(recorder: Recorder) -> None:
    batcher = StepBatcher()
    first = batcher.add(recorder, recorder.draft(1, steps=2))
    batcher.step()
    late = recorder.draft(2, steps=3)
    second = batcher.add(recorder, late)
    run(batcher)
    assert recorder.forwards == [[1], [1, 2], [2], [2]]
    assert first.outcome.done()
    torch.testing.assert_close(latent(second), alone(recorder, late), atol=1e-4, rtol=1e-4)


def test_a_withdrawn_picture_takes_no_further_step(recorder: Recorder) -> None:
    batcher = StepBatcher()
    withdrawn = threading.Event()
    draft = recorder.draft(1, steps=9)
    ticket = batcher.add(recorder, draft, ticket_id="job-1", is_withdrawn=withdrawn.is_set)
    batcher.add(recorder, recorder.draft(2, steps=3))
    batcher.step()
    withdrawn.set()
    run(batcher)
    assert recorder.forwards == [[1, 2], [2], [2]]
    with pytest.raises(Cancelled, match="job-1 was cancelled after step 1"):
        ticket.outcome.result(timeout=0)


def test_a_picture_withdrawn_before_its_first_step_never_starts(recorder: Recorder) -> None:
    batcher = StepBatcher()
    ticket = batcher.add(recorder, recorder.draft(1), is_withdrawn=lambda: True)
    assert not batcher.step()
    assert recorder.forwards == []
    assert isinstance(ticket.outcome.exception(timeout=0), Cancelled)


def test_what_on_step_raises_ends_that_picture_alone(recorder: Recorder) -> None:
    def withdraw(draft: Draft) -> None:
        raise Cancelled("job-1", after=draft.steps_done)

    batcher = StepBatcher()
    ticket = batcher.add(recorder, recorder.draft(1), on_step=withdraw)
    other = batcher.add(recorder, recorder.draft(2))
    run(batcher)
    assert isinstance(ticket.outcome.exception(timeout=0), Cancelled)
    assert recorder.forwards == [[1, 2], [2], [2]]
    assert latent(other).isfinite().all()


def test_every_step_is_told_with_its_estimate(recorder: Recorder) -> None:
    seen: list[tuple[int, torch.Size]] = []
    batcher = StepBatcher()
    batcher.add(
        recorder,
        recorder.draft(1),
        on_step=lambda draft: seen.append((draft.steps_done, draft.denoised_CHW.shape)),
    )
    run(batcher)
    assert seen == [(1, (8, 4, 4)), (2, (8, 4, 4)), (3, (8, 4, 4))]


def test_a_lone_picture_of_a_rare_size_goes_every_other_step(recorder: Recorder) -> None:
    batcher = StepBatcher()
    for seed in range(5):
        batcher.add(recorder, recorder.draft(seed, steps=6))
    batcher.add(recorder, recorder.draft(9, width=128, height=32, steps=6))
    run(batcher)
    assert recorder.forwards == [[0, 1, 2, 3, 4], [9]] * 6


def test_newcomers_do_not_starve_a_long_picture(recorder: Recorder) -> None:
    batcher = StepBatcher()
    long = batcher.add(recorder, recorder.draft(0, steps=5))
    sizes = [(64, 32), (32, 64), (128, 32), (32, 128)]
    for seed in range(1, 40):
        width, height = sizes[seed % 4]
        batcher.add(recorder, recorder.draft(seed, width=width, height=height, steps=1))
        batcher.step()
        if long.outcome.done():
            break
    assert len(recorder.forwards) <= 5 * 5


def test_a_batch_has_at_most_the_allowed_pixels_and_the_first_come_go_first(
    recorder: Recorder,
) -> None:
    batcher = StepBatcher(max_batch_pixels=2 * 64 * 64)
    for seed in range(3):
        batcher.add(recorder, recorder.draft(seed, steps=2))
    run(batcher)
    assert recorder.forwards == [[0, 1], [0, 1], [2], [2]]


def test_a_picture_over_the_pixel_limit_goes_alone(recorder: Recorder) -> None:
    batcher = StepBatcher(max_batch_pixels=1)
    batcher.add(recorder, recorder.draft(1, steps=1))
    batcher.add(recorder, recorder.draft(2, steps=1))
    run(batcher)
    assert recorder.forwards == [[1], [2]]


def test_with_and_without_guidance_do_not_share_a_forward(recorder: Recorder) -> None:
    batcher = StepBatcher()
    batcher.add(recorder, recorder.draft(1, steps=1))
    batcher.add(recorder, recorder.draft(2, steps=1, guidance_scale=1.0))
    run(batcher)
    assert recorder.forwards == [[1], [2]]


def test_a_picture_that_becomes_nan_fails_alone_and_names_the_step(recorder: Recorder) -> None:
    sick = recorder.draft(1)
    sick = replace(sick, state=replace(sick.state, latent=sick.state.latent * float("nan")))
    healthy = recorder.draft(2)
    batcher = StepBatcher()
    first, second = batcher.add(recorder, sick), batcher.add(recorder, healthy)
    run(batcher)
    with pytest.raises(NumericalError, match=r"at step 1 of 3 \(flow-dpm-solver\)"):
        first.outcome.result(timeout=0)
    torch.testing.assert_close(latent(second), alone(recorder, healthy), atol=1e-4, rtol=1e-4)


def test_out_of_memory_halves_the_batch_and_remembers_it(recorder: Recorder) -> None:
    recorder.fail = lambda drafts: torch.OutOfMemoryError("no memory") if len(drafts) > 2 else None
    batcher = StepBatcher()
    tickets = [batcher.add(recorder, recorder.draft(seed, steps=2)) for seed in range(4)]
    run(batcher)
    assert recorder.forwards[0] == [0, 1, 2, 3]
    assert max(len(seeds) for seeds in recorder.forwards[1:]) == 2
    assert all(latent(ticket).isfinite().all() for ticket in tickets)


def test_a_picture_that_does_not_fit_alone_fails_with_advice(recorder: Recorder) -> None:
    recorder.fail = lambda drafts: (
        RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if any(draft.recipe.seed == 1 for draft in drafts)
        else None
    )
    batcher = StepBatcher()
    too_large, other = (batcher.add(recorder, recorder.draft(seed)) for seed in (1, 2))
    run(batcher)
    with pytest.raises(OutOfMemory, match="64x64 does not fit into memory even alone"):
        too_large.outcome.result(timeout=0)
    assert latent(other).isfinite().all()


def test_an_unexpected_error_fails_only_the_picture_to_blame(recorder: Recorder) -> None:
    recorder.fail = lambda drafts: (
        ZeroDivisionError("broken") if any(draft.recipe.seed == 2 for draft in drafts) else None
    )
    batcher = StepBatcher()
    tickets = [batcher.add(recorder, recorder.draft(seed)) for seed in range(5)]
    run(batcher)
    errors = [ticket.outcome.exception(timeout=0) for ticket in tickets]
    assert [type(error) for error in errors if error] == [ZeroDivisionError]
    assert isinstance(errors[2], ZeroDivisionError)


def test_two_models_never_share_a_forward(denoiser: Denoiser) -> None:
    one, two = Recorder(denoiser), Recorder(denoiser)
    batcher = StepBatcher()
    batcher.add(one, one.draft(1, steps=1))
    batcher.add(two, two.draft(2, steps=1))
    run(batcher)
    assert (one.forwards, two.forwards) == ([[1]], [[2]])


def test_whoever_cannot_go_on_abandons_everybody(recorder: Recorder) -> None:
    batcher = StepBatcher()
    ticket = batcher.add(recorder, recorder.draft(1))
    batcher.abandon(RuntimeError("the end"))
    assert len(batcher) == 0
    with pytest.raises(RuntimeError, match="the end"):
        ticket.outcome.result(timeout=0)


def test_an_empty_batcher_has_nothing_to_do() -> None:
    batcher = StepBatcher()
    assert not batcher.step()
    assert len(batcher) == 0
