"""What breaks while people wait: workers, broker, gateway. No job may be lost or doubled."""

import concurrent.futures
import io
import time
import uuid
from collections.abc import Callable

import pytest
from gesso_contracts import JobState
from gesso_services.client import ApiError, Gesso, NotReachable
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

PROMPT = "a red apple, 3D style, on a blue background"
MODEL = "sana-tiny"


def request(**changes: object) -> dict[str, object]:
    picture = {"model": MODEL, "prompt": PROMPT, "width": 64, "height": 64, "seed": 7}
    return picture | changes


def new_id() -> str:
    return f"e2e-{uuid.uuid4().hex[:12]}"


def patiently(call: Callable[[], JobState], timeout: float = 60.0) -> JobState:
    """The answer of ``call``, asked again while the gateway is away."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return call()
        except (NotReachable, ApiError) as error:
            refused = isinstance(error, ApiError) and error.status < 500
            if refused or time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def final(gesso: Gesso, job_id: str, timeout: float = 120.0) -> JobState:
    deadline = time.monotonic() + timeout
    while True:
        state = patiently(lambda: gesso.job(job_id))
        if state.is_final:
            return state
        if time.monotonic() > deadline:
            pytest.fail(f"job {job_id} is still {state.status} after {timeout:.0f} s")
        time.sleep(0.2)


def running(gesso: Gesso, job_id: str, step: int = 1) -> None:
    """Follow the events until the job has done ``step`` steps."""
    for event in gesso.watch(job_id):
        if event.event == "progress" and event.step >= step:
            return
    pytest.fail(f"job {job_id} ended before step {step}")


@pytest.fixture
def reference(stack) -> bytes:
    """The picture that the request must always give."""
    with stack.client() as gesso:
        job_id = new_id()
        gesso.submit(job_id, request(steps=60))
        assert final(gesso, job_id).status == "succeeded"
        return gesso.result(job_id)


def assert_same_picture(one: bytes, other: bytes) -> None:
    a, b = (Image.open(io.BytesIO(data)).convert("RGB") for data in (one, other))
    difference = max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))
    assert difference <= 1


def test_a_prompt_becomes_a_picture(stack) -> None:
    with stack.client() as gesso:
        steps: list[int] = []
        (picture,) = gesso.generate(
            PROMPT, seed=1, partial_images=2, on_progress=lambda p: steps.append(p.step)
        )
    assert Image.open(io.BytesIO(picture.data)).size == (64, 64)
    assert steps == sorted(steps)
    assert steps


def test_a_killed_replica_loses_no_job(stack, reference, wait_until) -> None:
    with stack.client() as gesso:
        job_id = new_id()
        gesso.submit(job_id, request(steps=60))
        running(gesso, job_id)
        for replica in stack.replicas("diffusion"):
            replica.kill()
        state = final(gesso, job_id)
        assert state.status == "succeeded"
        assert state.attempt == 2
        assert_same_picture(gesso.result(job_id), reference)


def test_a_killed_broker_loses_no_job(stack, reference, wait_until) -> None:
    with stack.client() as gesso:
        ids = [new_id() for _ in range(4)]
        for job_id in ids:
            gesso.submit(job_id, request(steps=60))
        running(gesso, ids[0])
        stack.broker().kill()
        states = [final(gesso, job_id) for job_id in ids]
        assert [state.status for state in states] == ["succeeded"] * 4
        assert_same_picture(gesso.result(ids[-1]), reference)


def test_a_killed_gateway_loses_no_job(stack, reference) -> None:
    with stack.client() as gesso:
        job_id = new_id()
        gesso.submit(job_id, request(steps=60))
        running(gesso, job_id)
        stack.gateway().kill()
        assert final(gesso, job_id).status == "succeeded"
        # A new connection to the new gateway sees the same job and the same bytes.
        assert_same_picture(gesso.result(job_id), reference)


def test_a_killed_autoencoder_does_not_fail_the_picture(stack, reference) -> None:
    with stack.client() as gesso:
        job_id = new_id()
        gesso.submit(job_id, request(steps=60))
        running(gesso, job_id)
        for replica in stack.replicas("autoencoder"):
            replica.kill()
        assert final(gesso, job_id).status == "succeeded"
        assert_same_picture(gesso.result(job_id), reference)


def test_the_same_id_twice_is_one_job(stack) -> None:
    with stack.client() as gesso:
        job_id = new_id()
        first = gesso.submit(job_id, request(steps=4))
        second = gesso.submit(job_id, request(steps=4))
        assert first.created_at == second.created_at
        assert final(gesso, job_id).attempt == 1
        with pytest.raises(ApiError) as refused:
            gesso.submit(job_id, request(steps=5))
        assert refused.value.status == 409


def test_a_running_job_is_cancelled_within_a_step_and_its_slot_is_free(stack) -> None:
    with stack.client() as gesso:
        job_id, next_id = new_id(), new_id()
        gesso.submit(job_id, request(steps=100))
        running(gesso, job_id, step=2)
        gesso.cancel(job_id)
        state = final(gesso, job_id, timeout=10)
        assert state.status == "cancelled"
        assert state.step < 100
        gesso.submit(next_id, request(steps=2))
        assert final(gesso, next_id, timeout=20).status == "succeeded"


def test_a_queued_job_is_cancelled_before_it_starts(stack) -> None:
    with stack.client() as gesso:
        ids = [new_id() for _ in range(40)]
        for job_id in ids:
            gesso.submit(job_id, request(steps=60))
        gesso.cancel(ids[-1])
        last = final(gesso, ids[-1], timeout=30)
        assert (last.status, last.attempt) == ("cancelled", 0)
        for job_id in ids[:-1]:
            gesso.cancel(job_id)
        assert all(final(gesso, job_id).is_final for job_id in ids)


def test_two_hundred_requests_of_mixed_sizes_are_all_answered(stack) -> None:
    sizes = [(64, 64), (48, 80), (80, 48), (96, 96), (56, 72)]
    ids = [new_id() for _ in range(200)]

    def ask(number: int) -> None:
        width, height = sizes[number % len(sizes)]
        with stack.client() as gesso:
            gesso.submit(ids[number], request(steps=4, width=width, height=height, seed=number))

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        list(pool.map(ask, range(200)))
    with stack.client() as gesso:
        states = [final(gesso, job_id, timeout=180) for job_id in ids]
        assert [state.status for state in states] == ["succeeded"] * 200
        for number in (0, 1, 4):
            picture = Image.open(io.BytesIO(gesso.result(ids[number])))
            assert picture.size == sizes[number % len(sizes)]


def test_alone_and_in_company_a_seed_gives_the_same_picture(stack) -> None:
    with stack.client() as gesso:
        alone, crowd = new_id(), [new_id() for _ in range(6)]
        gesso.submit(alone, request(seed=11))
        assert final(gesso, alone).status == "succeeded"
        for number, job_id in enumerate(crowd):
            gesso.submit(job_id, request(seed=8 + number))
        assert all(final(gesso, job_id).status == "succeeded" for job_id in crowd)
        assert_same_picture(gesso.result(alone), gesso.result(crowd[3]))
