"""The matrix products of a model: ``x @ weight.T + bias``, on a CPU with oneDNN."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from generator_svc.engine import kernels

# torch multiplies float32 on the CPU with MKL, which reads a weight at a third of the memory's speed where a decode
# step brings it a few rows. oneDNN's product, which torch.compile uses, took half the time or less for 1 to 20 rows and
# 5 to 35 % less beyond, and it can apply the GELU as it writes. (Measured on two AVX-512 cores, 768 wide.)
_ONEDNN: Any = torch.ops.mkldnn._linear_pointwise if torch._C._has_mkldnn else None
ONEDNN_DTYPES = [torch.float32] if _ONEDNN is not None else []
if _ONEDNN is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    ONEDNN_DTYPES.append(torch.bfloat16)


def rounded(rows: int) -> int:
    """So many rows as a product with oneDNN gets, the last of them for nothing: up to an eighth more, at most 31.

    oneDNN makes code for every number of rows that it meets: 0.7 ms and 0.7 MB each for a matrix of BART's, and as it
    keeps 1024 of them, a gigabyte in the end. So it meets few numbers: 74 up to a thousand rows.
    """
    step = min(32, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def stacked(modules: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weight and bias of linear maps of one input as one map.

    Raises: ValueError: the modules are `emptied`.
    """
    weight, bias = ([getattr(module, name).data for module in modules] for name in ("weight", "bias"))
    if not weight[0].numel():
        raise ValueError("another engine has taken this model's weights; load the checkpoint again")
    return weight[0] if len(modules) == 1 else torch.cat(weight), torch.cat(bias)


def emptied(modules: Sequence[nn.Linear]) -> None:
    """Takes weights and biases away from modules, since they are held in another form: nothing is held twice."""
    for module in modules:
        for tensor in module.parameters():
            tensor.data = tensor.data.new_empty(0)


class Affine(NamedTuple):
    """``x @ weight.T + bias``; ``x`` is (R, in)."""

    weight: Tensor
    """(out, in), or the same in oneDNN's own order."""
    bias: Tensor
    gelu: bool = False
    """Whether the exact GELU follows."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype in ONEDNN_DTYPES:
            rows, spare = len(x), rounded(len(x)) - len(x)
            x = pad(x, (0, 0, 0, spare)) if spare else x
            product: Tensor = _ONEDNN(x, self.weight, self.bias, "gelu" if self.gelu else "none", [], "none")
            return product[:rows]
        return kernels.affine(x, self.weight, self.bias, self.gelu)

    @classmethod
    def of_modules(cls, *modules: nn.Linear, gelu: bool = False) -> Self:
        """Stacks linear maps of one input into one.

        With oneDNN the modules lose their weights: in its own order 5 rows took 0.37 to 0.57 of the time, 20 rows 0.6
        to 0.8, 1024 rows 0.9 to 0.98 (two AVX-512 cores, 768 to 4096 wide). Elsewhere they keep views.
        """
        weight, bias = stacked(modules)
        if weight.device.type == "cpu" and weight.dtype in ONEDNN_DTYPES:
            emptied(modules)
            return cls(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias, gelu)
        for module, w, b in zip(modules, weight.chunk(len(modules)), bias.chunk(len(modules)), strict=True):
            module.weight.data, module.bias.data = w, b
        return cls(weight, bias, gelu)


class OneDnnLinear(nn.Module):
    """In the place of a linear map of a model, whose weights it takes over."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._affine = Affine.of_modules(linear)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return self._affine(x.flatten(0, -2)).view(*x.shape[:-1], -1)


# Of these it is tested that they do nothing with a linear map but call it.
ENCODERS = ("bert", "camembert", "distilbert", "dpr", "electra", "mpnet", "roberta", "xlm-roberta")


def use_onednn(encoder: PreTrainedModel) -> None:
    """Lets oneDNN multiply for one of transformers' encoders, where it stands on a CPU.

    In float32 DPR's took 0.37 to 0.44 of the time for questions, half for passages (`python -m benchmarks.encoder`).
    The model loses its weights, and cannot be saved after.
    """
    known = encoder.config.model_type in ENCODERS and encoder.dtype in ONEDNN_DTYPES
    for module in list(encoder.modules()) if known and encoder.device.type == "cpu" else ():
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.bias is not None:
                setattr(module, name, OneDnnLinear(child))
