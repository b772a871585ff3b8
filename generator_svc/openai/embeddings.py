"""Question vectors in OpenAI's shape."""

import base64

from generator_svc.openai.errors import Renamed
from generator_svc.openai.schemas import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage, EncoderDetails
from generator_svc.pipeline import Pipeline
from shared.deadline import Deadline
from shared.errors import RequestError
from shared.retrieval import Float32Array
from shared.schemas import EncodeRequest

_NAMES = Renamed({"question": "input"})


async def embed(
    pipeline: Pipeline, asked: EmbeddingRequest, details: EncoderDetails, deadline: Deadline
) -> EmbeddingList:
    """Raises: RagError."""
    if asked.dimensions not in (None, details.dimension):
        raise RequestError(
            f"dimensions: vectors have {details.dimension}, and cannot be shortened to {asked.dimensions}",
            param="dimensions",
        )
    with _NAMES:
        encoded = await pipeline.encode(EncodeRequest(question=asked.input), deadline)
    return EmbeddingList(
        data=[
            Embedding(index=index, embedding=_base64(vector) if asked.encoding_format == "base64" else vector.tolist())
            for index, vector in enumerate(encoded.vectors)
        ],
        model=asked.model,
        usage=EmbeddingUsage(prompt_tokens=encoded.tokens, total_tokens=encoded.tokens),
        rag=details,
    )


def _base64(vector_D: Float32Array) -> str:
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
