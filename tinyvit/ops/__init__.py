"""The mathematics: one file per operation, forward above, backward below, pure functions.

    out, cache = layer_norm_forward(x, w, b)
    dx, dw, db = layer_norm_backward(dout, cache, dw=None, db=None)

A backward pass never writes into `dout` or into its cache. Its last arguments, dw and db here, say where the
gradients of the parameters go: into new arrays by default. `tinyvit/reference.py` has the same functions in their
plain form. Read linear, layer_norm, gelu, softmax, attention, class_attention, patches and cross_entropy, in this
order.
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
