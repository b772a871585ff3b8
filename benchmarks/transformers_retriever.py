"""transformers' `RagRetriever`, in-process, over the flat index file that our service serves."""

import sys
from pathlib import Path
from typing import Any

import faiss
import pyarrow as pa
from datasets import Dataset
from transformers import RagConfig, RagRetriever
from transformers.models.rag.retrieval_rag import CustomHFIndex

from benchmarks.in_process import answer_turns
from benchmarks.retriever_cells import Cell
from benchmarks.retriever_data import N_DOCS, Corpus


def main() -> None:
    corpus = Corpus(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    faiss.omp_set_num_threads(int(sys.argv[4]))
    queries = corpus.queries
    retriever = rag_retriever(corpus)

    def ask(request: int, cell: Cell) -> list[list[int]]:
        start = request * cell.batch % (len(queries) - cell.batch + 1)
        _, ids, _ = retriever.retrieve(queries[start : start + cell.batch], N_DOCS)
        return [list(map(int, row)) for row in ids]

    answer_turns(ask, lambda: faiss.omp_set_num_threads(int(sys.argv[4])))


def rag_retriever(corpus: Corpus) -> Any:
    table = pa.Table.from_batches(corpus.source().batches).drop_columns(["id"])
    passages = Dataset(table.rename_columns({"embedding": "embeddings"}))
    passages.load_faiss_index("embeddings", str(corpus.generation("flat") / "index.faiss"))
    config = RagConfig(
        question_encoder={"model_type": "dpr"},
        generator={"model_type": "bart"},
        retrieval_vector_size=corpus.dimension,
        retrieval_batch_size=max(64, N_DOCS),
        n_docs=N_DOCS,
    )
    none: Any = None  # the tokenizers are for texts, and vectors are asked with
    make: Any = RagRetriever
    return make(config, none, none, index=CustomHFIndex(corpus.dimension, passages))


if __name__ == "__main__":
    main()
