"""Matrix products in int8 on CPUs that have instructions for them (VNNI, AMX).

A weight is rounded once, on a scale for each of its rows; what it multiplies is rounded on its way, on a scale for each
row too, so that a row's product is the same whatever stands beside it. Sums of integers are exact. What is no product
(attention, normalisation, embeddings) stays in the dtype of the states.

Shapes: R rows, I in, O out.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from generator_svc.engine.affine import emptied, rounded, stacked

ZERO = 128
"""What stands for 0: the instructions multiply unsigned by signed numbers."""
LARGEST = 126.5
"""What the largest number of a row becomes. Its scale is then rounded to the states' dtype, and nothing passes 127."""

TOGETHER = 2**20
"""Numbers that are rounded at a time, so that the numbers in between take one small piece of memory in turns."""

_ONEDNN: Any = torch.ops.onednn
_CPU = torch.cpu.get_capabilities()


def supported() -> bool:
    """Whether this CPU adds up products of int8 in one instruction. Without it they would cost time, or overflow."""
    return any(_CPU.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def states_dtype() -> torch.dtype:
    """bfloat16 where the CPU has instructions for it."""
    return torch.bfloat16 if any(_CPU.get(name) for name in ("avx512_bf16", "amx_bf16")) else torch.float32


def quantized(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as uint8 around `ZERO`, (R, I), and the scale of each, (R, 1) in the dtype of ``x_RI``."""
    rows, width = x_RI.shape
    together = max(1, min(rows, TOGETHER // width))
    integers_RI, scale_R1 = torch.empty_like(x_RI, dtype=torch.uint8), x_RI.new_empty(rows, 1)
    wide, other = torch.empty(2, together, width).unbind()
    for start in range(0, rows, together):
        part = slice(start, min(rows, start + together))
        x, absolute = wide[: part.stop - start].copy_(x_RI[part]), other[: part.stop - start]
        scale_R1[part] = torch.abs(x, out=absolute).amax(1, keepdim=True) / LARGEST
        x.div_(scale_R1[part].float().clamp_min_(torch.finfo(torch.float32).tiny)).add_(ZERO + 0.5)
        integers_RI[part] = absolute.view(torch.int32).copy_(x)  # torch has no fast way from float32 to uint8
    return integers_RI, scale_R1


def quantized_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Its rows as int8, (O, I), and the scale of each, (O,) float32."""
    scale_O = weight_OI.abs().amax(1).float().clamp_min_(torch.finfo(torch.float32).tiny) / 127
    return (weight_OI / scale_O[:, None]).round_().to(torch.int8), scale_O


class Int8Affine:
    """``x @ weight.T + bias``, and the exact GELU of it where ``gelu`` says so; ``x`` is (R, I).

    Args:
        weight, bias: (O, I) and (O,), in the states' dtype.
        out: dtype of what comes out.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, out: torch.dtype, gelu: bool = False) -> None:
        integers_OI, self._scale_O = quantized_weight(weight)
        self._weight: Tensor = _ONEDNN.qlinear_prepack(integers_OI, None)
        self._zeros_O = torch.zeros(len(weight), dtype=torch.int32)
        self._bias_O, self._out, self._gelu = bias.to(out), out, gelu

    def __call__(self, x_RI: Tensor) -> Tensor:
        rows, spare = len(x_RI), rounded(len(x_RI)) - len(x_RI)
        x_RI = pad(x_RI, (0, 0, 0, spare)) if spare else x_RI
        integers_RI, scale_R1 = quantized(x_RI)
        product_RO: Tensor = _ONEDNN.qlinear_pointwise(
            integers_RI, 1.0, ZERO, self._weight, self._scale_O, self._zeros_O, None,
            1.0, 0, self._out, "none", [], "",
        )  # fmt: skip
        product_RO = torch.addcmul(self._bias_O, product_RO, scale_R1.to(self._out))[:rows]
        return gelu(product_RO) if self._gelu else product_RO

    @classmethod
    def of_modules(cls, *modules: nn.Linear, out: torch.dtype, gelu: bool = False) -> Self:
        """Stacks linear maps of one input into one; the modules lose their weights."""
        weight, bias = stacked(modules)
        emptied(modules)
        return cls(weight, bias, out=out, gelu=gelu)
