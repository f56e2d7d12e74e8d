"""LoRAs over HTTP: they reach the job as they were asked for, and wrong ones are named."""

from pathlib import Path
from typing import Any

import httpx2
import pytest
from gesso_contracts import JobStateChanged
from gesso_services.cli.main import app
from gesso_services.client import Gesso
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.broker

GENERATIONS = "/v1/images/generations"
APPLE: dict[str, Any] = {"model": "sana-tiny", "prompt": "a red apple", "seed": 7}
INK = {"name": "ink", "strength": 0.5}


def used(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """LoRAs of a provenance, without the hashes."""
    return [{name: use[name] for name in ("name", "strength")} for use in metadata["loras"]]


def test_loras_reach_every_job_and_come_back_in_the_metadata(http: httpx2.Client) -> None:
    expected = [INK, {"name": "oil", "strength": 1.0}]
    asked = APPLE | {"n": 2, "loras": [INK, {"name": "oil"}]}
    body = http.post(GENERATIONS, json=asked).json()
    assert used(body["metadata"]) == expected
    for picture in body["data"]:
        state = http.get(f"/v1/jobs/{picture['job_id']}").json()
        assert used(state["result"]["provenance"]) == expected
    assert http.post(GENERATIONS, json=APPLE).json()["metadata"]["loras"] == []


@pytest.mark.parametrize(
    ("loras", "strength"),
    [({"ink": 0.5}, 0.5), ([INK], 0.5), (["ink"], 1.0), ("ink", 1.0)],
    ids=str,
)
def test_the_client_takes_loras_by_name(gesso: Gesso, loras: Any, strength: float) -> None:
    (picture,) = gesso.generate("a red apple", seed=7, loras=loras)
    assert used(picture.metadata) == [{"name": "ink", "strength": strength}]


def test_a_job_may_name_loras_too(http: httpx2.Client, gesso: Gesso) -> None:
    request = {"model": "sana-tiny", "prompt": "x", "width": 64, "height": 64, "seed": 1}
    gesso.submit("with-ink", request | {"loras": [INK]})
    last = list(gesso.watch("with-ink"))[-1]
    assert isinstance(last, JobStateChanged)
    assert last.state.result is not None
    assert used(last.state.result["provenance"]) == [INK]


def test_the_same_key_with_other_loras_is_a_conflict(http: httpx2.Client) -> None:
    headers = {"Idempotency-Key": "one key for loras"}
    first = http.post(GENERATIONS, json=APPLE | {"loras": [INK]}, headers=headers)
    again = http.post(GENERATIONS, json=APPLE | {"loras": [INK]}, headers=headers)
    assert first.status_code == again.status_code == 200
    assert first.json()["data"][0]["job_id"] == again.json()["data"][0]["job_id"]
    other = APPLE | {"loras": [INK | {"strength": 0.6}]}
    assert http.post(GENERATIONS, json=other, headers=headers).status_code == 409


@pytest.mark.parametrize(
    ("loras", "field", "word"),
    [
        ("ink", "loras", "list"),
        (["ink"], "loras.0", "dict"),
        ([{}], "loras.0.name", "required"),
        ([{"name": "../ink"}], "loras.0.name", "pattern"),
        ([{"name": "Ink"}], "loras.0.name", "pattern"),
        ([INK, {"name": "oil", "strength": 4.5}], "loras.1.strength", "less than or equal to 4"),
        ([{"name": "oil", "strength": -5}], "loras.0.strength", "greater than or equal to -4"),
        ([{"name": "oil", "strength": "1"}], "loras.0.strength", "number"),
        ([{"name": "oil", "weight": 1}], "loras.0.weight", "not permitted"),
        ([{"name": f"l{i}"} for i in range(5)], "loras", "at most 4"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_loras_are_refused_by_field(
    http: httpx2.Client, loras: object, field: str, word: str
) -> None:
    answer = http.post(GENERATIONS, json=APPLE | {"loras": loras})
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert body["field"] == body["error"]["param"] == field
    assert word in body["detail"]


def run(*words: str, **env: str) -> Result:
    return CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"} | env)


def test_the_command_line_names_loras_with_strengths(
    server: Any, http: httpx2.Client, tmp_path: Path
) -> None:
    words = ("--lora", "ink:0.5", "--lora", "oil", "-o", str(tmp_path / "a.png"))
    result = run("generate", "a red apple", *words, GESSO_URL=server.url)
    assert result.exit_code == 0, result.output
    (last,) = http.get("/v1/jobs", params={"limit": 1}).json()["data"]
    assert used(last["result"]["provenance"]) == [INK, {"name": "oil", "strength": 1.0}]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("ink:much",), "'much' is not a number; write it like ink:0.8"),
        (("ink:9",), "less than or equal to 4"),
        (("../ink",), "match pattern"),
    ],
    ids=["strength", "too strong", "path"],
)
def test_the_command_line_refuses_in_one_sentence(
    server: Any, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    lora = [part for word in words for part in ("--lora", word)]
    output = str(tmp_path / "a.png")
    result = run("generate", "x", "-o", output, *lora, GESSO_URL=server.url)
    assert result.exit_code == 1
    assert sentence in result.stderr, result.stderr


def test_without_a_server_loras_come_from_a_folder_or_are_those_that_ship(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    (tmp_path / "ink.safetensors").write_bytes(b"")
    words = ("--local", "--model", str(tiny_pipeline), "-o", str(tmp_path / "a.png"))
    missing = run("generate", "x", *words, "--lora", "oil", "--lora-folder", str(tmp_path))
    assert missing.exit_code == 1
    assert "there is no LoRA 'oil'; available: ink" in missing.stderr
    shipped = run("generate", "x", *words, "--lora", "ink")
    assert "it was made for a model of another size" in shipped.stderr
