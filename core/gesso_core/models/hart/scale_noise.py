"""Where the randomness of HART comes from, sample by sample and scale by scale.

Sample and scale have a CPU generator of their own, whose seed comes from the sample's seed; so a
scale that is drawn again, or drawn after others that were kept, gets the same numbers. From it are
drawn, in this order: the order of the tokens (last scale, when it is drawn in several rounds), then
per round one uniform number per token, Gumbel noise where codes are smoothed, the start of the
residual, and the noise of each of its steps but the last.
"""

from typing import Protocol

import torch
from torch import Generator, Tensor

from gesso_core.sampling.categorical import gumbel_noise

# N tokens of a scale   K tokens of a round   C latent channels   V vocabulary

SEEDS = 2**63 - 1


class ScaleNoise(Protocol):
    """Where the randomness of one sample at one scale comes from; asked in the order above."""

    def order(self, tokens: int) -> Tensor:
        """A permutation (N,)."""
        ...

    def uniform(self, tokens: int) -> Tensor:
        """(K,) numbers in [0, 1)."""
        ...

    def gumbel(self, tokens: int, vocabulary: int) -> Tensor:
        """(K, V) standard Gumbel numbers."""
        ...

    def normal(self, tokens: int, channels: int) -> Tensor:
        """(K, C) unit Gaussian numbers: the start of the residual, then one set per step."""
        ...


class SeededNoise:
    """The noise of a seed at a scale."""

    def __init__(self, seed: int, scale: int) -> None:
        seeds = torch.randint(SEEDS, (scale + 1,), generator=Generator().manual_seed(seed))
        self._generator = Generator().manual_seed(int(seeds[scale]))

    def order(self, tokens: int) -> Tensor:
        """A permutation (N,)."""
        return torch.randperm(tokens, generator=self._generator)

    def uniform(self, tokens: int) -> Tensor:
        """(K,) numbers in [0, 1)."""
        return torch.rand(tokens, generator=self._generator, dtype=torch.float64)

    def gumbel(self, tokens: int, vocabulary: int) -> Tensor:
        """(K, V) standard Gumbel numbers."""
        return gumbel_noise(torch.rand((tokens, vocabulary), generator=self._generator))

    def normal(self, tokens: int, channels: int) -> Tensor:
        """(K, C) unit Gaussian numbers."""
        return torch.randn((tokens, channels), generator=self._generator)
