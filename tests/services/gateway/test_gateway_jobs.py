"""The job routes over real HTTP: accepted means durable, one result per id, cancel really stops."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from gesso_core.pipelines.pictures import decode_picture

pytestmark = pytest.mark.broker

REQUEST = {"model": "sana-tiny", "prompt": "a red apple", "width": 64, "height": 64, "seed": 3}
SLOW = REQUEST | {"prompt": "slowly, a snail", "steps": 60}


def put(http: httpx2.Client, job_id: str, request: dict[str, Any] = REQUEST) -> httpx2.Response:
    return http.put(f"/v1/jobs/{job_id}", json={"kind": "generate-image", "request": request})


def events(http: httpx2.Client, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        assert answer.status_code == 200
        for event in httpx2.EventSource(answer):
            yield event.event, json.loads(event.data)


def final(http: httpx2.Client, job_id: str) -> dict[str, Any]:
    *_, (name, data) = events(http, job_id)
    assert name == "state"
    state: dict[str, Any] = data["state"]
    return state


@pytest.fixture
def job_id() -> str:
    return f"test-{uuid4().hex}"


def test_a_job_is_accepted_once_and_its_picture_is_kept(http: httpx2.Client, job_id: str) -> None:
    first = put(http, job_id)
    assert first.status_code == 202
    assert first.headers["location"] == f"/v1/jobs/{job_id}"
    assert final(http, job_id)["status"] == "succeeded"
    again = put(http, job_id)
    assert again.status_code == 200
    assert again.json()["status"] == "succeeded"
    for path in (f"/v1/jobs/{job_id}/result", f"/v1/images/{job_id}/content"):
        assert decode_picture(http.get(path).content).shape == (64, 64, 3)


def test_the_same_id_with_another_request_is_a_conflict(http: httpx2.Client, job_id: str) -> None:
    put(http, job_id)
    answer = put(http, job_id, REQUEST | {"seed": 4})
    assert answer.status_code == 409
    assert answer.json()["code"] == "conflict"


def test_a_follower_sees_the_state_then_steps_then_the_end(
    http: httpx2.Client, job_id: str
) -> None:
    put(http, job_id, SLOW | {"steps": 5, "preview_every": 2})
    seen = list(events(http, job_id))
    assert seen[0][0] == "state"
    assert seen[-1][1]["state"]["status"] == "succeeded"
    assert seen[-1][1]["state"]["progress"] == 1.0
    steps = [data["step"] for name, data in seen if name == "progress"]
    assert steps == sorted(steps)
    assert any(name == "preview" for name, _ in seen)


def test_a_late_follower_gets_the_final_state_and_the_stream_ends(
    http: httpx2.Client, job_id: str
) -> None:
    put(http, job_id)
    final(http, job_id)
    ((name, data),) = events(http, job_id)
    assert (name, data["state"]["status"]) == ("state", "succeeded")


def test_cancel_stops_a_running_job_and_says_so_twice(http: httpx2.Client, job_id: str) -> None:
    put(http, job_id, SLOW)
    seen = events(http, job_id)
    while next(seen)[0] != "progress":
        pass
    asked = http.delete(f"/v1/jobs/{job_id}")
    assert asked.status_code == 202
    assert asked.json()["cancel_requested"] is True
    *_, (_, last) = seen
    assert last["state"]["status"] == "cancelled"
    assert last["state"]["step"] < 60
    assert http.delete(f"/v1/jobs/{job_id}").status_code == 200
    gone = http.get(f"/v1/jobs/{job_id}/result")
    assert gone.status_code == 409
    assert gone.json()["code"] == "cancelled"


def test_a_finished_job_cannot_be_cancelled(http: httpx2.Client, job_id: str) -> None:
    put(http, job_id)
    final(http, job_id)
    answer = http.delete(f"/v1/jobs/{job_id}")
    assert answer.status_code == 409
    assert answer.json()["code"] == "finished"


def test_a_failed_job_keeps_its_reason(http: httpx2.Client, job_id: str) -> None:
    put(http, job_id, REQUEST | {"prompt": "too large"})
    state = final(http, job_id)
    assert (state["status"], state["problem"]["code"]) == ("failed", "out_of_memory")
    assert http.get(f"/v1/jobs/{job_id}/result").status_code == 507


def test_a_result_that_is_not_there_yet_is_a_conflict(http: httpx2.Client, job_id: str) -> None:
    put(http, job_id, SLOW)
    answer = http.get(f"/v1/jobs/{job_id}/result")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_finished")
    http.delete(f"/v1/jobs/{job_id}")


def test_an_unknown_job_is_404_everywhere(http: httpx2.Client, job_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/result")):
        answer = http.request(method, f"/v1/jobs/{job_id}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_the_list_is_paged_and_filtered(http: httpx2.Client) -> None:
    ids = [f"page-{uuid4().hex}" for _ in range(5)]
    for job_id in ids:
        put(http, job_id)
        final(http, job_id)
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2, "status": "succeeded"}
    while len(seen) < 5:
        page = http.get("/v1/jobs", params=query).json()
        assert len(page["data"]) == 2
        seen += [job["id"] for job in page["data"]]
        query["cursor"] = page["next_cursor"]
    assert seen[:5] == ids[::-1]


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 1000}, {"status": "lost"}, {"cursor": "x"}, {"limit": "two"}]
)
def test_a_wrong_query_is_refused(http: httpx2.Client, query: dict[str, Any]) -> None:
    answer = http.get("/v1/jobs", params=query)
    assert answer.status_code == 422
    assert answer.json()["field"] == next(iter(query))


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "paint", "request": REQUEST},
        {"request": REQUEST | {"width": 63}},
        {"request": REQUEST | {"seed": "3"}},
        {"request": {}},
        {"kind": "generate-image"},
        {"kind": "generate-image", "request": REQUEST, "more": 1},
    ],
    ids=["kind", "width", "text seed", "empty", "no request", "unknown field"],
)
def test_a_wrong_submission_is_refused(
    http: httpx2.Client, job_id: str, body: dict[str, Any]
) -> None:
    answer = http.put(f"/v1/jobs/{job_id}", json=body)
    assert answer.status_code == 422, answer.text
    assert http.get(f"/v1/jobs/{job_id}").status_code == 404
