"""Tiling: exact sizes, no seams, and pieces that fit into memory."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest, NumericalError, OutOfMemory
from gesso_core.models import dc_ae_memory
from gesso_core.models.dc_ae import DCAE, DCAEConfig, Stage
from gesso_core.models.dc_ae_memory import activation_bytes_per_pixel, available_memory
from gesso_core.models.dc_ae_tiling import (
    Tiling,
    decode_safely,
    decode_tiled,
    encode_safely,
    encode_tiled,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

STAGES = (Stage(width=8, depth=1), Stage(width=16, depth=1), Stage(width=16, depth=1))
CONFIG = DCAEConfig(latent_channels=4, encoder=STAGES, decoder=STAGES)
CELL_BYTES = 16 * activation_bytes_per_pixel(STAGES)


class Linear(DCAE):
    """Averages cells and repeats them: what a tile yields does not depend on its neighbors."""

    def encode(self, x_BCHW: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x_BCHW, 4)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        return z_BCHW.repeat_interleave(4, -1).repeat_interleave(4, -2)


def model() -> DCAE:
    torch.manual_seed(0)
    return DCAE(CONFIG).eval()


def pieces(model: DCAE, name: str) -> list[tuple[int, ...]]:
    """Record the shapes that a method is called with."""
    seen: list[tuple[int, ...]] = []
    method: Callable[[Tensor], Tensor] = getattr(model, name)

    def recording(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return method(x)

    setattr(model, name, recording)
    return seen


cells = st.integers(1, 9)
tilings = st.builds(
    lambda tile, part, last: Tiling(tile=4 * tile, stride=4 * math.ceil(tile * part), last=last),
    st.integers(2, 6),
    st.floats(0.3, 1.0),
    st.sampled_from(["full", "short"]),
)


@settings(max_examples=60, deadline=None)
@given(height=cells, width=cells, tiling=tilings)
@torch.inference_mode()
def test_tiled_results_have_the_exact_size_and_position(
    height: int, width: int, tiling: Tiling
) -> None:
    exact = Linear(CONFIG)
    x = torch.randn(1, 3, 4 * height, 4 * width)
    z = exact.encode(x)
    torch.testing.assert_close(encode_tiled(exact, x, tiling), z)
    torch.testing.assert_close(decode_tiled(exact, z, tiling), exact.decode(z))


@torch.inference_mode()
def test_tall_and_wide_tiles_may_differ() -> None:
    x = torch.randn(1, 3, 40, 72)
    tiling = Tiling(tile=(16, 32), stride=(12, 24))
    assert encode_tiled(model(), x, tiling).shape == (1, 4, 10, 18)


@torch.inference_mode()
def test_overlapping_tiles_leave_no_seams() -> None:
    """Differences to the untiled picture at tile borders are no larger than without borders."""
    autoencoder, z = model(), torch.randn(1, 4, 24, 24)
    full = autoencoder.decode(z)

    def step_at_borders(tiling: Tiling) -> float:
        error = decode_tiled(autoencoder, z, tiling) - full
        jumps = (error[..., 1:] - error[..., :-1]).abs().mean(dim=(0, 1, 2))
        assert isinstance(tiling.stride, int)
        borders = torch.arange(tiling.stride, 96, tiling.stride) - 1
        return float(jumps[borders].mean())

    hard, soft = Tiling(tile=32, stride=32), Tiling(tile=48, stride=32)
    assert step_at_borders(soft) < 0.1 * step_at_borders(hard)


@torch.inference_mode()
def test_an_image_that_fits_into_one_tile_is_not_tiled() -> None:
    autoencoder, x = model(), torch.randn(1, 3, 32, 24)
    tiled = encode_tiled(autoencoder, x, Tiling(tile=32, stride=24))
    assert torch.equal(tiled, autoencoder.encode(x))


def test_tiles_that_do_not_fit_the_cells_or_leave_gaps_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 4"):
        encode_tiled(model(), torch.zeros(1, 3, 64, 64), Tiling(tile=30, stride=20))
    with pytest.raises(ConfigError, match="does not cover"):
        Tiling(tile=32, stride=48)


@pytest.mark.parametrize("encode", [encode_safely, lambda m, x: encode_tiled(m, x, TILES)])
def test_sides_that_are_no_multiple_are_refused(encode: Callable[..., Tensor]) -> None:
    with pytest.raises(InvalidRequest, match="multiples of 4"):
        encode(model(), torch.zeros(1, 3, 62, 64))


TILES = Tiling(tile=32, stride=24)


@torch.inference_mode()
def test_with_memory_enough_nothing_is_tiled() -> None:
    autoencoder, z = model(), torch.randn(2, 4, 16, 16)
    seen = pieces(autoencoder, "decode")
    assert decode_safely(autoencoder, z).shape == (2, 3, 64, 64)
    assert seen == [(2, 4, 16, 16)]


@torch.inference_mode()
def test_a_batch_is_split_before_its_pictures_are() -> None:
    autoencoder, z = model(), torch.randn(3, 4, 16, 16)
    expected = autoencoder.decode(z)
    seen = pieces(autoencoder, "decode")
    got = decode_safely(autoencoder, z, available_bytes=int(1.3 * 16 * 16 * CELL_BYTES))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert seen == [(1, 4, 16, 16)] * 3


@torch.inference_mode()
def test_a_small_budget_makes_tiles_that_fit_it() -> None:
    autoencoder, z = model(), torch.randn(2, 4, 20, 30)
    budget = int(100 * CELL_BYTES / 0.8)
    seen = pieces(autoencoder, "decode")
    got = decode_safely(autoencoder, z, available_bytes=budget)
    assert got.shape == (2, 3, 80, 120)
    assert len(seen) > 2
    assert max(height * width for *_, height, width in seen) <= 100
    assert (got - model().decode(z)).abs().mean() < 0.2 * got.std()


@torch.inference_mode()
def test_encoding_fits_its_budget_too() -> None:
    autoencoder, x = model(), torch.randn(1, 3, 80, 64)
    seen = pieces(autoencoder, "encode")
    assert encode_safely(autoencoder, x, int(100 * CELL_BYTES / 0.8)).shape == (1, 4, 20, 16)
    assert max(height * width for *_, height, width in seen) <= 16 * 100


def test_a_budget_below_the_smallest_tile_is_an_error_that_says_what_fits() -> None:
    with pytest.raises(OutOfMemory, match=r"may use 0 MiB; what would fit is 8x8 px"):
        decode_safely(model(), torch.zeros(1, 4, 32, 32), available_bytes=int(5 * CELL_BYTES / 0.8))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_latents_that_are_not_numbers_stop_at_the_door(bad: float) -> None:
    z = torch.zeros(1, 4, 4, 4)
    z[0, 1, 2, 3] = bad
    with pytest.raises(NumericalError, match="latents to decode hold NaN or infinity"):
        decode_safely(model(), z)
    with pytest.raises(NumericalError, match="images to encode"):
        encode_safely(model(), torch.full((1, 3, 16, 16), bad))


def test_running_out_of_memory_becomes_our_error() -> None:
    autoencoder = model()

    def exhausted(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("allocator says no")

    autoencoder.decode = exhausted  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match="what would fit"):
        decode_safely(autoencoder, torch.zeros(1, 4, 4, 4))


def test_an_allocation_that_the_cpu_refuses_becomes_our_error() -> None:
    autoencoder = model()
    autoencoder.decode = lambda z: z.new_empty(2**60)  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match="what would fit"):
        decode_safely(autoencoder, torch.zeros(1, 4, 4, 4))


def test_available_memory_is_the_smaller_of_machine_and_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    for name, text in {"max": "300000", "current": "200000", "stat": "inactive_file 5000"}.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert dc_ae_memory._available_in_system(meminfo) == 512_000
    assert dc_ae_memory._available_in_container(tmp_path) == 105_000
    (tmp_path / "memory.max").write_text("max\n")
    assert dc_ae_memory._available_in_container(tmp_path) is None
    assert dc_ae_memory._available_in_system(tmp_path / "absent") is None
    available = available_memory(torch.device("cpu"))
    assert available is None or available > 2**20
