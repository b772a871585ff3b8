"""Candidates as a prefix trie, on the host, so that the decoder runs every distinct prefix once.

Shapes: M nodes, C candidates, X edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor


def pieces(candidates: Sequence[tuple[int, ...]], nodes: int) -> list[list[tuple[int, ...]]]:
    """Candidates whose tries have so many nodes at most, or one candidate; those that begin alike go together."""
    found: list[list[tuple[int, ...]]] = []
    taken = nodes
    before: tuple[int, ...] = ()
    for candidate in sorted(candidates):  # a candidate's neighbour shares most with it; its last token is no node
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(before[:-1], candidate[:-1], strict=False))
        taken += len(candidate[:-1]) - sum(1 for _ in shared)
        if taken > nodes or not found:
            found.append([])
            taken = len(candidate[:-1])
        found[-1].append(candidate)
        before = candidate
    return found


@dataclass(frozen=True)
class Trie:
    """The root is the decoder start token; the last token of a candidate is an edge, never a node."""

    tokens: Tensor  # (M,) int64
    depths: Tensor  # (M,) int64
    visible: Tensor  # (M, M) bool: node and its ancestors
    edge_nodes: Tensor  # (X,) int64: the node each edge leaves
    edge_tokens: Tensor  # (X,) int64: the token it predicts
    paths: list[list[int]]  # the edges of each candidate, in order

    @classmethod
    def of(cls, candidates: Sequence[Sequence[int]]) -> "Trie":
        """``candidates``: token ids, decoder start token first, no padding, at least two tokens each."""
        tokens, depths, parents = [candidates[0][0]], [0], [-1]
        nodes: dict[tuple[int, int], int] = {}  # (parent node, token) -> node
        edges: dict[tuple[int, int], int] = {}  # (node, next token) -> edge
        paths = []
        for candidate in candidates:
            node, path = 0, []
            for position, token in enumerate(candidate[1:], start=1):
                path.append(edges.setdefault((node, token), len(edges)))
                if position == len(candidate) - 1:
                    break
                if (node, token) not in nodes:
                    nodes[node, token] = len(tokens)
                    tokens.append(token)
                    depths.append(position)
                    parents.append(node)
                node = nodes[node, token]
            paths.append(path)
        visible = np.eye(len(tokens), dtype=np.bool_)
        for node, parent in enumerate(parents[1:], start=1):
            visible[node] |= visible[parent]
        edge_nodes, edge_tokens = zip(*edges, strict=True)
        return cls(
            tokens=torch.tensor(tokens),
            depths=torch.tensor(depths),
            visible=torch.from_numpy(visible),
            edge_nodes=torch.tensor(edge_nodes),
            edge_tokens=torch.tensor(edge_tokens),
            paths=paths,
        )

    def along_paths(self, edges_X: Tensor) -> tuple[Tensor, ...]:
        """What the edges hold, for each candidate token by token: (T,)"""
        edges = torch.tensor([edge for path in self.paths for edge in path])
        return torch.split(edges_X[edges], [len(path) for path in self.paths])
