"""The small HART that ships draws what it is asked for, and can go on from a picture."""

import pytest
import torch
from gesso_core.evaluate.hart import draw_hart, tokenizer_measures
from gesso_core.evaluate.prompts import held_in
from gesso_core.evaluate.references import load_references
from gesso_core.evaluate.retrieval import score
from gesso_core.hub import load_dc_ae, resolve
from gesso_core.models.dc_ae import DCAE
from gesso_core.pipelines.hart import HartPipeline
from gesso_core.pipelines.hart_load import load_hart
from gesso_core.pipelines.recipe import GenerationRequest


@pytest.fixture(scope="module")
def pipeline() -> HartPipeline:
    return load_hart("hart-tiny")


@pytest.fixture(scope="module")
def autoencoder(pipeline: HartPipeline) -> DCAE:
    return load_dc_ae(resolve(pipeline.autoencoder))


def test_a_picture_shows_what_was_asked_for(pipeline: HartPipeline, autoencoder: DCAE) -> None:
    references = load_references(resolve("sana-tiny") / "references.safetensors")
    prompts = held_in(references)[:20]
    pictures = draw_hart(pipeline, autoencoder, [prompt.text for prompt in prompts], seed=0)
    found = score(prompts, pictures, references)
    assert found.top5 >= 0.6
    assert found.background >= 0.9


def test_the_residual_makes_pictures_sharper(pipeline: HartPipeline, autoencoder: DCAE) -> None:
    values = {m.name: m.value for m in tokenizer_measures(pipeline, autoencoder)}
    assert values["tokenizer: hybrid less discrete PSNR (dB)"] > 2.0


def test_a_variation_is_closer_to_its_picture_than_another_drawing(
    pipeline: HartPipeline, autoencoder: DCAE
) -> None:
    asked = [
        f"a {thing}"
        for thing in ("dog", "house", "red apple", "bus", "cat", "pizza", "rocket", "chair")
    ]
    pictures, others = (draw_hart(pipeline, autoencoder, asked, seed=s) for s in (3, 30))
    with torch.no_grad():
        latents = autoencoder.encode(pictures)
    drafts = []
    for prompt, latent_CHW in zip(asked, latents, strict=True):
        request = GenerationRequest(prompt=prompt, width=64, height=64, seed=30, keep=3)
        drafts.append(pipeline.begin(pipeline.recipe(request), latent_CHW))
    while not drafts[0].done:
        drafts = pipeline.advance(drafts)
    with torch.no_grad():
        varied = autoencoder.decode(torch.stack([pipeline.latent(draft) for draft in drafts]))

    def distance(drawn: torch.Tensor) -> float:
        return float((drawn - pictures).square().mean())

    assert 0 < distance(varied) < distance(others)


def test_the_shipped_model_knows_its_domain(pipeline: HartPipeline) -> None:
    assert pipeline.judge("a red apple, 3D style, on a blue background").in_domain
    assert pipeline.judge("quarterly tax regulation").in_domain is False
