"""Candidates as a prefix trie: what is shared, who sees whom, and the way back to the candidates."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from generator_svc.engine.trie import Trie, pieces

candidate_lists = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=6).map(lambda tokens: [9, *tokens]), min_size=1, max_size=8
)


def test_a_shared_prefix_is_one_path_and_the_last_token_is_no_node() -> None:
    trie = Trie.of([[9, 5, 6, 2], [9, 5, 7, 2], [9, 2]])
    assert trie.tokens.tolist() == [9, 5, 6, 7]
    assert trie.depths.tolist() == [0, 1, 2, 2]
    assert trie.visible.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert [len(path) for path in trie.paths] == [3, 3, 1]


@given(candidate_lists)
def test_every_candidate_is_read_back_from_its_path(candidates: list[list[int]]) -> None:
    trie = Trie.of(candidates)
    along = trie.along_paths(trie.edge_tokens)
    for candidate, path, tokens in zip(candidates, trie.paths, along, strict=True):
        assert tokens.tolist() == candidate[1:]
        for position, edge in enumerate(path):
            node = int(trie.edge_nodes[edge])
            prefix = trie.tokens[trie.visible[node]].tolist()  # ancestors come before their descendants
            assert prefix == candidate[: position + 1]
            assert int(trie.depths[node]) == position


@given(candidate_lists)
def test_no_prefix_is_held_twice(candidates: list[list[int]]) -> None:
    trie = Trie.of(candidates)
    prefixes = {tuple(candidate[:length]) for candidate in candidates for length in range(1, len(candidate))}
    assert len(trie.tokens) == len(prefixes)
    edges = {tuple(candidate[:length]) for candidate in candidates for length in range(2, len(candidate) + 1)}
    assert len(trie.edge_tokens) == len(edges)


@given(candidate_lists, st.integers(1, 12))
def test_pieces_hold_every_candidate_and_as_many_nodes_as_they_may(candidates: list[list[int]], nodes: int) -> None:
    rows = [tuple(candidate) for candidate in candidates]
    found = pieces(rows, nodes)
    assert sorted(rows) == [row for piece in found for row in piece]
    sizes = [len(Trie.of(piece).tokens) for piece in found]
    assert all(size <= nodes or len(set(piece)) == 1 for size, piece in zip(sizes, found, strict=True))
    for piece, following in itertools.pairwise(found):
        assert len(Trie.of([*piece, following[0]]).tokens) > nodes


def test_without_candidates_there_are_no_pieces() -> None:
    assert pieces([], 5) == []
