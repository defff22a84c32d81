"""The choice of a device, and one line that explains why a GPU does not compute."""

from tinyvit.gpu.device import CuPyMissing, DeviceError, get_backend, import_cupy
