"""Muon for weights of any rank, each seen as a matrix of outputs by everything else."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def matrix_muon(
    weights: Sequence[nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.Muon:
    """``torch.optim.Muon`` on matrices that are views of the weights, convolutions among them.

    On a convolutional decoder it needs a fraction of the updates that AdamW needs.

    Args:
        weights: of rank 2 or more; contiguous, and they must stay where they are.
        rate: learning rate, on the scale of AdamW's.
        weight_decay: per update, times the learning rate.
    """
    matrices = [nn.Parameter(weight.detach().view(len(weight), -1)) for weight in weights]

    def take_gradients(*_: Any) -> None:
        for weight, matrix in zip(weights, matrices, strict=True):
            gradient = weight.grad
            matrix.grad = None if gradient is None else gradient.reshape(matrix.shape)

    muon = torch.optim.Muon(
        matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    muon.register_step_pre_hook(take_gradients)
    return muon
