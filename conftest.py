"""What must stand before any module of ours is imported by a test."""

import os

import torch

# Triton decides when a kernel is defined: without a GPU, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
