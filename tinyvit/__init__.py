"""A Vision Transformer from scratch: every forward and backward pass written by hand, on NumPy or CuPy."""

from tinyvit.checkpoint import load_model, save_model
from tinyvit.data import load_mnist
from tinyvit.gradcheck import directional_error, gradient_error
from tinyvit.model import VisionTransformer, ViTConfig, initialise, loss_and_gradient, vit_backward, vit_forward
from tinyvit.pretrained import load_pretrained

__all__ = [
    "ViTConfig",
    "VisionTransformer",
    "directional_error",
    "gradient_error",
    "initialise",
    "load_mnist",
    "load_model",
    "load_pretrained",
    "loss_and_gradient",
    "save_model",
    "vit_backward",
    "vit_forward",
]
