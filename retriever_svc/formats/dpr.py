"""The files of the original DPR (github.com/facebookresearch/DPR), which transformers reads with its ``LegacyIndex``.

    psgs_w100.tsv                  the passages; or psgs_w100.tsv.pkl, a dict of id: (text, title) or a list of
                                   (text, title) numbered from 0 or from 1, whichever the embeddings agree with
    <name>_0.pkl, <name>_1.pkl …   embeddings, lists of (id, vector), from ``generate_dense_embeddings.py``
    <name>.index.dpr               a faiss index, and
    <name>.index_meta.dpr          the ids of its rows, in order

DPR's HNSW indexes compare by L2 in one dimension more, which makes all vectors equally long, so that the nearest is
the one with the largest inner product. The dimension is taken off again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from retriever_svc.formats.arrow_files import in_order
from retriever_svc.formats.dpr_passages import PassagesById, id_of
from retriever_svc.formats.embedded import Imported
from retriever_svc.formats.faiss_file import L2, FaissHeader, StoredVectors, check_index, read_header
from retriever_svc.formats.passages import Rereadable, UniqueIds, refusal, shown
from retriever_svc.formats.unpickle import safe_load
from retriever_svc.formats.vectors import STORED_AS, check_vectors, fixed_size, source_schema, with_embeddings
from retriever_svc.source import BATCH_ROWS, Source, files_identity
from shared.retrieval import Float32Array, Int64Array

INDEX, META = "index.dpr", "index_meta.dpr"
PASSAGE_FILES = ("psgs_w100.tsv.pkl", "psgs_w100.tsv", "psgs_w100.tsv.gz")
SHARD = "*_[0-9]*"
EQUAL_WITHIN = 0.05


@dataclass(frozen=True)
class DprFiles:
    """``shards`` in their order; ``index`` and ``meta`` come together."""

    passages: Path
    shards: tuple[Path, ...] = ()
    index: Path | None = None
    meta: Path | None = None


def find_dpr_files(path: Path) -> DprFiles:
    """The files in a folder, or those in its parent that begin with the name of ``path``, as DPR's options give them.

    Raises: InvalidRequest: the passages are missing, there are neither embeddings nor an index, or several of one kind.
    """
    folder, prefix = (path, "") if path.is_dir() else (path.parent, path.name.removesuffix(f".{INDEX}"))
    passages = next((folder / name for name in PASSAGE_FILES if (folder / name).is_file()), None)
    if passages is None:
        raise refusal(folder, f"has no passages: one of {', '.join(PASSAGE_FILES)} is expected")
    shards = [file for file in folder.glob(SHARD) if file.name.startswith(prefix) and _is_shard(file)]
    index, meta = (_only(folder, prefix, ending) for ending in (INDEX, META))
    if (index is None) != (meta is None):
        raise refusal(folder, f"{INDEX} and {META} come together, but one of them is missing")
    if not shards and index is None:
        raise refusal(path, f"has no embeddings: neither <name>_0.pkl nor <name>.{INDEX}")
    return DprFiles(passages, tuple(in_order(iter(shards))), index, meta)


def read_dpr(files: DprFiles, encoder: str, *, quantized: bool = False, id_prefix: str = "wiki:") -> Imported:
    """Passages with the embeddings of the shards where there are any, of the index otherwise.

    The passages are held in memory, in the order of the embeddings they are not. From an index the vectors are taken
    where it keeps them whole; with ``quantized`` also from HNSW over 8-bit codes, as ``LegacyIndex`` does. Newer files
    write ids as "wiki:7": ``id_prefix`` is taken off. ``index`` of the result is set where it compares by inner product
    and its rows are those of the source.

    Raises: InvalidRequest: a pickle asks for more than plain data; ids, counts or dimensions disagree.
    """
    embeddings: _Shards | _Index
    if files.shards:
        embeddings = _Shards(files.shards, id_prefix)
    elif files.index and files.meta:
        embeddings = _Index(files.index, files.meta, id_prefix, quantized=quantized)
    else:
        raise refusal(files.passages, "comes without embeddings and without an index")
    passages = PassagesById.read(files.passages, id_prefix, count_from_0=embeddings.begins_with_0())
    if isinstance(embeddings, _Index) and embeddings.header.count != len(passages):
        says = f"has {embeddings.header.count} vectors, {files.passages.name} has {len(passages)} passages"
        raise refusal(embeddings.header.path, says, "index")
    batches = Rereadable(lambda: _join(passages, embeddings))
    read = (files.passages, *(files.shards or [path for path in (files.index, files.meta) if path is not None]))
    source = Source(
        source_schema(embeddings.kind, embeddings.dimension),
        batches,
        encoder,
        len(passages),
        identity=f"{files_identity(*read)} {id_prefix} {quantized}",
    )
    served = isinstance(embeddings, _Index) and embeddings.header.metric != L2
    return Imported(source, embeddings.header if isinstance(embeddings, _Index) and served else None)


Block = tuple[Path, int, Int64Array, Any]
"""File, row of it, ids (B,), vectors (B, D)."""


class _Embeddings(Protocol):
    def blocks(self) -> Iterator[Block]: ...


def _join(passages: PassagesById, embeddings: _Embeddings) -> Iterator[pa.RecordBatch]:
    unique = UniqueIds(passages.path.parent)
    rows = 0
    for path, row, ids_B, vectors_BD in embeddings.blocks():
        unique.add(ids_B)
        rows += len(ids_B)
        yield with_embeddings(passages.take(ids_B, path, row), fixed_size(vectors_BD))
    unique.check()
    if rows != len(passages):
        raise refusal(passages.path, f"has {len(passages)} passages, but there are {rows} embeddings", "embedding")


class _Shards:
    """Embeddings from pickles, one of them in memory at a time."""

    def __init__(self, paths: Sequence[Path], id_prefix: str) -> None:
        self._paths, self._id_prefix = paths, id_prefix
        first = next((block for block in self._blocks(None)), None)
        if first is None:
            raise refusal(paths[0], "has no embeddings, nor have the other shards", "embedding")
        vectors_BD = first[3]
        self.kind, self.dimension = STORED_AS[pa.from_numpy_dtype(vectors_BD.dtype)], int(vectors_BD.shape[1])
        self._dtype = vectors_BD.dtype
        self._first_ids = first[2]

    def begins_with_0(self) -> bool:
        return bool((self._first_ids == 0).any())

    def blocks(self) -> Iterator[Block]:
        for path, row, ids_B, vectors_BD in self._blocks(self.dimension):
            yield path, row, ids_B, vectors_BD.astype(self._dtype, copy=False)

    def _blocks(self, dimension: int | None) -> Iterator[Block]:
        for path in self._paths:
            rows = safe_load(path)
            if not isinstance(rows, list):
                raise refusal(path, f"holds a {type(rows).__name__}, not a list of (id, vector)", "embedding")
            for start in range(0, len(rows), BATCH_ROWS):
                block = self._block(path, start, rows[start : start + BATCH_ROWS], dimension)
                dimension = block[3].shape[1]
                yield block

    def _block(self, path: Path, start: int, rows: Sequence[Any], dimension: int | None) -> Block:
        ids, vectors = [], []
        for number, entry in enumerate(rows, start):
            if not isinstance(entry, tuple | list) or len(entry) < 2 or not isinstance(entry[1], np.ndarray):
                raise refusal(path, f"row {number} is no (id, vector): {shown(entry)}", "embedding")
            ids.append(id_of(path, f"row {number}", entry[0], self._id_prefix))
            vector_1D = entry[1].reshape(1, -1)
            check_vectors(path, f"the vector of row {number}", vector_1D, dimension)
            dimension = vector_1D.shape[1]
            vectors.append(vector_1D)
        return path, start, np.array(ids, np.int64), np.concatenate(vectors)


class _Index:
    """Embeddings from an index that keeps them, with the ids of its rows."""

    def __init__(self, path: Path, meta: Path, id_prefix: str, *, quantized: bool) -> None:
        header = read_header(path)
        self._extra = header.metric == L2 and header.kind.startswith("IHN")
        self.header: FaissHeader = header if self._extra else check_index(path, count=None, dimension=None)
        self._stored = StoredVectors(path, quantized=quantized)
        self.kind, self.dimension = pa.float32(), header.dimension - self._extra
        ids = safe_load(meta)
        if not isinstance(ids, list) or len(ids) != header.count:
            found = f"{len(ids)} ids" if isinstance(ids, list) else f"a {type(ids).__name__}"
            raise refusal(meta, f"holds {found}, {path.name} has {header.count} vectors", "id")
        if not ids:
            raise refusal(path, "has no vectors", "index")
        self._ids_N = np.array([id_of(meta, f"row {row}", i, id_prefix) for row, i in enumerate(ids)], np.int64)
        self._check_extra_dimension()

    def begins_with_0(self) -> bool:
        return bool((self._ids_N == 0).any())

    def blocks(self) -> Iterator[Block]:
        for start in range(0, self.header.count, BATCH_ROWS):
            ids_B = self._ids_N[start : start + BATCH_ROWS]
            vectors_BD = self._stored.take(start, len(ids_B))
            yield self.header.path, start, ids_B, vectors_BD[:, : self.dimension]

    def _check_extra_dimension(self) -> None:
        if self._extra:
            vectors_BD: Float32Array = self._stored.take(0, min(BATCH_ROWS, self.header.count))
            lengths_B = np.linalg.norm(vectors_BD.astype(np.float64), axis=1)
            if not self.dimension or not np.allclose(lengths_B, lengths_B.max(), rtol=EQUAL_WITHIN):
                says = "compares by L2, but its vectors differ in length: it is not one of DPR's, whose last dimension "
                raise refusal(self.header.path, f"{says}makes L2 rank as the inner product does", "index")


def _is_shard(path: Path) -> bool:
    name = path.name.removesuffix(".pkl")
    return path.is_file() and name.rpartition("_")[2].isdigit()


def _only(folder: Path, prefix: str, ending: str) -> Path | None:
    named = (file for file in folder.glob(f"*{ending}") if file.name.startswith(prefix))
    found = sorted(file for file in named if file.name == ending or file.name.endswith(f".{ending}"))
    if len(found) > 1:
        raise refusal(folder, f"has several files *.{ending}; give the path up to that ending of one of them")
    return found[0] if found else None
