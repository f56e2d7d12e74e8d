"""Where the randomness of a picture comes from: one CPU generator per sample, in a fixed order.

Draw 0 is the initial noise, draw i the noise of step i (for samplers that need it). Nothing else is
drawn. So a seed gives the same picture alone or in a batch, on any device, whatever its neighbours
do.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gesso_core.errors import InvalidRequest

MAX_SEED = 2**63 - 1


def noise_stream(seed: int, shape: Sequence[int]) -> Iterator[Tensor]:
    """All the noise of one sample, tensor by tensor: unit Gaussian, fp32, on the CPU.

    Raises:
        InvalidRequest: a seed outside 0..2^63-1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(
            f"seed is {seed!r}; it must be a whole number from 0 to {MAX_SEED}", field="seed"
        )
    return _draws(torch.Generator().manual_seed(seed), tuple(shape))


def _draws(generator: torch.Generator, shape: tuple[int, ...]) -> Iterator[Tensor]:
    while True:
        yield torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The first draw of `noise_stream`: where the sample starts."""
    return next(noise_stream(seed, shape))
