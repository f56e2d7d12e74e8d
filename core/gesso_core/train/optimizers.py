"""The optimizers of the trainings, and a step down a loss."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAX_GRADIENT_NORM = 1.0


def muon_and_adamw(
    module: nn.Module, weights: Sequence[nn.Parameter], rate: float, *, rest_decay: float = 0.01
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for ``weights``, AdamW for all other parameters.

    Args:
        module: whose parameters are trained.
        weights: some of its parameters, see `matrix_muon`: what multiplies inside of the network,
            not its tables, heads and norms.
        rate: learning rate of both.
        rest_decay: weight decay of the other parameters, per update, times the learning rate.
    """
    chosen = {id(weight) for weight in weights}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
    return (
        matrix_muon(weights, rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=rest_decay),
    )


def matrix_muon(
    weights: Sequence[nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.Muon:
    """``torch.optim.Muon``, for which a convolution is the matrix of its outputs by all else.

    On a convolutional decoder it needs a fraction of the updates that AdamW needs.

    Args:
        weights: of rank 2 or more; those of a higher rank must be contiguous and stay where they
            are, because the optimizer holds views of them.
        rate: learning rate, on the scale of AdamW's.
        weight_decay: per update, times the learning rate.
    """
    matrices = [
        weight if weight.ndim == 2 else nn.Parameter(weight.detach().view(len(weight), -1))
        for weight in weights
    ]
    viewed = [(w, m) for w, m in zip(weights, matrices, strict=True) if m is not w]

    def take_gradients(*_: Any) -> None:
        for weight, matrix in viewed:
            gradient = weight.grad
            matrix.grad = None if gradient is None else gradient.reshape(matrix.shape)

    muon = torch.optim.Muon(
        matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    muon.register_step_pre_hook(take_gradients)
    return muon


def descend(loss: Tensor, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> float:
    """One step of every optimizer down ``loss``, with the gradient's norm clipped; the loss."""
    module.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())
