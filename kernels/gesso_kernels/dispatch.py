"""When a public function calls its registered op instead of plain torch."""

import torch
from torch import Tensor


def calls_op(*tensors: Tensor | None) -> bool:
    """True on CUDA and while torch traces; not for gradients or fp64, which the ops do not have.

    On a CPU the body of every op is its reference; calling that directly saves the dispatch.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not (given[0].is_cuda or torch.compiler.is_compiling()):
        return False
    if given[0].dtype == torch.float64:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
