"""The decode engine: generation with both heads, likelihoods, and the posterior of every document."""

from generator_svc.engine.engine import Generated, RagEngine, Scored
from generator_svc.engine.options import GenerationOptions

__all__ = ["Generated", "GenerationOptions", "RagEngine", "Scored"]
