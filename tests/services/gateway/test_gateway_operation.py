"""What operators see: health, metrics, headers, models, and several copies of the gateway."""

from pathlib import Path
from typing import Any

import httpx2
import pytest
from gesso_services.gateway.app import create_app
from gesso_services.gateway.settings import GatewaySettings
from gesso_services.runtime.settings import BusSettings
from starlette.testclient import TestClient

APPLE = {"prompt": "a red apple", "seed": 7}


@pytest.mark.broker
def test_ready_means_that_every_required_service_has_warmed_up(http: httpx2.Client) -> None:
    answer = http.get("/health/ready")
    assert answer.status_code == 200
    body = answer.json()
    assert body["ready"] is body["broker"] is True
    assert body["services"]["diffusion"]["models"] == ["sana-tiny"]
    assert "0 of 4 slots" in body["services"]["diffusion"]["detail"]


def test_without_a_broker_it_lives_but_is_not_ready_and_says_so() -> None:
    settings = GatewaySettings()
    nowhere = BusSettings(url="nats://127.0.0.1:1", connect_timeout_s=0.2)
    with TestClient(create_app(settings, nowhere)) as http:
        assert http.get("/health/live").status_code == 200
        ready = http.get("/health/ready")
        assert (ready.status_code, ready.json()["broker"]) == (503, False)
        answer = http.post("/v1/images/generations", json=APPLE)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["type"] == "server_error"
        assert http.get("/metrics").status_code == 200


@pytest.mark.broker
def test_metrics_count_answers_by_route_and_show_the_queue(http: httpx2.Client) -> None:
    http.post("/v1/images/generations", json=APPLE)
    http.get("/v1/jobs/nobody")
    text = http.get("/metrics").text
    line = 'gesso_http_requests_total{method="POST",route="/v1/images/generations",status="200"}'
    assert line in text
    assert 'route="/v1/jobs/{job_id}",status="404"' in text
    assert 'gesso_queue_depth{service="diffusion"}' in text


@pytest.mark.broker
def test_models_come_from_the_services_that_answer(http: httpx2.Client) -> None:
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    served = ["sana-tiny", "hart-tiny", "vilau-tiny", "vila-u-7b-256"]
    served += ["from-a-folder", "dcae-tiny"]
    assert list(models) == served
    assert models["sana-tiny"]["default_size"] in models["sana-tiny"]["sizes"]
    assert http.get("/v1/models/sana-tiny").json() == models["sana-tiny"]
    assert http.get("/v1/models/sana-1.6b-1024").status_code == 404


@pytest.mark.broker
@pytest.mark.parametrize("path", ["/", "/page/page.js", "/v1/models", "/nothing"])
def test_every_answer_carries_the_security_headers(http: httpx2.Client, path: str) -> None:
    headers = http.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(headers["x-request-id"]) == 32


@pytest.mark.broker
def test_a_request_id_is_kept_when_it_is_harmless(http: httpx2.Client) -> None:
    kept = http.get("/health/live", headers={"X-Request-Id": "abc-123"}).headers["x-request-id"]
    assert kept == "abc-123"
    other = http.get("/health/live", headers={"X-Request-Id": "a b;c"}).headers["x-request-id"]
    assert other != "a b;c"


@pytest.mark.broker
def test_a_job_accepted_by_one_copy_is_known_to_another(
    http: httpx2.Client, start_gateway: Any
) -> None:
    (data,) = http.post("/v1/images/generations", json=APPLE).json()["data"]
    with httpx2.Client(base_url=start_gateway().url) as other:
        assert other.get(f"/v1/jobs/{data['job_id']}").json()["status"] == "succeeded"


@pytest.mark.broker
def test_openapi_documents_every_route_and_its_errors(http: httpx2.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/jobs/{job_id}"]) == {"put", "get", "delete"}
    documented = paths["/v1/images/generations"]["post"]["responses"]
    assert {"200", "400", "401", "404", "409", "413", "422", "429", "503", "504"} <= set(documented)
    schema = documented["422"]["content"]["application/problem+json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    assert "ErrorBody" in schemas
    assert "HTTPValidationError" not in schemas


def test_keys_are_not_printed_with_the_settings() -> None:
    settings = GatewaySettings(api_keys="secret-one,secret-two")
    assert settings.keys() == ["secret-one", "secret-two"]
    assert "secret" not in repr(settings)


def test_the_page_has_no_inline_script_or_style() -> None:
    import gesso_services.gateway.app as gateway

    page = Path(gateway.PAGE / "index.html").read_text()
    assert "<style" not in page
    assert "style=" not in page
    assert "onclick" not in page
    assert page.count("<script") == page.count('<script type="module" src=')
