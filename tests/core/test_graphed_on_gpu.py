"""CUDA graphs of the network: the same pictures to the bit, whatever shapes come in which order."""

import pytest
import torch
from gesso_core.hub.store import SHIPPED_LORAS
from gesso_core.lora.library import LoraUse
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.draft import Draft
from gesso_core.pipelines.graphed import GraphedSana
from gesso_core.pipelines.load import load_denoiser
from gesso_core.pipelines.recipe import GenerationRequest
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = (
    "a cat",
    "a red apple, 3D style, on a blue background, and behind it a castle with three towers",
    "an owl",
)


@pytest.fixture(scope="module", params=["sana-tiny", "sana-tiny-int4"])
def denoisers(request: pytest.FixtureRequest) -> tuple[Denoiser, Denoiser]:
    """The same model launched by the host, and graphed."""
    launched, graphed = (
        load_denoiser(
            request.param, device="cuda", lora_folder=SHIPPED_LORAS, cuda_graphs=cuda_graphs
        )
        for cuda_graphs in (False, True)
    )
    return launched, graphed


def wish(prompt: str, seed: int = 0, size: int = 64, lora: str | None = None) -> GenerationRequest:
    loras = () if lora is None else (LoraUse(name=lora),)
    return GenerationRequest(
        prompt=prompt, width=size, height=size, seed=seed, steps=4, loras=loras
    )


def latents(denoiser: Denoiser, *requests: GenerationRequest) -> Tensor:
    drafts: list[Draft] = [denoiser.begin(denoiser.recipe(request)) for request in requests]
    while not drafts[0].done:
        drafts = denoiser.advance(drafts)
    return torch.stack([draft.state.latent for draft in drafts])


def test_every_shape_gives_the_same_bits(denoisers: tuple[Denoiser, Denoiser]) -> None:
    launched, graphed = denoisers
    crowd = [wish(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    for requests in ([crowd[0]], crowd, [crowd[1]], crowd[:2], [crowd[0]], crowd):
        assert torch.equal(latents(launched, *requests), latents(graphed, *requests))
    assert isinstance(graphed.graphed, GraphedSana)
    assert 3 <= len(graphed.graphed) <= 5


def test_the_graphs_that_are_kept_are_few(denoisers: tuple[Denoiser, Denoiser]) -> None:
    launched, graphed = denoisers
    few = GraphedSana(graphed.model, most=1)
    whole, graphed.graphed = graphed.graphed, few
    try:
        for request in (wish(PROMPTS[0]), wish(PROMPTS[1]), wish(PROMPTS[0])):
            assert torch.equal(latents(launched, request), latents(graphed, request))
            assert len(few) == 1
    finally:
        graphed.graphed = whole


def test_a_picture_with_a_lora_is_not_replayed_without_it(
    denoisers: tuple[Denoiser, Denoiser],
) -> None:
    launched, graphed = denoisers
    plain, styled = wish(PROMPTS[0]), wish(PROMPTS[0], lora="ink")
    without = latents(graphed, plain)
    with_it = latents(graphed, styled)
    assert torch.equal(with_it, latents(launched, styled))
    assert not torch.equal(with_it, without)
    assert torch.equal(latents(graphed, plain), without)
