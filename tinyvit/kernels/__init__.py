"""CUDA kernels for the operations of a training step, and the Python code that launches them.

Read an operation in `reference.py` first. Its kernel computes the same function under the same name. `launch.py`
compiles the `.cu` files and launches their kernels. `step.py` builds a training step from the launches and records it
as one CUDA graph. `README.md` describes the folder.
"""

from tinyvit.kernels.launch import PRECISIONS, Kernels, unsupported_reason
from tinyvit.kernels.step import KernelStep
