"""LoRAs by request through real services: strengths, changing files, pictures that do not mix."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gesso_contracts import messages as m
from gesso_contracts.jobs import JobState
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.draft import Draft
from gesso_core.pipelines.pictures import Pixels, decode_picture
from gesso_services import autoencoder, diffusion
from gesso_services.runtime.blobs import BlobStore
from gesso_services.runtime.connection import Bus
from gesso_services.runtime.job_events import wait_for
from gesso_services.runtime.jobs import JobStore
from gesso_services.runtime.nats_server import NatsServer
from gesso_services.runtime.service import ServiceHost
from gesso_services.runtime.settings import JobSettings
from safetensors.torch import save_file

pytestmark = [pytest.mark.anyio, pytest.mark.broker]

LAYERS = {  # of the tiny pipeline: (outputs, inputs)
    "transformer_blocks.0.attn1.to_v": (64, 64),
    "transformer_blocks.1.attn2.to_k": (64, 64),
    "transformer_blocks.1.ff.conv_inverted": (320, 64),
}


def write_lora(path: Path, seed: int, outputs: int = 64) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer, (rows, columns) in (LAYERS | {"proj_out": (outputs // 8, 64)}).items():
        down, up = (torch.randn(s, generator=generator) for s in ((4, columns), (rows, 4)))
        factors[f"{layer}.lora_A.weight"], factors[f"{layer}.lora_B.weight"] = down / 8, up
    partial = path.with_suffix(".partial")
    save_file(factors, partial)
    partial.replace(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    for seed, name in enumerate(("ink", "oil")):
        write_lora(folder / f"{name}.safetensors", seed)
    return folder


@pytest.fixture
async def services(
    broker: NatsServer, job_settings: JobSettings, tiny_pipeline: Path, folder: Path
) -> AsyncIterator[None]:
    """The autoencoder and one diffusion replica with a folder of LoRAs."""
    served: dict[str, Any] = {"models": (), "folders": {"tiny": tiny_pipeline}}
    specs = (
        autoencoder.build_service(
            autoencoder.AutoencoderSettings.for_service("autoencoder", **served)
        ),
        diffusion.build_service(
            diffusion.DiffusionSettings.for_service("diffusion", lora_folder=folder, **served)
        ),
    )
    async with AsyncExitStack() as running:
        for spec in specs:
            host = ServiceHost(spec, bus_settings=broker.bus_settings(), job_settings=job_settings)
            running.push_async_callback(host.stop, 0.2)
            await host.start()
        yield


def wish(*loras: tuple[str, float], **changes: object) -> m.GenerateImage:
    plain = {"model": "tiny", "prompt": "a red apple", "width": 64, "height": 64, "seed": 7}
    uses = [m.LoraUse(name=name, strength=strength) for name, strength in loras]
    return m.GenerateImage.model_validate(plain | {"steps": 4, "loras": uses} | changes)


async def finished(store: JobStore, request: m.GenerateImage) -> JobState:
    state, _ = await store.submit("diffusion", "generate-image", request)
    return await wait_for(store, state.id, 30)


async def painted(
    store: JobStore, bus: Bus, request: m.GenerateImage
) -> tuple[Pixels, list[m.LoraUsed]]:
    state = await finished(store, request)
    assert state.status == "succeeded", state.problem
    ready = m.ImageReady.model_validate(state.result)
    return decode_picture(await BlobStore(bus).get(ready.image)), ready.provenance.loras


def far(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


async def test_a_request_chooses_the_lora_and_its_strength(
    services: None, store: JobStore, gateway: Bus, folder: Path
) -> None:
    wishes = [wish(), wish(("ink", 1.0)), wish(("ink", 0.5)), wish(("oil", 1.0))]
    made = [await painted(store, gateway, one) for one in wishes]
    for index, (one, _) in enumerate(made):
        for other, _ in made[index + 1 :]:
            assert far(one, other) > 2
    again, used = await painted(store, gateway, wish(("ink", 0.5)))
    assert np.array_equal(again, made[2][0])
    digest = sha256((folder / "ink.safetensors").read_bytes()).hexdigest()
    assert used == [m.LoraUsed(name="ink", strength=0.5, sha256=digest)]
    assert made[0][1] == []


async def test_pictures_in_flight_with_different_loras_are_what_they_are_alone(
    services: None, store: JobStore, gateway: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = [
        wish(("ink", 1.0), steps=30),
        wish(("oil", 1.0), steps=30),
        wish(steps=30),
        wish(("ink", 1.0), steps=30, seed=8),
        wish(("ink", 0.5), ("oil", -0.5), steps=30),
    ]
    alone = [(await painted(store, gateway, one))[0] for one in wishes]
    served: list[object] = []
    advance = Denoiser.advance

    def watched(denoiser: Denoiser, drafts: Sequence[Draft]) -> list[Draft]:
        (group,) = {draft.group for draft in drafts}
        served.append(group)
        return advance(denoiser, drafts)

    monkeypatch.setattr(Denoiser, "advance", watched)
    together = await asyncio.gather(*(painted(store, gateway, one) for one in wishes))
    for expected, (pixels, _) in zip(alone, together, strict=True):
        assert far(pixels, expected) <= 1
    assert len(set(served)) == 4
    changes = sum(one != other for one, other in pairwise(served))
    assert changes > 20  # they took turns


async def test_a_file_that_is_replaced_counts_from_the_next_request_on(
    services: None, store: JobStore, gateway: Bus, folder: Path
) -> None:
    before, (old,) = await painted(store, gateway, wish(("ink", 1.0)))
    write_lora(folder / "ink.safetensors", 5)
    after, (new,) = await painted(store, gateway, wish(("ink", 1.0)))
    assert far(before, after) > 2
    assert old.sha256 != new.sha256
    write_lora(folder / "fresh.safetensors", 0)
    fresh, _ = await painted(store, gateway, wish(("fresh", 1.0)))
    assert np.array_equal(fresh, before)


async def test_what_cannot_be_used_fails_with_the_field_and_harms_nobody(
    services: None, store: JobStore, gateway: Bus, folder: Path
) -> None:
    write_lora(folder / "wide.safetensors", 0, outputs=256)
    (folder / "cut.safetensors").write_bytes((folder / "ink.safetensors").read_bytes()[:-5])
    cases = {
        ("pastel",): ("invalid_request", "available: cut, ink, oil, wide"),
        ("ink", "ink"): ("invalid_request", "each once"),
        ("wide",): ("invalid_weights", "'proj_out.lora_A.weight'"),
        ("cut",): ("invalid_weights", "not a complete safetensors file"),
    }
    for names, (code, words) in cases.items():
        state = await finished(store, wish(*((name, 1.0) for name in names)))
        assert state.status == "failed"
        assert state.problem is not None
        assert (state.problem.code, state.problem.field) == (code, "loras")
        assert words in state.problem.detail
        assert str(folder) not in state.problem.detail
    await painted(store, gateway, wish(("ink", 1.0)))
