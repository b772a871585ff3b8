"""A collection as it serves: one verified generation, its passages and its index, open for reading."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retriever_svc import generation as gen
from retriever_svc import ranking
from retriever_svc.index import Device, FlatIndex, GpuStorage
from retriever_svc.passages import PassageTable
from retriever_svc.ranking import Ranked
from shared.errors import InvalidRequest, NotFound, StartupError
from shared.retrieval import Float32Array
from shared.schemas import CollectionInfo, IndexInfo, Passage

FLOAT32_MAX = float(np.finfo(np.float32).max)


class Collection:
    """Searched by the worker thread alone; the rest may be called from any thread."""

    def __init__(
        self, name: str, generation: str, manifest: gen.Manifest, passages: PassageTable, index: FlatIndex
    ) -> None:
        self.name = name
        self.generation = generation
        self.manifest = manifest
        self.passages = passages
        self.index = index

    @classmethod
    def open(cls, folder: Path, *, device: Device = "auto", gpu_storage: GpuStorage = "float32") -> "Collection":
        """Verify and load the current generation of the collection in ``folder``.

        Raises: StartupError: names what is missing, damaged or contradicts the manifest, and what to do.
        """
        current = gen.current_generation(folder)
        manifest = gen.read_manifest(current)
        gen.verify_files(current, manifest)
        passages = PassageTable.open(current / gen.PASSAGES, manifest.passages_version)
        index = FlatIndex.read(current / gen.INDEX, device=device, gpu_storage=gpu_storage)
        said = (manifest.count, manifest.dimension, manifest.dtype)
        for path, found in (
            (current / gen.INDEX, (index.count, index.dimension, manifest.dtype)),
            (current / gen.PASSAGES, (len(passages), passages.dimension, passages.dtype)),
        ):
            if found != said:
                raise StartupError(
                    f"{path} holds {found[0]} x {found[1]} {found[2]} where {current / gen.MANIFEST} says "
                    f"{said[0]} x {said[1]} {said[2]}; {gen.REBUILD}"
                )
        return cls(folder.name, current.name, manifest, passages, index)

    def check_queries(self, vectors_BD: Float32Array) -> None:
        """Refuse vectors that this index cannot be searched with.

        Raises: InvalidRequest: another dimension, or so large that an inner product could overflow float32.
        """
        dimension = vectors_BD.shape[1]
        if dimension != self.manifest.dimension:
            raise InvalidRequest(
                f"vectors have dimension {dimension}, collection `{self.name}` has {self.manifest.dimension}",
                param="vectors",
            )
        # Every partial sum of q·d is at most |q| |d|; half of the range leaves room for the rounding of norms.
        norms_B = np.linalg.norm(vectors_BD.astype(np.float64), axis=1)
        too_large = np.flatnonzero(norms_B * self.manifest.max_norm > FLOAT32_MAX / 2)
        if len(too_large):
            raise InvalidRequest(
                f"vectors[{too_large[0]}] has norm {norms_B[too_large[0]]:.3g}: its inner products overflow float32",
                param="vectors",
            )

    def search(self, vectors_BD: Float32Array, n_docs: Sequence[int]) -> list[Ranked]:
        """The best ``n_docs[b]`` documents of each query, see :mod:`retriever_svc.ranking`."""
        return ranking.search(self.index, self.passages.ids, self.manifest.max_norm, vectors_BD, n_docs)

    def warm_up(self) -> None:
        """Search and read once, so that the first request does not pay for what libraries put off until then."""
        (ranked,) = self.search(self.index.embeddings(np.array([0])), [1])
        self.passages.take(ranked.rows)

    def passage(self, passage_id: int) -> Passage:
        """Raises: NotFound."""
        row = self.passages.row_of(passage_id)
        if row is None:
            raise NotFound(f"collection `{self.name}` has no passage {passage_id}", param="passage_id")
        return self.passages.take(np.array([row]))[row]

    @property
    def index_info(self) -> IndexInfo:
        return IndexInfo(collection=self.name, generation=self.generation, encoder=self.manifest.encoder)

    @property
    def info(self) -> CollectionInfo:
        return CollectionInfo(
            name=self.name,
            generation=self.generation,
            encoder=self.manifest.encoder,
            kind=self.manifest.kind,
            metric=self.manifest.metric,
            dimension=self.manifest.dimension,
            count=self.manifest.count,
            dtype=self.manifest.dtype,
            device=self.index.device,
            created_at=self.manifest.created_at,
        )
