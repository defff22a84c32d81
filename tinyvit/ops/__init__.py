"""The operations of the model, one per file: a forward and a backward pass, both pure functions.

    out, cache = layer_norm_forward(x, w, b)
    dx, dw, db = layer_norm_backward(dout, cache, dw=None, db=None)

`dout` is the gradient of the loss with respect to `out`. A backward pass never writes into `dout` or into its cache.
Its optional arguments, `dw` and `db` here, are arrays for the gradients of the parameters, for example views of one
flat array. All arrays are NumPy or CuPy arrays of float32 or float64, except images and labels. Every function raises
`TypeError` for another dtype and `ValueError` for a shape or a number that does not fit.

Shapes are written with B images, T tokens, width D, H heads, K = D / H, N rows or patches, and P pixels per patch
side. "..." is any number of leading axes.

`tinyvit/reference.py` has the same functions in plain form. A good order to read the files is linear, layer_norm,
gelu, softmax, attention, class_attention, patches, cross_entropy.
"""

from tinyvit.ops.attention import (
    attention_backward,
    attention_forward,
    multi_head_attention_backward,
    multi_head_attention_forward,
)
from tinyvit.ops.class_attention import class_attention_backward, class_attention_forward
from tinyvit.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from tinyvit.ops.gelu import gelu_backward, gelu_forward, gelu_tanh_forward
from tinyvit.ops.layer_norm import layer_norm_backward, layer_norm_forward
from tinyvit.ops.linear import linear_backward, linear_forward
from tinyvit.ops.patches import (
    patch_embedding_backward,
    patch_embedding_forward,
    patches_backward,
    patches_forward,
)
from tinyvit.ops.softmax import softmax_backward, softmax_forward
