"""faiss alone, over the very file that our service serves: the ceiling that the service is measured against.

``search`` returns ids and scores. ``take`` does what an answer with exact scores needs of faiss: it searches for as
many hits as the service fetches over, and reads the embeddings of the best.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks.in_process import answer_turns
from benchmarks.retriever_cells import Cell
from benchmarks.retriever_data import N_DOCS
from retriever_svc import generation as gen
from retriever_svc.index import Index, use_threads
from retriever_svc.ranking import SPARE_HITS, SPARE_HITS_INEXACT
from shared.logs import configure_logging


def main() -> None:
    configure_logging("warning", "auto")  # the output is the answers'
    folder, queries, how, threads = Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    use_threads(threads)
    manifest = gen.read_manifest(folder)
    params = manifest.search_params
    index = Index.read(folder, dtype=manifest.dtype, device="cpu")
    spare = SPARE_HITS if index.exact else SPARE_HITS_INEXACT
    width = max(N_DOCS * (params.over_fetch or 1), N_DOCS + spare) if how == "take" else N_DOCS

    def ask(request: int, cell: Cell) -> list[list[int]]:
        start = request * cell.batch % (len(queries) - cell.batch + 1)
        _, rows = index.search(queries[start : start + cell.batch], width, params)
        if how == "take":
            index.embeddings(rows[:, :N_DOCS].reshape(-1))
        found: list[list[int]] = rows[:, :N_DOCS].tolist()
        return found

    answer_turns(ask, lambda: use_threads(threads))


if __name__ == "__main__":
    main()
