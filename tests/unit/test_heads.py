"""The heads' arithmetic against float64, tokens included that no document allows."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from generator_svc.engine.heads import document_log_probs, log_probs_of, marginalize


def logits_with_holes(shape: tuple[int, ...], spread: float, seed: int) -> Tensor:
    """(…, V) with a token that none allows, as a `final_logits_bias` of -inf makes it, and one that few do."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator) * spread
    logits[..., 0] = -torch.inf
    logits[1:, ..., 1] = -torch.inf
    return logits


@given(
    documents=st.integers(1, 6),
    rows=st.integers(1, 4),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    prior=st.sampled_from([0.1, 5.0, 5000.0]),
    seed=st.integers(0, 999),
)
def test_documents_are_mixed_as_in_float64(documents: int, rows: int, spread: float, prior: float, seed: int) -> None:
    logits = logits_with_holes((documents, rows, 40), spread, seed)
    log_prior = (torch.randn(documents, generator=torch.Generator().manual_seed(seed)) * prior).log_softmax(0)
    before = logits.clone()
    total, terms = marginalize(logits, log_prior)
    expected = logits.double().log_softmax(-1) + log_prior.double()[:, None, None]
    torch.testing.assert_close(terms, expected.float(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(total, expected.logsumexp(0).float(), atol=1e-5, rtol=1e-6)
    assert torch.equal(logits, before)


@given(rows=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 999))
def test_tokens_are_normalized_as_in_float64(rows: int, dtype: torch.dtype, seed: int) -> None:
    logits = logits_with_holes((rows, 40), 3.0, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    at, tokens = torch.randint(rows, (20,), generator=generator), torch.randint(40, (20,), generator=generator)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(log_probs_of(logits, at, tokens), expected[at, tokens].float(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(document_log_probs(logits.float()), expected.float(), atol=1e-5, rtol=1e-6)
