"""The parts of BART's layers, with weights of transformers' modules: normalisation, feed-forward, cross-attention.

Linear maps of one input (a layer's queries, keys and values) are one product.

Shapes: R packed rows, D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers.activations import GELUActivation

from generator_svc.engine import kernels
from generator_svc.engine.affine import Affine
from generator_svc.engine.int8 import Int8Affine

Product = Affine | Int8Affine
Products = Callable[..., Product]
"""Makes one product of the linear maps of one input."""


class Norm(NamedTuple):
    """A layer normalisation."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> Self:
        """With the module's weights."""
        return cls(module.weight.data, module.bias.data, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """(R, D) to (R, D)."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def after(self, affine: Product, x: Tensor, residual: Tensor) -> Tensor:
        """Of ``affine(x) + residual``, where no GELU comes between."""
        if isinstance(affine, Affine) and x.is_cuda:
            return kernels.affine_norm(x, affine.weight, affine.bias, residual, self)
        return self(affine(x).add_(residual))


class Block(NamedTuple):
    """What encoder and decoder layers have in common: self-attention and the feed-forward network."""

    qkv: Product
    out: Product
    norm: Norm
    fc1: Product
    activation: Callable[[Tensor], Tensor] | None  # None: fc1's own GELU
    fc2: Product
    final_norm: Norm

    @classmethod
    def of(cls, layer: Any, product: Products) -> Self:
        """Of an encoder or a decoder layer."""
        attention = layer.self_attn
        has_gelu = type(layer.activation_fn) is GELUActivation
        return cls(
            qkv=product(attention.q_proj, attention.k_proj, attention.v_proj),
            out=product(attention.out_proj),
            norm=Norm.of(layer.self_attn_layer_norm),
            fc1=product(layer.fc1, gelu=has_gelu),
            activation=None if has_gelu else layer.activation_fn,
            fc2=product(layer.fc2),
            final_norm=Norm.of(layer.final_layer_norm),
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        """(R, D) to (R, D), normalised."""
        inner = self.fc1(x)
        inner = inner if self.activation is None else self.activation(inner)
        return self.final_norm.after(self.fc2, inner, x)


class CrossAttention(NamedTuple):
    """A decoder layer's attention to a document."""

    q: Product
    kv: Product
    out: Product
    norm: Norm

    @classmethod
    def of(cls, layer: Any, product: Products) -> Self:
        """Of a decoder layer."""
        attention = layer.encoder_attn
        return cls(
            q=product(attention.q_proj),
            kv=product(attention.k_proj, attention.v_proj),
            out=product(attention.out_proj),
            norm=Norm.of(layer.encoder_attn_layer_norm),
        )
