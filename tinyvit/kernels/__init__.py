"""Fused CUDA twins of the operations, as `.cu` text beside their launchers.

Read the operation in `ops/` first: a kernel computes the same thing and is found by its name. `launch.py` compiles
the text and calls it, `step.py` makes a training step of the calls, and one CUDA graph of the step.
"""

from tinyvit.kernels.launch import PRECISIONS, Kernels, why_not
from tinyvit.kernels.step import KernelStep

__all__ = ["PRECISIONS", "KernelStep", "Kernels", "why_not"]
