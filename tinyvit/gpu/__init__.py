"""Choosing a device, and explaining in one line why a GPU does not compute."""

from tinyvit.gpu.device import CuPyMissing, DeviceError, get_backend, import_cupy
