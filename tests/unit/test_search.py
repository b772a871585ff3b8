"""Which token comes next, apart from any model: sampling by its distribution, and problems that do not meet."""

import math
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, LogitsProcessor, MaxLengthCriteria

from generator_svc.engine.search import BeamSearch, RowSearch

START, EOS, PAD, VOCABULARY = 0, 2, 1, 7
CPU = torch.device("cpu")


def stopping(max_length: int) -> StoppingCriteriaList:
    return StoppingCriteriaList([MaxLengthCriteria(max_length), EosTokenCriteria(torch.tensor([EOS]))])


def rows(problems: int, samples: int, seed: int | None, max_length: int = 4) -> RowSearch:
    return RowSearch(
        problems=problems, samples=samples, start=START, pad=PAD, processors=LogitsProcessorList(),
        sampler=None if seed is None else torch.Generator().manual_seed(seed), stopping=stopping(max_length),
        max_length=max_length, documents=1, device=CPU,
    )  # fmt: skip


def beams(problems: int, **options: Any) -> BeamSearch:
    rules: dict[str, Any] = {
        "beams": 3, "start": START, "pad": PAD, "processors": LogitsProcessorList(), "returned": 3, "max_length": 6,
        "eos_tokens": 1, "length_penalty": 1.0, "early_stopping": False, "documents": 1, "device": CPU,
        "stopping": stopping(6),
    }  # fmt: skip
    return BeamSearch(problems=problems, **{**rules, **options})


class Tree:
    """Next-token log-probabilities that are a function of the hypothesis and of the problem, and of nothing else."""

    def __init__(self, search: RowSearch | BeamSearch) -> None:
        self.search = search
        self.rows: list[list[list[int]]] = [[[]] for _ in search.rows]

    def run(self, names: list[int]) -> list[list[list[int]]]:
        while any(self.search.rows):
            tokens, parents = self.search.tokens.tolist(), self.search.parents.tolist()
            at, log_probs = 0, []
            for problem, count in enumerate(self.search.rows):
                grown = [
                    [*self.rows[problem][parent], token]
                    for parent, token in zip(parents[at : at + count], tokens[at : at + count], strict=True)
                ]
                at += count
                self.rows[problem] = grown
                log_probs += [following(names[problem], history) for history in grown]
            rows = torch.stack(log_probs)
            self.search.advance(rows, rows[None])
        return [[row.tolist() for row, _ in found] for found in self.search.results()]


def following(name: int, history: list[int]) -> torch.Tensor:
    seed = hash((name, *history)) % 2**31
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(0)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0, 2.0])
def test_a_problem_finds_among_others_what_it_finds_alone(early_stopping: bool | str, length_penalty: float) -> None:
    """And the parents that a search names lead every row back to its own beginning."""
    rules = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    together = Tree(beams(4, **rules)).run([0, 1, 2, 3])
    for name, found in enumerate(together):
        assert Tree(beams(1, **rules)).run([name]) == [found]


def test_greedy_search_takes_the_likeliest_token_of_every_problem() -> None:
    for name, (found,) in enumerate(Tree(rows(5, 1, None)).run(list(range(5)))):
        history = [START]
        while len(history) < 4 and history[-1] != EOS:
            history.append(int(following(name, history).argmax()))
        assert found == history


def test_beams_as_wide_as_the_tree_find_the_best_answer_there_is() -> None:
    """No pruning: the search is exhaustive, so its best answer is the best of all by enumeration."""

    def every(history: list[int], score: float) -> list[tuple[float, list[int]]]:
        if len(history) == 4 or (len(history) > 1 and history[-1] == EOS):
            return [(score / (len(history) - 1), history)]
        gains = following(3, history).tolist()
        return [answer for token, gain in enumerate(gains) for answer in every([*history, token], score + gain)]

    wide = beams(1, beams=60, returned=1, max_length=4, stopping=stopping(4), early_stopping="never")
    [[best]] = Tree(wide).run([3])
    assert best == max(every([START], 0.0))[1]


def test_more_beams_than_tokens_are_no_more_answers_than_there_are() -> None:
    found = Tree(beams(1, beams=20, returned=20, max_length=2, stopping=stopping(2))).run([0])[0]
    assert sorted(map(tuple, found)) == [(START, token) for token in range(VOCABULARY)]


def test_samples_follow_the_distribution() -> None:
    drawn = rows(1, 20_000, seed=1, max_length=2)
    log_probs = following(1, [START])
    drawn.advance(log_probs[None], log_probs[None, None])
    counts = torch.bincount(torch.stack([row[1] for row, _ in drawn.results()[0]]), minlength=VOCABULARY)
    expected = log_probs.exp() * 20_000
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 22.5  # six degrees of freedom: one seed in a thousand is above


def test_samples_of_a_row_that_has_ended_cost_nothing_more() -> None:
    search = rows(1, 3, seed=0)
    search.advance(torch.zeros(1, VOCABULARY), torch.zeros(1, 1, VOCABULARY))
    while any(search.rows):
        assert sum(search.rows) == len(search.tokens) == len(search.parents)
        assert EOS not in search.tokens
        log_probs = torch.zeros(sum(search.rows), VOCABULARY)
        search.advance(log_probs, log_probs[None])
    assert all(len(row) == 4 or row[-1] == EOS for row, _ in search.results()[0])


def test_a_sampled_row_that_may_say_nothing_does_not_end_the_others() -> None:
    """transformers' sampling crashes there, and a step is shared by many questions."""
    search = rows(2, 1, seed=0)
    log_probs = torch.stack([torch.full((VOCABULARY,), -math.inf), following(1, [START])])
    search.advance(log_probs, log_probs[None])
    assert sum(len(found) for found in search.results()) == 2


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -math.inf)


def test_where_the_rules_allow_nothing_there_is_no_answer() -> None:
    assert Tree(beams(2, processors=LogitsProcessorList([Nothing()]))).run([0, 1]) == [[], []]
