"""From visual features to embeddings of the language model (VILA-U, arXiv 2409.04429).

Kinds as published checkpoints name them: ``identity``, ``linear``, and ``mlp<n>x_gelu``, which is n
linear layers with exact GELU between them; published models use ``mlp2x_gelu``.
"""

import re

from torch import Tensor, nn

from gesso_core.errors import ConfigError

_MLP = re.compile(r"mlp([1-9])x_gelu")


class Projector(nn.Module):
    """Visual features (..., C) to embeddings (..., E)."""

    def __init__(self, kind: str, feature_width: int, embedding_width: int) -> None:
        """An untrained projector.

        Args:
            kind: ``identity``, ``linear`` or ``mlp<n>x_gelu``.
            feature_width: C, of the vision tower.
            embedding_width: E, of the language model.

        Raises:
            ConfigError: an unknown kind, or an identity between different widths.
        """
        super().__init__()
        self.kind, self.feature_width, self.embedding_width = kind, feature_width, embedding_width
        self.layers = _layers(kind, feature_width, embedding_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project; leading axes are kept."""
        projected: Tensor = self.layers(features)
        return projected


def _layers(kind: str, feature_width: int, embedding_width: int) -> nn.Module:
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(feature_width, embedding_width)
    found = _MLP.fullmatch(kind)
    if found is None:
        raise ConfigError(
            f"projector kind {kind[:80]!r}; known are identity, linear and mlp<n>x_gelu with n "
            "from 1 to 9",
            field="mm_projector_type",
        )
    layers: list[nn.Module] = [nn.Linear(feature_width, embedding_width)]
    for _ in range(int(found[1]) - 1):
        layers += [nn.GELU(), nn.Linear(embedding_width, embedding_width)]
    return nn.Sequential(*layers)
