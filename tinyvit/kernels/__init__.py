"""Fused CUDA twins of the operations, as `.cu` text beside their launchers.

Read the operation in `reference.py` first: a kernel computes the same function and has its name. `launch.py` compiles
the text and launches it. `step.py` makes a training step of the launches, and one CUDA graph of the step.
"""

from tinyvit.kernels.launch import PRECISIONS, Kernels, unsupported_reason
from tinyvit.kernels.step import KernelStep
