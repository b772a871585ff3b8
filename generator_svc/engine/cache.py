"""What the decoder remembers of one document: cross-attention keys and values, and a tree of decoded nodes.

Hypotheses about one document share prefixes, so the self-attention cache holds a *tree* of tokens rather than a row a
hypothesis: each beam step and each scored candidate appends nodes, and a mask says which nodes a new one descends
from. Nothing is copied when beams are reordered.
"""

import torch
from torch import Tensor


class DocumentCache:
    """Keys and values of one document, each (H, tokens, E) a layer."""

    def __init__(
        self, *, layers: int, heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cross: list[Tensor] = []  # a layer: (2, H, S, E), keys and values
        self.size = 0
        self._nodes = torch.empty(layers, 2, heads, capacity, head_dim, dtype=dtype, device=device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (H, M, E) behind the nodes there are and returns all; ``size`` is moved after the last layer."""
        end = self.size + keys.shape[1]
        if end > self._nodes.shape[3]:
            grown = self._nodes.new_empty(
                *self._nodes.shape[:3], max(end, 2 * self._nodes.shape[3]), self._nodes.shape[4]
            )
            grown[:, :, :, : self.size] = self._nodes[:, :, :, : self.size]
            self._nodes = grown
        held = self._nodes[layer]
        held[0, :, self.size : end] = keys
        held[1, :, self.size : end] = values
        return held[0, :, :end], held[1, :, :end]

    def once(self) -> "OnePass":
        """The same document for a tree that is run in one pass and not kept."""
        return OnePass(self.cross)


class OnePass:
    """In place of a cache where no later pass will read: a tree of candidates that is scored, all at once."""

    def __init__(self, cross: list[Tensor]) -> None:
        self.cross = cross
        self.size = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return keys, values
