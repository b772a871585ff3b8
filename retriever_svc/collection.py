"""A collection as it serves: one verified generation, what was written since, and the index over both."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from retriever_svc import generation as gen
from retriever_svc import ranking
from retriever_svc.changes import Change, ChangeLog, Upsert, read_changes
from retriever_svc.delta import Delta
from retriever_svc.filters import Filters, Selection
from retriever_svc.index import INDEX, Device, GpuStorage, Index, check_params_of_kind, merged
from retriever_svc.metadata import types_of
from retriever_svc.passages import PassageTable
from retriever_svc.ranking import Ranked, Segment
from shared.documents import passage_array, passage_of
from shared.errors import InvalidRequest, NotFound, StartupError
from shared.retrieval import Float32Array, Int64Array
from shared.schemas import CollectionInfo, IndexInfo, Passage, SearchParams

FLOAT32_MAX = float(np.finfo(np.float32).max)


class Collection:
    """Searched and changed by the worker thread alone; the rest may be called from any thread."""

    def __init__(
        self, folder: Path, generation: str, manifest: gen.Manifest, passages: PassageTable, index: Index
    ) -> None:
        self.folder = folder
        self.name = folder.name
        self.generation = generation
        self.manifest = manifest
        self.passages = passages
        self.index = index
        self.delta = Delta(passages, manifest.dimension)
        self.filters = Filters(passages, self.delta)
        self.applied = manifest.applied
        self.dropped = False  # its files go: no search may begin
        self.next_id = int(passages.ids.max(initial=-1)) + 1

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        generation: str | None = None,
        device: Device = "auto",
        gpu_storage: GpuStorage = "float32",
    ) -> "Collection":
        """Verify and load a generation of the collection in ``folder``, the current one, with all changes since.

        Raises: StartupError: names what is missing, damaged or contradicts the manifest, and what to do.
        """
        current = gen.current_generation(folder) if generation is None else folder / gen.GENERATIONS / generation
        manifest = gen.read_manifest(current)
        gen.verify_files(current, manifest)
        passages = PassageTable.open(current / gen.PASSAGES, manifest.passages_version)
        index = Index.read(current, dtype=manifest.dtype, device=device, gpu_storage=gpu_storage)
        said = (manifest.count, manifest.dimension, manifest.dtype)
        for path, found in (
            (current / INDEX, (index.count, index.dimension, manifest.dtype)),
            (current / gen.PASSAGES, (len(passages), passages.dimension, passages.dtype)),
        ):
            if found != said:
                raise StartupError(
                    f"{path} holds {found[0]} x {found[1]} {found[2]} where {current / gen.MANIFEST} says "
                    f"{said[0]} x {said[1]} {said[2]}; {gen.REBUILD}"
                )
        collection = cls(folder, current.name, manifest, passages, index)
        collection.catch_up()
        return collection

    def open_log(self) -> ChangeLog:
        """Raises: StartupError: a file of it is damaged."""
        return ChangeLog.open(self.folder, self.manifest.lineage, self.manifest.dtype, applied=self.manifest.applied)

    def catch_up(self) -> None:
        """Apply what the log holds beyond what was applied."""
        for number, change in read_changes(self.folder, self.manifest.lineage, after=self.applied):
            self.apply(number, change)

    def apply(self, number: int, change: Change) -> int:
        """Make change ``number`` visible; how many passages it replaced or deleted."""
        gone = self.delta.apply(change)
        if isinstance(change, Upsert):
            self.next_id = max(self.next_id, int(change.ids.max(initial=-1)) + 1)
        self.applied = number
        return gone

    @property
    def count(self) -> int:
        return self.manifest.count - self.delta.n_base_dead + self.delta.count

    @property
    def max_norm(self) -> float:
        return max(self.manifest.max_norm, self.delta.max_norm)

    def check_queries(self, vectors_BD: Float32Array) -> None:
        """Refuse vectors that this index cannot be searched with.

        Raises: InvalidRequest: another dimension, or so large that an inner product could overflow float32.
        """
        self.check_dimension(vectors_BD, "vectors")
        # Every partial sum of q·d is at most |q| |d|; half of the range leaves room for the rounding of norms.
        wide_BD = vectors_BD.astype(np.float64)
        norms_B = np.sqrt(np.einsum("bd,bd->b", wide_BD, wide_BD))
        too_large = np.flatnonzero(norms_B * self.max_norm > FLOAT32_MAX / 2)
        if len(too_large):
            raise InvalidRequest(
                f"vectors[{too_large[0]}] has norm {norms_B[too_large[0]]:.3g}: its inner products overflow float32",
                param="vectors",
            )

    def check_params(self, params: SearchParams | None) -> None:
        """Raises: InvalidRequest: a setting that the index does not have, or will not have where there is none yet."""
        if self.manifest.count:
            self.index.check_params(params)
        else:
            check_params_of_kind(self.manifest.kind, self.manifest.dimension, params)

    def check_dimension(self, vectors_BD: Float32Array, param: str) -> None:
        """Raises: InvalidRequest."""
        dimension = vectors_BD.shape[1]
        if dimension != self.manifest.dimension:
            raise InvalidRequest(
                f"vectors have dimension {dimension}, collection `{self.name}` has {self.manifest.dimension}",
                param=param,
            )

    def segments(self) -> list[Segment]:
        """What a search goes through: the generation, and what was added since."""
        dead = self.delta.base_dead if self.delta.n_base_dead else None
        base = Segment(0, self.index, self.passages.ids, self.manifest.max_norm, dead)
        added = self.delta.segment()
        return [base] if added is None else [base, added]

    def search(
        self,
        vectors_BD: Float32Array,
        n_docs: Sequence[int],
        params: SearchParams | None = None,
        selection: Selection | None = None,
    ) -> list[Ranked]:
        """The best ``n_docs[b]`` documents of each query, of those selected; see :mod:`retriever_svc.ranking`."""
        chosen = None if selection is None else [selection.base, selection.added()]
        return ranking.search(self.segments(), vectors_BD, n_docs, merged(self.manifest.search_params, params), chosen)

    def take(self, rows_K: Int64Array) -> pa.StructArray:
        """The passages of ``rows_K``, in that order."""
        stored_K = rows_K < len(self.passages)
        if stored_K.all():
            return self.passages.take(rows_K) if len(rows_K) else passage_array([])
        has_metadata = bool(self.passages.metadata.names)
        found = [self.delta.passage(row) for row in rows_K[~stored_K].tolist()]
        written = passage_array(found, metadata=has_metadata)
        if not stored_K.any():
            return written
        # Those of the table first, then those written since; back in order.
        both = pa.concat_arrays([self.passages.take(rows_K[stored_K]), written])
        return both.take(pa.array(np.argsort(np.argsort(~stored_K, kind="stable"), kind="stable")))

    def warm_up(self) -> None:
        """Search and read once, so that the first request does not pay for what libraries put off until then."""
        found = self.search(np.ones((1, self.manifest.dimension), np.float32), [1])
        self.take(found[0].rows)

    def passage(self, passage_id: int) -> Passage:
        """Raises: NotFound."""
        row = self.delta.row_of(passage_id)
        if row is None:
            raise NotFound(f"collection `{self.name}` has no passage {passage_id}", param="passage_id")
        return passage_of(self.take(np.array([row]))[0].as_py())

    @property
    def index_info(self) -> IndexInfo:
        return IndexInfo(collection=self.name, generation=self.generation, encoder=self.manifest.encoder)

    @property
    def info(self) -> CollectionInfo:
        manifest = self.manifest
        return CollectionInfo(
            name=self.name,
            generation=self.generation,
            encoder=manifest.encoder,
            kind=manifest.kind,
            factory=manifest.factory,
            search_params=manifest.search_params,
            metric=manifest.metric,
            dimension=manifest.dimension,
            count=self.count,
            version=self.applied,
            dtype=manifest.dtype,
            device=self.index.device,
            created_at=manifest.created_at,
            metadata=types_of(self.passages.metadata),
        )
