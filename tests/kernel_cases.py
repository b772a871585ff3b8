"""Triton's kernels of a decode step beside plain torch in float32 on the CPU: for Triton's interpreter, and for CUDA.

Shapes: as in :mod:`generator_svc.engine.kernels`.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from generator_svc.engine import kernels

ATTENTION = ("attend_to_nodes", "attend_to_source")
PRODUCTS = ("affine", "affine_norm")
OPTIONS: dict[str, dict[str, Any]] = {"embed": {"scale": 1.5}}
"""By kernel, what goes by name."""
# of numbers around 1, rounded once or twice; sums over the vocabulary are float32 whatever the logits are
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Rows that are no power of two, heads that are padded, a tree that is empty, one that ends with a tile and one behind.
SMALL: list[tuple[str, dict[str, int]]] = [
    ("embed", {"rows": 3, "width": 24, "apart": 1}),
    ("embed", {"rows": 2, "width": 1024, "apart": 0}),
    ("affine", {"rows": 1, "inner": 24, "outer": 40, "gelu": 0}),
    ("affine", {"rows": 17, "inner": 200, "outer": 72, "gelu": 1}),
    ("affine", {"rows": 70, "inner": 130, "outer": 2200, "gelu": 1}),
    ("affine_norm", {"rows": 3, "inner": 40, "outer": 24}),
    ("affine_norm", {"rows": 20, "inner": 800, "outer": 48}),
    ("affine_norm", {"rows": 65, "inner": 3100, "outer": 40}),
    ("add_norm", {"rows": 1, "width": 1024}),
    ("add_norm", {"rows": 5, "width": 24}),
    ("add_norm", {"rows": 3, "width": 3000}),
    ("attend_to_nodes", {"documents": 2, "rows": 1, "heads": 2, "width": 64, "problems": 1, "start": 0}),
    ("attend_to_nodes", {"documents": 4, "rows": 3, "heads": 3, "width": 12, "problems": 2, "start": 1}),
    ("attend_to_nodes", {"documents": 3, "rows": 5, "heads": 1, "width": 16, "problems": 3, "start": 64}),
    ("attend_to_nodes", {"documents": 2, "rows": 8, "heads": 1, "width": 20, "problems": 1, "start": 137}),
    ("attend_to_nodes", {"documents": 1, "rows": 17, "heads": 1, "width": 64, "problems": 1, "start": 40}),
    ("attend_to_source", {"documents": 5, "rows": 1, "heads": 2, "width": 64, "longest": 130}),
    ("attend_to_source", {"documents": 4, "rows": 3, "heads": 3, "width": 12, "longest": 300}),
    ("attend_to_source", {"documents": 5, "rows": 8, "heads": 1, "width": 16, "longest": 128}),
    ("log_normalizer", {"rows": 1, "vocabulary": 7, "behind": 0, "documents": 0}),
    ("log_normalizer", {"rows": 3, "vocabulary": 9001, "behind": 0, "documents": 3}),
    ("log_normalizer", {"rows": 4, "vocabulary": 4096, "behind": 32, "documents": 2}),
    ("log_normalizer", {"rows": 4, "vocabulary": 5001, "behind": 7, "documents": 2}),
    ("marginalize", {"questions": 1, "documents": 1, "rows": 1, "vocabulary": 33, "behind": 0}),
    ("marginalize", {"questions": 2, "documents": 5, "rows": 3, "vocabulary": 1201, "behind": 0}),
    ("marginalize", {"questions": 2, "documents": 20, "rows": 2, "vocabulary": 501, "behind": 11}),
]
# BART's, with 4 questions of 5 documents and 4 beams, as they come from a step.
REAL: list[tuple[str, dict[str, int]]] = [
    ("embed", {"rows": 80, "width": 768, "apart": 1}),
    *(
        product
        for rows in (5, 20, 160, 256)
        for width in (768, 1024)
        for product in (
            ("affine", {"rows": rows, "inner": width, "outer": 3 * width, "gelu": 0}),
            ("affine", {"rows": rows, "inner": width, "outer": width, "gelu": 0}),
            ("affine", {"rows": rows, "inner": width, "outer": 4 * width, "gelu": 1}),
            ("affine_norm", {"rows": rows, "inner": width, "outer": width}),
            ("affine_norm", {"rows": rows, "inner": 4 * width, "outer": width}),
        )
    ),
    ("affine", {"rows": 160, "inner": 768, "outer": 50304, "gelu": 0}),
    ("add_norm", {"rows": 80, "width": 768}),
    ("add_norm", {"rows": 80, "width": 1024}),
    ("attend_to_nodes", {"documents": 20, "rows": 1, "heads": 12, "width": 64, "problems": 4, "start": 0}),
    ("attend_to_nodes", {"documents": 20, "rows": 4, "heads": 12, "width": 64, "problems": 4, "start": 1}),
    ("attend_to_nodes", {"documents": 20, "rows": 4, "heads": 12, "width": 64, "problems": 20, "start": 237}),
    ("attend_to_nodes", {"documents": 20, "rows": 16, "heads": 16, "width": 64, "problems": 4, "start": 33}),
    ("attend_to_nodes", {"documents": 2, "rows": 16, "heads": 2, "width": 128, "problems": 1, "start": 65}),
    ("attend_to_source", {"documents": 20, "rows": 4, "heads": 12, "width": 64, "longest": 320}),
    ("attend_to_source", {"documents": 5, "rows": 4, "heads": 16, "width": 64, "longest": 1024}),
    ("attend_to_source", {"documents": 5, "rows": 32, "heads": 2, "width": 64, "longest": 320}),
    ("log_normalizer", {"rows": 5, "vocabulary": 50265, "behind": 0, "documents": 0}),
    ("log_normalizer", {"rows": 200, "vocabulary": 50265, "behind": 39, "documents": 40}),
    ("marginalize", {"questions": 4, "documents": 5, "rows": 4, "vocabulary": 50265, "behind": 0}),
    ("marginalize", {"questions": 4, "documents": 5, "rows": 4, "vocabulary": 50265, "behind": 39}),
    ("marginalize", {"questions": 1, "documents": 100, "rows": 4, "vocabulary": 50265, "behind": 39}),
]


def arguments(kernel: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0, **sizes: int) -> list[Any]:  # noqa: PLR0911
    """Random ones for a kernel; the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    def norm(width: int) -> tuple[Tensor, Tensor, float]:
        return normal(width), normal(width), 1e-5

    match kernel, sizes:
        case "embed", {"rows": rows, "width": width, "apart": apart}:
            tokens_R, depths_R = torch.randint(9, (2, rows, 2), generator=generator).to(device)
            words, places = normal(9, width), normal(9, width)
            depths = depths_R[:, 0] if apart else depths_R[0, :1].expand(rows)
            return [words, tokens_R[:, 0], places, depths, norm(width)]
        case "affine", {"rows": rows, "inner": inner, "outer": outer, "gelu": with_gelu}:
            return [normal(rows, inner), _matrix(normal, outer, inner), normal(outer), bool(with_gelu)]
        case "affine_norm", {"rows": rows, "inner": inner, "outer": outer}:
            weight_OI = _matrix(normal, outer, inner)
            x_RI = normal(rows, 3 * inner)[:, :inner]
            return [x_RI, weight_OI, normal(outer), normal(rows, outer), norm(outer)]
        case "add_norm", {"rows": rows, "width": width}:
            return [normal(rows, width), normal(rows, width), norm(width)]
        case "attend_to_nodes", {"documents": n, "rows": k, "heads": h, "width": e, "problems": p, "start": start}:
            capacity = start + k + 3
            visible_PKC = torch.rand(p, k + 1, capacity, generator=generator) < 0.5
            visible_PKC[:, :k, start : start + k] |= torch.eye(k, dtype=torch.bool)
            return [normal(n, k, 3, h, e), normal(2, n, h, capacity, e), visible_PKC.to(device)[:, :k], start]
        case "attend_to_source", {"documents": n, "rows": k, "heads": h, "width": e, "longest": longest}:
            lengths_N = torch.randint(1, longest + 1, (n,), generator=generator, dtype=torch.int32)
            lengths_N[: min(n, 4)] = torch.tensor([longest, 1, 0, longest - 1], dtype=torch.int32)[:n]
            return [normal(n, k, h, e), normal(2, n, h, longest, e), lengths_N.to(device)]
        case "log_normalizer", {"rows": rows, "vocabulary": v, "behind": behind, "documents": documents}:
            logits_RV = _wide(normal(rows, v + behind), v)
            return [logits_RV, torch.randn(documents, generator=generator).to(device) if documents else None]
        case "marginalize", {"questions": q, "documents": n, "rows": k, "vocabulary": v, "behind": behind}:
            normalizer_QNK = torch.randn(q, n, k, generator=generator).to(device) + 10
            return [_wide(normal(q, n, k, v + behind), v), normalizer_QNK]
    raise AssertionError(f"no arguments for {kernel} with {sizes}")


def _matrix(normal: Callable[..., Tensor], outer: int, inner: int) -> Tensor:
    """Whose products with normal numbers are normal."""
    return normal(outer, inner).mul_(inner**-0.5)


def mapped(change: Callable[[Tensor], Tensor], values: Iterable[Any]) -> Iterator[Any]:
    """With all tensors changed, those of a layer normalisation as well."""
    for value in values:
        if isinstance(value, Tensor):
            yield change(value)
        else:
            yield tuple(mapped(change, value)) if isinstance(value, tuple) else value


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    list(mapped(lambda tensor: found.append(tensor) or tensor, values))
    return found


def compiled_module(kernel: str) -> str:
    """Where Triton's kernel of this name is."""
    name = "products" if kernel in PRODUCTS else "attention" if kernel in ATTENTION else "kernels"
    return f"generator_svc.engine.triton_{name}"


def _wide(logits: Tensor, vocabulary: int) -> Tensor:
    """The first columns of a wider tensor, whose other ones must not be counted."""
    logits.mul_(5)[..., vocabulary:] = torch.nan
    return logits[..., :vocabulary]


def check(kernel: str, dtype: torch.dtype, device: str, sizes: dict[str, int]) -> None:
    """Holds Triton's kernel to the function of plain torch, in what it returns and in what it writes.

    Raises:
        AssertionError: they differ.
    """
    reference = arguments(kernel, dtype, **sizes)
    if kernel in ATTENTION:
        reference[:2] = [tensor.float() for tensor in reference[:2]]
    if kernel in PRODUCTS:
        reference = list(mapped(Tensor.float, reference))
    expected = getattr(kernels, kernel).__wrapped__(*reference, **OPTIONS.get(kernel, {}))
    on_device = arguments(kernel, dtype, device, **sizes)
    found = getattr(importlib.import_module(compiled_module(kernel)), kernel)(*on_device, **OPTIONS.get(kernel, {}))

    assert found.dtype == (torch.float32 if kernel in ("log_normalizer", "marginalize") else dtype)
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.cpu().float(), expected.float(), atol=tolerance, rtol=tolerance)
    for is_now, should_be in zip(tensors_of(on_device), tensors_of(reference), strict=True):
        assert torch.equal(is_now.cpu().float(), should_be.float()), "an argument is left different"
