"""Drafts whose steps differ are brought together, and nobody pays for that for ever."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from gesso_core.pipelines.step_batcher import PATIENCE, Failure, StepBatcher, Ticket

STEPS = 4


@dataclass(frozen=True)
class Scale:
    """A draft that can share a step only with those that stand where it stands."""

    name: str
    kind: str = "a"
    steps: int = STEPS
    steps_done: int = 0
    cost: int = 1
    finite: bool = True

    @property
    def group(self) -> Hashable:
        return self.kind, self.steps_done

    @property
    def track(self) -> Hashable:
        return self.kind

    @property
    def done(self) -> bool:
        return self.steps_done == self.steps

    def describe_failure(self, failure: Failure) -> str:
        return failure


class Model:
    """Counts; remembers who stepped together."""

    def __init__(self) -> None:
        self.batches: list[str] = []

    def advance(self, drafts: Sequence[Scale]) -> list[Scale]:
        self.batches.append("".join(draft.name for draft in drafts))
        return [replace(draft, steps_done=draft.steps_done + 1) for draft in drafts]


def run(batcher: StepBatcher) -> None:
    while batcher.step():
        pass


def test_late_ones_catch_up_and_the_rest_of_the_way_is_shared() -> None:
    batcher, model = StepBatcher(), Model()
    batcher.add(model, Scale("x"))
    batcher.step()
    batcher.step()
    for name in "yz":
        batcher.add(model, Scale(name))
    run(batcher)
    assert model.batches == ["x", "x", "yz", "yz", "xyz", "xyz"]


def test_other_kinds_are_not_waited_for() -> None:
    batcher, model = StepBatcher(), Model()
    batcher.add(model, Scale("x"))
    batcher.step()
    batcher.add(model, Scale("y", kind="b"))
    run(batcher)
    assert sorted(model.batches) == ["x"] * 4 + ["y"] * 4
    other = Model()
    batcher.add(model, Scale("x"))
    batcher.step()
    batcher.add(other, Scale("y"))
    run(batcher)
    assert other.batches == ["y"] * 4


def test_a_stream_of_newcomers_delays_a_step_by_a_limited_number_of_turns() -> None:
    batcher, model = StepBatcher(), Model()
    first: Ticket[Scale] = batcher.add(model, Scale("x"))
    batcher.step()
    rounds = 0
    while not first.outcome.done():
        batcher.add(model, Scale("n", steps=1))
        batcher.step()
        rounds += 1
    assert rounds <= STEPS * (PATIENCE + 2)


def test_another_model_has_its_turns_while_one_waits_for_its_own() -> None:
    batcher, model, other = StepBatcher(), Model(), Model()
    batcher.add(model, Scale("x", steps=12))
    for _ in range(10):
        batcher.step()
    batcher.add(model, Scale("y", steps=12))
    batcher.add(other, Scale("o", steps=12))
    model.batches.clear()
    for _ in range(12):
        batcher.step()
    assert 5 <= len(other.batches) <= 7
