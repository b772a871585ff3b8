"""Collections in the data folder: their pointers, manifests and files. The files are measured, not read."""

from collections.abc import Iterator
from pathlib import Path

from retriever_svc import generation as gen
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings
from shared.errors import StartupError

_found = Findings("collections")

COLLECTIONS = "collections"


def check(deployment: Deployment) -> Iterator[Finding]:
    if "retriever" not in deployment.services or deployment.retriever is None:
        return
    data_dir, seed = deployment.retriever.data_dir, deployment.retriever.seed
    found = _pointers(data_dir)
    for folder in found:
        yield _collection(folder)
    if found:
        return
    if seed.is_file():
        yield _found("note", f"no collection in {data_dir.absolute()} yet: the first start makes `default` from {seed}")
    else:
        mend = "name a data folder that has one in RETRIEVER_DATA_DIR, or a Parquet file in RETRIEVER_SEED"
        yield _found("problem", f"no collection in {data_dir.absolute()}, and no seed file {seed}", mend)


def _collection(folder: Path) -> Finding:
    try:
        current = gen.current_generation(folder)
        manifest = gen.read_manifest(current)
        gen.verify_sizes(current, manifest)
    except StartupError as error:
        mend = "restore it (`rag index restore`), or remove its folder and build it anew (`rag index build`)"
        return _found("problem", f"{folder.name} is damaged: {error.message.partition(';')[0]}", mend)
    what = f"{folder.name}: {manifest.count:,} passages, {manifest.kind}, generation {current.name}, files complete"
    return _found("ok", what)


def current_manifests(data_dir: Path) -> dict[str, gen.Manifest]:
    """Of the generations that serve, by collection; those that cannot be read are left out."""
    manifests = {}
    for folder in _pointers(data_dir):
        try:
            manifests[folder.name] = gen.read_manifest(gen.current_generation(folder))
        except StartupError:
            continue
    return manifests


def _pointers(data_dir: Path) -> list[Path]:
    return sorted(path.parent for path in (data_dir / COLLECTIONS).glob(f"*/{gen.CURRENT}"))
