"""Sana as CUDA graphs: on a GPU, one launch for a forward instead of thousands.

A host needs longer to launch the operations of a small batch than the GPU to compute them. A graph
is captured at the first forward of every shape of inputs and replayed from then on: the same
kernels on the same numbers, so the results are the same to the bit.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from gesso_core.models.sana import Sana, TextContext

# Shapes that are kept: sizes of pictures times lengths of texts times drafts in a batch.
MOST_GRAPHS: Final = 16
_WARM_UPS: Final = 2

Shapes = tuple[torch.Size | None, ...]


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph, the tensors that it reads and the one that it writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: list[Tensor]
    velocity_BCHW: Tensor

    def replay(self, inputs: list[Tensor]) -> Tensor:
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.velocity_BCHW.clone()  # another graph may write there next


class GraphedSana:
    """Called as the `Sana` that it wraps, with a `TextContext`; for one thread.

    ``most`` graphs are kept, the least recently used one goes first. They share one pool of memory,
    as large as the largest of them needs, because only one runs at a time.
    """

    def __init__(self, model: Sana, most: int = MOST_GRAPHS) -> None:
        self.model = model
        self.most = most
        self._pool: Any = None
        self._captured: dict[Shapes, _Captured] = {}  # oldest use first

    def __call__(
        self,
        latent_BCHW: Tensor,
        timestep_B: Tensor,
        text: TextContext,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """The velocity (B, C, H, W); see `Sana.forward`. Runs without gradients."""
        keys, bias = text.keys_values[0][0], text.bias
        shapes = tuple(
            None if part is None else part.shape for part in (latent_BCHW, keys, bias, guidance_B)
        )
        inputs = _flat(latent_BCHW, timestep_B, text, guidance_B)
        captured = self._captured.pop(shapes, None)
        if captured is None:
            captured = self._capture(inputs, text, guidance_B)
            # Only now: a pool whose last graph has gone cannot be captured into again.
            if len(self._captured) >= self.most:
                self._captured.pop(next(iter(self._captured)))
        self._captured[shapes] = captured
        return captured.replay(inputs)

    def __len__(self) -> int:
        """Graphs at hand."""
        return len(self._captured)

    def _capture(
        self, given: list[Tensor], text: TextContext, guidance_B: Tensor | None
    ) -> _Captured:
        inputs = [tensor.clone() for tensor in given]
        latent_BCHW, timestep_B, own_text, own_guidance_B = _unflattened(inputs, text, guidance_B)

        def forward() -> Tensor:
            velocity_BCHW: Tensor = self.model(
                latent_BCHW, timestep_B, own_text, guidance_B=own_guidance_B
            )
            return velocity_BCHW

        # What is made at a first call (tables, compiled kernels) must not be made in a capture.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on using the GPU: texts are encoded in one of their own.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            velocity_BCHW = forward()
        return _Captured(graph, inputs, velocity_BCHW)


def _flat(
    latent_BCHW: Tensor, timestep_B: Tensor, text: TextContext, guidance_B: Tensor | None
) -> list[Tensor]:
    """All tensors of a call, in the order that `_unflattened` takes them apart."""
    optional = [part for part in (text.bias, guidance_B) if part is not None]
    return [latent_BCHW, timestep_B, *(t for pair in text.keys_values for t in pair), *optional]


def _unflattened(
    flat: list[Tensor], like: TextContext, guidance_B: Tensor | None
) -> tuple[Tensor, Tensor, TextContext, Tensor | None]:
    """The inverse of `_flat`, for a text and a guidance of the same kind."""
    rest = iter(flat)
    latent_BCHW, timestep_B = next(rest), next(rest)
    keys_values = tuple((next(rest), next(rest)) for _ in like.keys_values)
    bias = None if like.bias is None else next(rest)
    own_guidance_B = None if guidance_B is None else next(rest)
    return latent_BCHW, timestep_B, TextContext(keys_values, bias), own_guidance_B
