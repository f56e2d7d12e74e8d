"""Continuous batching by steps: denoising steps, scales, rows of tokens, words of an answer.

Drafts of one group share a forward of the network; they enter and leave between steps. Pictures of
a diffusion model are of one group when their latents have one shape, whatever their timestep. The
batcher only decides who goes next: the numbers of a draft live in its immutable `StepDraft`, so a
failed forward leaves every one where it was and can be tried again in halves, until the one that is
to blame stands alone.

Order: the group that was served longest ago goes first (a group that was never served counts from
its oldest arrival), and inside a group the first that came. So a lone picture of a rare size gets
one step in every round, however many of another size wait.

Where the steps of a picture differ, as the scales of a HART do, pictures that came at different
times would never meet. Those on one track are brought together: a group gives its turn to the one
furthest behind it, a limited number of times, until both are one group.
"""

import itertools
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from gesso_core.errors import Cancelled, NumericalError, OutOfMemory
from gesso_core.pipelines.memory import is_out_of_memory, release

Failure = Literal["out of memory", "not finite"]


class StepDraft(Protocol):
    """The state of one piece of work between two steps, in one immutable value."""

    @property
    def group(self) -> Hashable:
        """Drafts of one model with equal groups can share a forward."""
        ...

    @property
    def track(self) -> Hashable | None:
        """Drafts of one model on one track form one group when they have done as many steps.

        None where the group does not change from step to step.
        """
        ...

    @property
    def cost(self) -> int:
        """What it adds to a batch, in the unit of the batcher's limit (pixels)."""
        ...

    @property
    def steps_done(self) -> int:
        """Completed steps."""
        ...

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        ...

    @property
    def finite(self) -> bool:
        """Whether the last step gave finite numbers."""
        ...

    def describe_failure(self, failure: Failure) -> str:
        """What happened to this draft and what a person can do, as a message."""
        ...


D = TypeVar("D", bound=StepDraft)


class Advances(Protocol[D]):
    """What the batcher needs of a model."""

    def advance(self, drafts: Sequence[D]) -> list[D]:
        """One step of every draft, in one forward of the network.

        Some may have to wait for others, whose prompts come first; they are returned as they are.
        """
        ...


PATIENCE = 16  # turns that a group gives away, between two of its steps, to those behind it
Group = tuple[int, Hashable]  # the model, and what its drafts must have in common


@dataclass(eq=False)
class Ticket(Generic[D]):
    """A draft's place in the batcher. ``outcome`` gets the finished draft or the error."""

    id: str
    model: Advances[D]
    draft: D
    on_step: Callable[[D], None] | None
    is_withdrawn: Callable[[], bool]
    arrived: int
    served: int = -1  # its last turn; it takes this along into another group
    outcome: Future[D] = field(default_factory=Future)

    @property
    def group(self) -> Group:
        """Tickets with equal groups can share a forward."""
        return id(self.model), self.draft.group


class StepBatcher:
    """Tickets that advance together. ``add`` from any thread, ``step`` from one.

    ``max_batch_pixels`` bounds the cost of the drafts in one forward (both rows of classifier-free
    guidance count once); one that costs more than that goes alone.
    """

    def __init__(self, *, max_batch_pixels: int = 4 * 1024 * 1024) -> None:
        self.max_batch_pixels = max_batch_pixels
        self._tickets: list[Ticket[Any]] = []
        self._served: dict[Group, int] = {}
        self._fits: dict[Group, int] = {}
        self._given: dict[Group, int] = {}
        self._clock = itertools.count()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tickets)

    def add(
        self,
        model: Advances[D],
        draft: D,
        *,
        ticket_id: str = "",
        on_step: Callable[[D], None] | None = None,
        is_withdrawn: Callable[[], bool] = lambda: False,
    ) -> Ticket[D]:
        """Let a draft in; it takes part from the next step on.

        ``on_step`` gets the draft after every step that it did, in the thread of ``step``, but not
        when it waited for others or only its prompt was fed; what it raises ends this draft alone.
        ``is_withdrawn`` is asked before every step; when it says so, the draft ends with
        `Cancelled` and its place is free.
        """
        with self._lock:
            ticket = Ticket(ticket_id, model, draft, on_step, is_withdrawn, next(self._clock))
            ticket.outcome.set_running_or_notify_cancel()
            self._tickets.append(ticket)
        return ticket

    def step(self) -> int:
        """Advance one group by one step; how many drafts were in it, 0 when nobody is here."""
        self._retire_withdrawn()
        tickets = self._next_group()
        if tickets:
            turn = self._served[tickets[0].group] = next(self._clock)
            for ticket in tickets:
                ticket.served = turn
            self._advance(tickets)
        return len(tickets)

    def abandon(self, error: Exception) -> None:
        """End every draft with ``error``; for whoever runs the steps and cannot go on."""
        with self._lock:
            tickets = list(self._tickets)
        for ticket in tickets:
            self._retire(ticket, error)

    def _next_group(self) -> list[Ticket[Any]]:
        groups: dict[Group, list[Ticket[Any]]] = {}
        with self._lock:
            for ticket in self._tickets:  # in the order of arrival
                groups.setdefault(ticket.group, []).append(ticket)
        self._served = {group: turn for group, turn in self._served.items() if group in groups}
        self._fits = {group: most for group, most in self._fits.items() if group in groups}
        self._given = {group: turns for group, turns in self._given.items() if group in groups}
        if not groups:
            return []
        group = min(groups, key=lambda key: self._last_turn(key, groups[key]))
        group = self._with_those_behind(group, groups)
        most = max(1, self.max_batch_pixels // groups[group][0].draft.cost)
        return groups[group][: min(most, self._fits.get(group, most))]

    def _last_turn(self, group: Group, tickets: Sequence[Ticket[Any]]) -> int:
        """When it was served, or, if it never was, when the first of it came."""
        served = max(self._served.get(group, -1), *(ticket.served for ticket in tickets))
        return tickets[0].arrived if served < 0 else served

    def _with_those_behind(
        self, group: Group, groups: Mapping[Group, Sequence[Ticket[Any]]]
    ) -> Group:
        """The group itself, or the one furthest behind it that gets its turn."""
        first = groups[group][0].draft
        behind = {
            other: tickets[0].draft.steps_done
            for other, tickets in groups.items()
            if first.track is not None
            and other[0] == group[0]
            and tickets[0].draft.track == first.track
            and tickets[0].draft.steps_done < first.steps_done
        }
        given = self._given.get(group, 0)
        if not behind or given >= PATIENCE:
            self._given.pop(group, None)
            return group
        self._given[group] = given + 1
        self._served[group] = next(self._clock)  # a turn is a turn: others are not kept waiting
        return min(behind, key=behind.__getitem__)

    def _advance(self, tickets: Sequence[Ticket[Any]]) -> None:
        """One forward; on any failure the two halves try again, and one alone keeps its error."""
        failure: Exception | None = None
        try:
            drafts = tickets[0].model.advance([ticket.draft for ticket in tickets])
        except Exception as error:
            failure = error.with_traceback(None)  # the frames would keep the tensors alive
        if failure is None:
            for ticket, draft in zip(tickets, drafts, strict=True):
                self._settle(ticket, draft)
        elif len(tickets) == 1:
            self._retire(tickets[0], _as_user_error(failure, tickets[0].draft))
        else:
            half = len(tickets) // 2
            if is_out_of_memory(failure):
                self._fits[tickets[0].group] = half  # for as long as anyone of this group is here
                release()
            self._advance(tickets[:half])
            self._advance(tickets[half:])

    def _settle(self, ticket: Ticket[Any], draft: StepDraft) -> None:
        moved = draft.steps_done != ticket.draft.steps_done
        ticket.draft = draft
        if not draft.finite:
            self._retire(ticket, NumericalError(draft.describe_failure("not finite")))
            return
        try:
            if moved and ticket.on_step is not None:
                ticket.on_step(draft)
        except Exception as error:
            self._retire(ticket, error)
        else:
            if draft.done:
                self._retire(ticket)

    def _retire_withdrawn(self) -> None:
        with self._lock:
            withdrawn = [ticket for ticket in self._tickets if ticket.is_withdrawn()]
        for ticket in withdrawn:
            self._retire(ticket, Cancelled(ticket.id, after=ticket.draft.steps_done))

    def _retire(self, ticket: Ticket[Any], error: Exception | None = None) -> None:
        with self._lock:
            self._tickets.remove(ticket)
        if error is None:
            ticket.outcome.set_result(ticket.draft)
        else:
            ticket.outcome.set_exception(error)


def _as_user_error(error: Exception, draft: StepDraft) -> Exception:
    return (
        OutOfMemory(draft.describe_failure("out of memory")) if is_out_of_memory(error) else error
    )
