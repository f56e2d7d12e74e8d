"""Strips of an image on several cores."""

import threading

import pytest
import torch
from gesso_kernels.strips import even_parts, for_each


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_item_is_worked_on_once_by_threads_that_compute_alone() -> None:
    seen: list[tuple[int, int, str]] = []
    both_at_work = threading.Barrier(2)

    def note(item: int) -> None:
        if item < 2:
            both_at_work.wait(timeout=30)
        seen.append((item, torch.get_num_threads(), threading.current_thread().name))

    for_each(note, range(9))
    assert sorted(item for item, _, _ in seen) == list(range(9))
    assert {threads for _, threads, _ in seen} == {1}
    assert len({name for _, _, name in seen}) == 2
    assert torch.get_num_threads() == 2
    new: list[int] = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [2], "threads that start later are not affected"


@pytest.mark.usefixtures("two_threads")
def test_inference_mode_reaches_the_threads() -> None:
    with torch.inference_mode():
        x = torch.zeros(4, 2)
        for_each(lambda row: row.add_(1), list(x))
    assert x.sum() == 8


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_strip_is_not_lost() -> None:
    with pytest.raises(ZeroDivisionError):
        for_each(lambda item: 1 / item, [1, 0, 2])


def test_one_thread_works_in_the_caller() -> None:
    names: list[str] = []
    for_each(lambda _: names.append(threading.current_thread().name), [0])
    assert names == [threading.current_thread().name]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("total", "most", "parts"),
    [(16, 7, [4, 4, 4, 4]), (16, 16, [8, 8]), (1, 5, [1]), (5, 4, [3, 2])],
)
def test_parts_are_even_and_occupy_every_thread(total: int, most: int, parts: list[int]) -> None:
    assert even_parts(total, most) == parts
