"""The diffusion service grows with its backlog, shares its queue, and shrinks again."""

import uuid

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_policy_scales_one_service_from_one_to_two_and_back(stack, wait_until) -> None:
    wait_until(lambda: len(stack.replicas("diffusion")) == 1, 120, "one replica at rest")
    others = len(stack.replicas("autoencoder"))
    request = {
        "model": "sana-tiny",
        "prompt": "a green leaf, flat style",
        "width": 64,
        "height": 64,
        "steps": 60,
    }
    ids = [f"scale-{uuid.uuid4().hex[:12]}" for _ in range(120)]
    with stack.client() as gesso:
        for number, job_id in enumerate(ids):
            gesso.submit(job_id, request | {"seed": number})
        wait_until(lambda: len(stack.replicas("diffusion")) == 2, 90, "a second replica")
        assert len(stack.replicas("autoencoder")) == others, "only the busy service grows"

        def all_done() -> bool:
            return all(gesso.job(job_id).is_final for job_id in ids)

        wait_until(all_done, 180, "every job done")
        assert {gesso.job(job_id).status for job_id in ids} == {"succeeded"}
    wait_until(lambda: len(stack.replicas("diffusion")) == 1, 120, "back to one replica")
