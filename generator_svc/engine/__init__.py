"""The decode engine: generation with both heads, likelihoods, and the posterior of every document."""

from generator_svc.engine.backend import Decoding, Task
from generator_svc.engine.engine import RagEngine
from generator_svc.engine.evidence import Evidence, Generated

__all__ = ["Decoding", "Evidence", "Generated", "RagEngine", "Task"]
