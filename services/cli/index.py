"""`rag index`: collections on the disk of this machine: built, imported, examined, copied."""

# ruff: noqa: PLC0415  (imports inside commands: see services.cli)
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from services.cli.options import DEFAULT_RETRIEVER_URL, ApiKey, AsJson, RetrieverUrl, connect, print_json, tell
from shared.schemas import MetadataType

app = typer.Typer(
    help="Build, import, examine and copy collections in the retriever's data folder.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Name = Annotated[str, typer.Option("--name", help="The collection: made where it is missing, renewed otherwise.")]
DataDir = Annotated[Path, typer.Option("--data-dir", envvar="RETRIEVER_DATA_DIR", help="The retriever's data folder.")]
Kind = Annotated[
    str, typer.Option(help="flat, flat-fp16, sq8, hnsw, ivf-flat, ivf-pq, cagra, or faiss's factory string.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="RAG checkpoint whose question encoder belongs to the embeddings: its fingerprint is recorded."),
]
Fingerprint = Annotated[
    str | None, typer.Option("--fingerprint", help="That fingerprint itself, as `rag info` prints it.")
]
SearchParams = Annotated[
    str | None, typer.Option("--search-params", help='JSON, as {"nprobe": 64}; what the kind leaves open otherwise.')
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        help="A column for filters, as `year=integer`; string, integer, float, boolean, date, timestamp. Repeatable.",
    ),
]
COLLECTIONS = "collections"


@app.command()
def build(
    passages: Annotated[
        Path, typer.Argument(help="TSV, CSV, JSONL (also .gz), Parquet, Arrow, or a folder `datasets` saved.")
    ],
    *,
    encoder: Annotated[
        str | None, typer.Option(help="Passage encoder (DPR): folder or hub name. Not for a file with embeddings.")
    ] = None,
    checkpoint: Checkpoint = None,
    fingerprint: Fingerprint = None,
    name: Name = "default",
    data_dir: DataDir = Path("data"),
    kind: Kind = "flat",
    search_params: SearchParams = None,
    split: Annotated[
        int | None, typer.Option(min=1, help="Split texts into passages of so many words; the paper's: 100.")
    ] = None,
    metadata: Metadata = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32, of the stored embeddings.")] = "float16",
    processes: Annotated[int, typer.Option(min=1, help="Processes that embed side by side.")] = 1,
    device: Annotated[str, typer.Option(help="Where to embed: auto, cpu, cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Build a collection from passages: embed them, store them, index them.

    A Parquet file with the columns `id`, `title`, `text`, `embedding` is taken as it is. Otherwise every passage is
    embedded by `--encoder`, piece by piece. A run that was killed goes on where it was when called again: embedding,
    storing and indexing.

    Other columns of tables (Parquet, Arrow, `datasets`) are metadata for filters, or those of them that `--metadata`
    names. TSV, CSV and JSONL say no types: name what to keep.

    **Examples**

    - `rag index build psgs_w100.tsv --encoder facebook/dpr-ctx_encoder-multiset-base --checkpoint
      facebook/rag-token-nq --kind hnsw`
    - `rag index build articles.jsonl --split 100 --metadata year=integer --encoder ./context_encoder --checkpoint
      ./checkpoint --name news`
    """
    import shutil

    from retriever_svc.build import build_collection
    from retriever_svc.index import recipe
    from retriever_svc.source import from_parquet
    from services.indexing.batches import corpus_of, has_embeddings
    from services.indexing.embed import embed_corpus
    from services.indexing.options import EncoderOptions
    from services.indexing.progress import BuildProgress, EmbeddingProgress
    from services.indexing.source import shards_source
    from services.indexing.space import dimension_of
    from shared.errors import InvalidRequest

    folder = _collection(data_dir, name)
    kept = _metadata_of(metadata)
    options = _options(kind, search_params)
    if dtype not in ("float16", "float32"):
        raise InvalidRequest(f"dtype is {dtype!r}; float16 and float32 are taken", param="dtype")
    if has_embeddings(passages):
        with BuildProgress() as board:
            source = from_parquet(passages, fingerprint, kept)
            made = build_collection(folder, source, options=options, progress=board.show)
    else:
        if encoder is None:
            raise InvalidRequest(f"{passages} holds no embeddings: name the passage encoder in --encoder")
        space = fingerprint or _space_of(checkpoint)
        recipe(kind, dimension_of(encoder), 1)  # refuses a kind that cannot be, before hours of embedding
        work = folder / ".embedding"
        how = EncoderOptions(encoder, device=None if device == "auto" else device)
        with EmbeddingProgress() as embedding:
            embed_corpus(
                corpus_of(passages, split, kept),
                how,
                work,
                workers=processes,
                dtype="float16" if dtype == "float16" else "float32",
                progress=embedding.show,
            )
        with BuildProgress() as board:
            made = build_collection(folder, shards_source(work, space), options=options, progress=board.show)
        shutil.rmtree(work)
    _report(folder, made, as_json=as_json)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A data set with embeddings, wiki_dpr's files, DPR's files, or .npy.")],
    *,
    index: Annotated[
        Path | None, typer.Option(help="faiss index over the same rows (.faiss): served as it is, if it can be.")
    ] = None,
    passages: Annotated[Path | None, typer.Option(help="Passages that belong to the rows of a .npy.")] = None,
    checkpoint: Checkpoint = None,
    fingerprint: Fingerprint = None,
    name: Name = "default",
    data_dir: DataDir = Path("data"),
    kind: Kind = "flat",
    search_params: SearchParams = None,
    metadata: Metadata = None,
    quantized: Annotated[bool, typer.Option(help="DPR: take vectors that its index keeps as 8-bit codes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take over passages and embeddings that another tool has made.

    A data set that `datasets` saved (transformers' `index_name="custom"`), wiki_dpr's Parquet or Arrow files, the
    original DPR's `.index.dpr`, `.index_meta.dpr`, `.pkl` and `psgs_w100` files, or a `.npy` beside `--passages`.
    Pickles are read without running anything that they name. A run that was killed goes on when called again.
    Other columns are metadata as in `rag index build`; DPR's files have none.

    **Example**

    - `rag index import ./wiki_dpr --index psgs_w100.nq.HNSW128_SQ8-IP-train.faiss --kind hnsw --checkpoint
      facebook/rag-token-nq`
    """
    from retriever_svc.build import build_collection
    from retriever_svc.formats.dpr import find_dpr_files, read_dpr
    from retriever_svc.formats.embedded import Imported, read_embedded
    from retriever_svc.formats.npy import read_npy
    from services.indexing.progress import BuildProgress

    folder = _collection(data_dir, name)
    kept = _metadata_of(metadata)
    space = fingerprint or _space_of(checkpoint)
    if path.suffix == ".npy":
        if passages is None:
            raise typer.BadParameter("a .npy needs the passages of its rows", param_hint="--passages")
        imported = Imported(read_npy(path, passages, space, kept))
    elif _is_dpr(path):
        if metadata:
            raise typer.BadParameter("DPR's files have none", param_hint="--metadata")
        imported = read_dpr(find_dpr_files(path), space, quantized=quantized)
    else:
        imported = read_embedded(path, space, index, kept)
    options = _options(kind, search_params, imported.faiss_file)
    with BuildProgress() as board:
        made = build_collection(folder, imported.source, options=options, progress=board.show)
    _report(folder, made, as_json=as_json)


@app.command()
def add(
    passages: Annotated[Path, typer.Argument(help="As for `rag index build`.")],
    *,
    encoder: Annotated[
        str | None, typer.Option(help="Passage encoder (DPR): folder or hub name. Not for a file with embeddings.")
    ] = None,
    split: Annotated[int | None, typer.Option(min=1, help="Split texts into passages of so many words.")] = None,
    new_ids: Annotated[bool, typer.Option(help="Number them anew, instead of replacing who has their ids.")] = False,
    name: Annotated[str, typer.Option("--name", help="The collection, on a retriever that runs.")] = "default",
    retriever_url: RetrieverUrl = DEFAULT_RETRIEVER_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Store passages in a collection that serves: each batch is found as soon as it is acknowledged.

    Of other columns those are stored that the collection has.

    **Examples**

    - `rag index add more.jsonl --encoder ./context_encoder --split 100`
    - `rag index add embedded.parquet --name news --new-ids --api-key $ADMIN_KEY`
    """
    import pyarrow as pa

    from retriever_svc.metadata import schema_of
    from services.indexing.batches import embedded_batches

    written = gone = 0
    with connect(retriever_url, api_key, retriever_url) as client, _bar("adding") as show:
        kept = schema_of(client.collection(name).metadata)
        for batch in embedded_batches(passages, encoder, split, kept):
            sent = pa.record_batch({n: batch.column(n) for n in batch.schema.names if n != "id" or not new_ids})
            gone += client.upsert(sent, collection=name).gone
            written += len(batch)
            show(written, None)
    found = {"collection": name, "written": written, "replaced": gone}
    tell(found, f"{written:,} passages stored, {gone:,} of them in place of others", as_json=as_json)


@app.command()
def delete(
    ids: Annotated[list[int], typer.Argument(help="Ids of passages.")],
    *,
    name: Annotated[str, typer.Option("--name", help="The collection, on a retriever that runs.")] = "default",
    retriever_url: RetrieverUrl = DEFAULT_RETRIEVER_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete passages from a collection that serves.

    **Example**

    - `rag index delete 17 18 --name news`
    """
    with connect(retriever_url, api_key, retriever_url) as client:
        gone = client.delete(ids, collection=name).gone
    tell({"collection": name, "deleted": gone}, f"{gone:,} passages deleted", as_json=as_json)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The collection.")],
    *,
    dimension: Annotated[int, typer.Option(min=1, help="Of the embeddings.")],
    checkpoint: Checkpoint = None,
    fingerprint: Fingerprint = None,
    kind: Kind = "flat",
    dtype: Annotated[str, typer.Option(help="float16 or float32, of the stored embeddings.")] = "float16",
    metadata: Metadata = None,
    search_params: SearchParams = None,
    retriever_url: RetrieverUrl = DEFAULT_RETRIEVER_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a collection without passages on a retriever that runs, to be filled with `rag index add` or over REST.

    **Example**

    - `rag index create news --dimension 768 --checkpoint facebook/rag-token-nq --kind hnsw --metadata year=integer`
    """
    options: dict[str, Any] = {"kind": kind, "dtype": dtype, "metadata": _columns(metadata)}
    if (params := _params(search_params)) is not None:
        options["search_params"] = params
    with connect(retriever_url, api_key, retriever_url) as client:
        made = client.create_collection(
            name, dimension=dimension, encoder=fingerprint or _space_of(checkpoint), **options
        )
    text = f"{made.name}: empty, {made.kind}, {made.dimension} numbers of {made.dtype} a passage"
    tell(made.model_dump(), text, as_json=as_json)


@app.command()
def drop(
    name: Annotated[str, typer.Argument(help="The collection.")],
    *,
    remove_aliases: Annotated[
        bool, typer.Option("--remove-aliases", help="And the aliases that stand for it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    retriever_url: RetrieverUrl = DEFAULT_RETRIEVER_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Remove a collection from a retriever that runs: its passages, its generations, everything, for good.

    **Example**

    - `rag index drop news --yes --api-key $ADMIN_KEY`
    """
    if not yes:
        typer.confirm(f"Remove the collection `{name}` at {retriever_url} for good?", abort=True, err=as_json)
    with connect(retriever_url, api_key, retriever_url) as client:
        client.drop_collection(name, remove_aliases=remove_aliases)
    tell({"collection": name, "removed": True}, f"{name} is removed", as_json=as_json)


@app.command()
def plan(
    passages: Annotated[int, typer.Argument(min=1, help="How many.")],
    *,
    dimension: Annotated[int, typer.Option(min=1, help="Of the embeddings.")] = 768,
    text_bytes: Annotated[int, typer.Option(min=1, help="Of a passage's title and text; 100 words: 620.")] = 620,
    ram_gb: Annotated[float | None, typer.Option(min=0, help="Memory to use. [default: this machine's]")] = None,
    query_ms: Annotated[float, typer.Option(min=0, help="What a single query may take.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Tell what each kind of index would need on a machine like this one, and which one to take.

    Sizes are computed; times are measured on small indexes, here and now, and extrapolated: keep the machine quiet.

    **Examples**

    - `rag index plan 21_000_000`
    - `rag index plan 1_000_000 --dimension 384 --ram-gb 8 --query-ms 5`
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from retriever_svc.index.plan import choose, memory_of_machine, needs

    table = Table(title=f"{passages:,} passages of {dimension} numbers, float16, without embedding them")
    for column in ("kind", "RAM", "GPU", "page cache", "disk", "build", "a query", "recall@5, at least"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    found = []
    with _bar("measuring") as show:
        for need in needs(passages, dimension, text_bytes=text_bytes):
            found.append(need)
            show(len(found), None)
            sizes = [f"{size / 1e9:,.1f} GB" if size else "-" for size in (need.ram, need.vram, need.cached, need.disk)]
            build = f"{need.build_s / 60:,.1f} min" if need.build_s < 7200 else f"{need.build_s / 3600:,.1f} h"
            table.add_row(need.kind, *sizes, build, f"{need.query_s * 1e3:,.2f} ms", f"{need.recall:.2f}")
    memory = memory_of_machine() if ram_gb is None else ram_gb * 1e9
    chosen = choose(found, memory, query_ms / 1e3)
    if as_json:
        print_json({"kinds": [asdict(need) for need in found], "take": chosen.kind if chosen else None})
        return
    Console().print(table)
    limits = f"{memory / 1e9:,.1f} GB of RAM and {query_ms:g} ms a query"
    print(f"take {chosen.kind}: within {limits} it misses least" if chosen else f"no kind fits into {limits}")


@app.command("list")
def list_(data_dir: DataDir = Path("data"), as_json: AsJson = False) -> None:
    """The collections of the data folder, and what each generation holds.

    **Examples**

    - `rag index list --data-dir /var/lib/rag`
    - `rag index list --json | jq '.[] | select(.serves).encoder'`
    """
    from rich.console import Console
    from rich.table import Table

    from retriever_svc import generation as gen

    found = []
    table = Table("collection", "generation", "kind", "passages", "dimension", "encoder", "made")
    for pointer in sorted((data_dir / COLLECTIONS).glob(f"*/{gen.CURRENT}")):
        current = gen.current_generation(pointer.parent).name
        for folder in sorted((pointer.parent / gen.GENERATIONS).iterdir(), reverse=True):
            if folder.name.startswith("."):
                continue
            manifest = gen.read_manifest(folder)
            mark = f"{folder.name} (serves)" if folder.name == current else folder.name
            shown = (manifest.kind, f"{manifest.count:,}", str(manifest.dimension), manifest.encoder)
            table.add_row(pointer.parent.name, mark, *shown, manifest.created_at)
            fields = ("kind", "count", "dimension", "dtype", "encoder", "created_at")
            about = {"collection": pointer.parent.name, "generation": folder.name, "serves": folder.name == current}
            found.append({**about, **{field: getattr(manifest, field) for field in fields}})
    if as_json:
        print_json(found)
    else:
        Console().print(table)


@app.command()
def reload(
    name: Annotated[str, typer.Argument(help="The collection.")],
    retriever_url: RetrieverUrl = DEFAULT_RETRIEVER_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Let a retriever that runs serve what was built since it started.

    **Example**

    - `rag index reload news --api-key $ADMIN_KEY`
    """
    with connect(retriever_url, api_key, retriever_url) as client:
        found = client.reload(name)
    text = f"{found.name}: {found.count:,} passages, generation {found.generation}"
    tell(found.model_dump(), text, as_json=as_json)


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="The collection. [default: all of them]")] = None,
    data_dir: DataDir = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Read every byte of collections and compare it with its checksum; load them, and all changes since.

    **Examples**

    - `rag index verify`
    - `rag index verify news --data-dir /var/lib/rag`
    """
    from retriever_svc import generation as gen
    from retriever_svc.collection import Collection
    from shared.errors import NotFound

    found = sorted(path.parent for path in (data_dir / COLLECTIONS).glob(f"{name or '*'}/{gen.CURRENT}"))
    if not found:
        raise NotFound(f"{data_dir} holds no collection{f' `{name}`' if name else ''}")
    sound = []
    for folder in found:
        for generation in sorted((folder / gen.GENERATIONS).iterdir()):
            if not generation.name.startswith("."):
                gen.verify_files(generation, gen.read_manifest(generation))
        collection = Collection.open(folder, device="cpu")
        if not as_json:
            print(f"{folder.name}: sound, {collection.count:,} passages, {collection.applied} changes")
        sound.append({"collection": folder.name, "count": collection.count, "changes": collection.applied})
    if as_json:
        print_json(sound)


@app.command()
def snapshot(
    name: Annotated[str, typer.Argument(help="The collection.")],
    target: Annotated[str, typer.Argument(help="Folder or object-store URL (s3://…, gs://…, file://…) to copy to.")],
    data_dir: DataDir = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Copy what a collection holds now: its generation and the changes since. The service may go on.

    **Example**

    - `rag index snapshot news s3://backups/news-2026-01-31`
    """
    from retriever_svc.snapshots import save_snapshot

    with _bar("copying") as show:
        files = save_snapshot(data_dir / COLLECTIONS / name, target, show)
    found = {"collection": name, "target": target, "files": files}
    tell(found, f"{files} files copied to {target}", as_json=as_json)


@app.command()
def restore(
    source: Annotated[str, typer.Argument(help="Folder or object-store URL that `rag index snapshot` wrote.")],
    name: Annotated[str, typer.Argument(help="The collection to make; it must not be there yet.")],
    data_dir: DataDir = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Make a collection from a snapshot: all of it, verified, or nothing.

    **Example**

    - `rag index restore s3://backups/news-2026-01-31 news`
    """
    from retriever_svc.snapshots import restore_snapshot

    with _bar("copying") as show:
        files = restore_snapshot(source, _collection(data_dir, name), show)
    found = {"collection": name, "source": source, "files": files}
    tell(found, f"{files} files restored as `{name}`", as_json=as_json)


def _collection(data_dir: Path, name: str) -> Path:
    from retriever_svc.catalog import NAME
    from shared.errors import InvalidRequest

    if NAME.fullmatch(name) is None:
        raise InvalidRequest(f"{name!r} is no name for a collection (pattern {NAME.pattern})", param="name")
    return data_dir / COLLECTIONS / name


def _options(kind: str, search_params: str | None, index_file: Path | None = None) -> Any:
    from retriever_svc.build import Options

    return Options(kind=kind, search_params=_params(search_params), index_file=index_file)


def _columns(given: list[str] | None) -> dict[str, Any]:
    """Type by name, of `--metadata`."""
    columns: dict[str, Any] = {}
    for column in given or []:
        title, separator, type_ = column.rpartition("=")
        if not separator:
            raise typer.BadParameter(f"{column!r} is not of the form name=type", param_hint="--metadata")
        if type_ not in get_args(MetadataType):
            known = ", ".join(get_args(MetadataType))
            raise typer.BadParameter(
                f"{column!r}: there is no type {type_!r}; there are {known}", param_hint="--metadata"
            )
        columns[title] = type_
    return columns


def _metadata_of(given: list[str] | None) -> Any:
    """The columns as a schema; None where none are named."""
    from retriever_svc.metadata import schema_of

    return None if given is None else schema_of(_columns(given))


def _params(said: str | None) -> Any:
    from pydantic import ValidationError

    from shared.schemas import SearchParams
    from shared.validation import refusal_of

    try:
        return None if said is None else SearchParams.model_validate_json(said)
    except ValidationError as refused:
        raise refusal_of(refused, within="search_params") from None


def _space_of(checkpoint: str | None) -> str:
    from services.indexing.space import question_space
    from shared.errors import InvalidRequest

    if checkpoint is None:
        raise InvalidRequest(
            "whose space are the embeddings in? Name the RAG checkpoint in --checkpoint, or its --fingerprint"
        )
    return question_space(checkpoint)


def _is_dpr(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.index.dpr")) or any(path.glob("*.pkl"))
    return path.name.endswith(".index.dpr")


def _report(folder: Path, generation: str, *, as_json: bool) -> None:
    from retriever_svc import generation as gen

    manifest = gen.read_manifest(folder / gen.GENERATIONS / generation)
    size = sum(record.size for record in manifest.files.values()) / 1e6
    text = f"{folder.name}: {manifest.count:,} passages, {manifest.factory}, {size:,.1f} MB, generation {generation}"
    found = {"collection": folder.name, "generation": generation, "bytes": round(size * 1e6)}
    found |= {name: getattr(manifest, name) for name in ("count", "kind", "factory", "dimension", "encoder")}
    tell(found, f"{text}\na retriever that runs serves it after: rag index reload {folder.name}", as_json=as_json)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
