"""OpenAI's shapes over the same pipeline: `/v1/chat/completions`, `/v1/embeddings`, `/v1/models`.

`fields` says which fields of OpenAI's cannot be honoured, `schemas` what is taken and given, `chat` and `embeddings`
translate, `chunks` streams, `routes` serves. What RAG knows beyond OpenAI's shapes stands in fields named ``rag``.
"""

from generator_svc.openai.routes import openai_router

__all__ = ["openai_router"]
