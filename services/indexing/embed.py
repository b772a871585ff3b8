"""Embeds a corpus into a work folder, going on where an earlier run was stopped."""

from collections.abc import Callable
from pathlib import Path

from retriever_svc.metadata import types_of
from services.indexing.corpus import Corpus, passages_of
from services.indexing.options import EmbeddingDtype, EncoderOptions, EncoderRecipe
from services.indexing.plan import Plan, check_same, clear_partial, read_plan, work_folder, write_plan
from services.indexing.shards import missing_shards
from services.indexing.workers import InProcess, WorkerPool
from shared.errors import StartupError

SHARD_ROWS = 8192

Progress = Callable[[int, int], None]
"""Called with the passages embedded so far, those of earlier runs included, and the number of all."""


def embed_corpus(
    corpus: Corpus,
    options: EncoderOptions,
    folder: Path,
    *,
    workers: int = 1,
    dtype: EmbeddingDtype = "float16",
    shard_rows: int = SHARD_ROWS,
    progress: Progress | None = None,
) -> Plan:
    """Embed what is missing in `folder`, and return the plan that it follows.

    `workers` processes share the cores, each with an encoder of its own (0: this process does it all). The memory
    holds ``workers + 1`` shards and as many encoders, however long the corpus is. A run that was stopped in any way is
    finished by calling this again with the same arguments; `workers`, the device and the size of the batches may
    be others, and change the embeddings by rounding at most.

    Raises:
        StartupError: the encoder cannot be loaded, or `folder` is in use or holds another run.
        InvalidRequest: the passages are not clean.
        InferenceError: a worker failed or died, or an embedding is not finite.
    """
    with work_folder(folder):
        try:
            with WorkerPool(options, workers, folder) if workers else InProcess(options, folder) as embedder:
                plan = _settle_plan(folder, corpus, embedder.recipe, dtype, shard_rows)
                missing = missing_shards(folder, plan)
                done = plan.count - sum(len(plan.rows_of(shard)) for shard in missing)
                report = progress or (lambda _done, _count: None)
                report(done, plan.count)
                for rows in embedder.embed(plan, passages_of(corpus, plan, missing)):
                    done += rows
                    report(done, plan.count)
        finally:
            clear_partial(folder)
    return plan


def _settle_plan(folder: Path, corpus: Corpus, encoder: EncoderRecipe, dtype: EmbeddingDtype, shard_rows: int) -> Plan:
    found, metadata = read_plan(folder), types_of(corpus.metadata)
    if found is not None:
        given = {"corpus": corpus.identity, "dtype": dtype, "shard_rows": shard_rows, "metadata": metadata}
        check_same(folder, found, encoder=encoder, **given)
        return found
    if any(folder.glob("shard-*.arrow")):
        raise StartupError(f"{folder} has shards but no plan that tells what they hold: choose another folder")
    plan = Plan(
        corpus=corpus.identity,
        count=corpus.check(),
        encoder=encoder,
        dtype=dtype,
        shard_rows=shard_rows,
        metadata=metadata,
    )
    write_plan(folder, plan)
    return plan
