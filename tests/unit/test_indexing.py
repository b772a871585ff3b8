"""Embedding a corpus: parity with transformers, resuming after a kill, and what is refused."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DPRContextEncoder,
    DPRContextEncoderTokenizer,
    DPRQuestionEncoder,
)

from retriever_svc.build import build_collection
from retriever_svc.collection import Collection
from retriever_svc.metadata import types_of
from services.demo.build import CONTEXT_ENCODER, PASSAGES
from services.indexing.corpus import Corpus, files_identity, parquet_corpus
from services.indexing.embed import embed_corpus
from services.indexing.encoder import PassageEncoder
from services.indexing.options import EncoderOptions
from services.indexing.plan import work_folder
from services.indexing.progress import EmbeddingProgress
from services.indexing.shards import shard_path
from services.indexing.source import shards_source
from shared.errors import InferenceError, InvalidRequest, StartupError
from tests.filters_data import METADATA, metadata_columns, random_metadata
from tests.published_form import publish_context_encoder
from tests.retriever_data import ENCODER
from tests.tiny_context_encoder import (
    DIMENSION,
    MAX_TOKENS,
    context_config,
    context_tokenizer,
    corpus_of,
    passages,
    save_context_encoder,
)

SHARD_ROWS = 8
COUNT = 37  # five shards, the last of them short


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these gain nothing from more, and on a busy machine the threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_context_encoder(tmp_path_factory.mktemp("context_encoder"))


@pytest.fixture(scope="module")
def options(folder: Path) -> EncoderOptions:
    return EncoderOptions(str(folder), device="cpu", batch_tokens=4 * MAX_TOKENS)


@pytest.fixture(scope="module")
def encoder(options: EncoderOptions) -> PassageEncoder:
    return PassageEncoder(options)


@pytest.fixture
def embed(options: EncoderOptions, tmp_path: Path) -> Callable[..., Any]:
    """`embed_corpus` of the tiny corpus with the tiny encoder, in this process; any argument can be another."""

    def run(into: Path = tmp_path / "work", **changes: Any) -> Any:
        arguments = {"corpus": corpus_of(passages(COUNT)), "options": options, "workers": 0, "shard_rows": SHARD_ROWS}
        arguments |= changes
        return embed_corpus(arguments.pop("corpus"), arguments.pop("options"), into, **arguments)

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def one_at_a_time(folder: Path, table: pa.Table, *, type_ids: bool = False) -> np.ndarray:
    """transformers' RAG index script, without neighbours and without padding: (B, D)."""
    model = DPRContextEncoder.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = []
    for row in table.to_pylist():
        inputs = tokenizer([row["title"]], [row["text"]], truncation=True, padding="longest", return_tensors="pt")
        names = ["input_ids", "token_type_ids"] if type_ids else ["input_ids"]
        with torch.no_grad():
            vectors.append(model(**{name: inputs[name] for name in names}).pooler_output[0].numpy())
    return np.stack(vectors)


class TestEncoder:
    def test_embeddings_are_those_of_transformers_one_passage_at_a_time(
        self, folder: Path, encoder: PassageEncoder
    ) -> None:
        table = passages(60)
        vectors = encoder.encode(table["title"].to_pylist(), table["text"].to_pylist())
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, one_at_a_time(folder, table), atol=1e-5)

    def test_a_folder_saved_with_dprs_own_tokenizer_reads_the_same(self, folder: Path, tmp_path: Path) -> None:
        DPRContextEncoder.from_pretrained(folder).save_pretrained(tmp_path)
        DPRContextEncoderTokenizer(vocab=context_tokenizer().get_vocab(), do_lower_case=True).save_pretrained(tmp_path)
        ours = PassageEncoder(EncoderOptions(str(tmp_path), device="cpu"))
        assert ours.recipe.max_tokens == MAX_TOKENS  # the position table's: this tokenizer names no length
        table = passages(9)
        tokenizer = DPRContextEncoderTokenizer.from_pretrained(tmp_path, model_max_length=MAX_TOKENS)
        model = DPRContextEncoder.from_pretrained(tmp_path).eval()
        titles, texts = table["title"].to_pylist(), table["text"].to_pylist()
        inputs = tokenizer(titles, texts, truncation=True, padding="longest", return_tensors="pt")
        with torch.no_grad():
            theirs = model(inputs["input_ids"]).pooler_output.numpy()
        np.testing.assert_allclose(ours.encode(titles, texts), theirs, atol=1e-5)

    def test_a_folder_in_the_form_of_2020_gives_the_same(
        self, options: EncoderOptions, tmp_path: Path, encoder: PassageEncoder
    ) -> None:
        publish_context_encoder(save_context_encoder(tmp_path))
        published = PassageEncoder(replace(options, name=str(tmp_path)))
        assert published.recipe == encoder.recipe
        table = passages(9)
        both = [made.encode(table["title"].to_pylist(), table["text"].to_pylist()) for made in (published, encoder)]
        np.testing.assert_array_equal(*both)

    @given(rows=st.lists(st.integers(0, 59), min_size=1, max_size=12), batch_tokens=st.integers(1, 400))
    @settings(max_examples=20)
    def test_neighbours_and_batches_change_nothing_but_rounding(
        self, folder: Path, encoder: PassageEncoder, rows: list[int], batch_tokens: int
    ) -> None:
        table = passages(60).take(rows)
        encoder._batch_tokens, before = batch_tokens, encoder._batch_tokens
        try:
            together = encoder.encode(table["title"].to_pylist(), table["text"].to_pylist())
        finally:
            encoder._batch_tokens = before
        alone = [encoder.encode([row["title"]], [row["text"]])[0] for row in table.to_pylist()]
        np.testing.assert_allclose(together, alone, atol=1e-5)

    def test_a_batch_holds_no_more_tokens_than_allowed(
        self, encoder: PassageEncoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes = []
        pooled = encoder._pooled

        def spy(ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(ids.shape))
            return pooled(ids, *others)

        monkeypatch.setattr(encoder, "_pooled", spy)
        table = passages(60)
        encoder.encode(table["title"].to_pylist(), table["text"].to_pylist())
        assert all(rows * length <= 4 * MAX_TOKENS for rows, length in shapes)
        assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
        assert sum(rows for rows, _ in shapes) == 60

    def test_the_demos_embeddings_come_out_again_with_the_segments_its_config_names(self) -> None:
        table = pq.read_table(PASSAGES).slice(100, 40)
        stored = table["embedding"].combine_chunks().flatten().to_numpy().reshape(40, -1)
        titles, texts = table["title"].to_pylist(), table["text"].to_pylist()
        vectors = PassageEncoder(EncoderOptions(str(CONTEXT_ENCODER), device="cpu"))
        np.testing.assert_allclose(vectors.encode(titles, texts), stored, atol=5e-3)

    def test_segments_are_what_the_tokenizer_says(self, folder: Path, options: EncoderOptions) -> None:
        table = passages(9)
        ours = PassageEncoder(replace(options, type_ids="segments"))
        vectors = ours.encode(table["title"].to_pylist(), table["text"].to_pylist())
        np.testing.assert_allclose(vectors, one_at_a_time(folder, table, type_ids=True), atol=1e-5)
        assert np.abs(vectors - one_at_a_time(folder, table)).max() > 0.1

    def test_half_precision_stays_close(self, options: EncoderOptions, encoder: PassageEncoder) -> None:
        table = passages(12)
        texts = table["title"].to_pylist(), table["text"].to_pylist()
        half = PassageEncoder(replace(options, dtype="bfloat16"))
        assert half.recipe.fingerprint == encoder.recipe.fingerprint
        assert half.recipe != encoder.recipe
        full = encoder.encode(*texts)
        cosine = (half.encode(*texts) * full).sum(1) / np.linalg.norm(full, axis=1) ** 2
        np.testing.assert_allclose(cosine, 1, atol=0.1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**{k: v for k, v in context_config().to_dict().items() if k != "model_type"})
    path = tmp_path_factory.mktemp("bert")
    BertModel(config).save_pretrained(path)
    context_tokenizer().save_pretrained(path)
    return path


class TestOtherEncoders:
    @pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
    def test_a_bert_is_pooled_as_named(self, bert: Path, pooling: Any) -> None:
        table = passages(9)
        titles, texts = table["title"].to_pylist(), table["text"].to_pylist()
        model = AutoModel.from_pretrained(bert).eval()
        inputs = AutoTokenizer.from_pretrained(bert)(titles, texts, truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        mask = inputs["attention_mask"].unsqueeze(-1)
        expected = {
            "cls": output.last_hidden_state[:, 0],
            "mean": (output.last_hidden_state * mask).sum(1) / mask.sum(1),
            "pooler": output.pooler_output,
        }[pooling]
        ours = PassageEncoder(EncoderOptions(str(bert), device="cpu", pooling=pooling))
        np.testing.assert_allclose(ours.encode(titles, texts), expected.numpy(), atol=1e-5)

    def test_pooling_is_not_guessed(self, bert: Path) -> None:
        with pytest.raises(StartupError, match="name its pooling, one of cls, mean, pooler"):
            PassageEncoder(EncoderOptions(str(bert), device="cpu"))

    def test_a_question_encoder_is_refused(self, tmp_path: Path) -> None:
        DPRQuestionEncoder(context_config()).save_pretrained(tmp_path)
        context_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(StartupError, match="Passages need the context encoder, not the question encoder"):
            PassageEncoder(EncoderOptions(str(tmp_path), device="cpu"))

    def test_a_folder_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StartupError, match=r"there is no encoder folder .*nowhere"):
            PassageEncoder(EncoderOptions(str(tmp_path / "nowhere"), device="cpu"))


class Stop(BaseException):
    """Ends a run where it stands, as Ctrl-C does."""


@pytest.fixture(scope="module")
def whole(options: EncoderOptions, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run leaves in its folder."""
    folder = tmp_path_factory.mktemp("whole")
    embed_corpus(corpus_of(passages(COUNT)), options, folder, workers=0, shard_rows=SHARD_ROWS)
    return content(folder)


class TestResume:
    @given(stops=st.lists(st.integers(0, 12), max_size=4), batch_rows=st.integers(1, 40), torn=st.booleans())
    @example(stops=[0, 0, 0], batch_rows=COUNT, torn=True)
    @settings(max_examples=25)
    def test_a_run_stopped_anywhere_ends_in_the_bytes_of_an_uninterrupted_one(
        self, options: EncoderOptions, whole: dict[str, bytes], stops: list[int], batch_rows: int, torn: bool
    ) -> None:
        corpus = corpus_of(passages(COUNT), batch_rows=batch_rows)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for stop in stops:
                calls = iter(range(stop))

                def progress(_done: int, _count: int, calls: Any = calls) -> None:
                    if next(calls, None) is None:
                        raise Stop

                try:
                    embed_corpus(corpus, options, folder, workers=0, shard_rows=SHARD_ROWS, progress=progress)
                except Stop:
                    assert not list(folder.glob("*.partial"))
            if torn:  # what a power cut leaves
                (folder / "shard-00001.arrow.0123abcd.partial").write_bytes(whole["shard-00001.arrow"][:99])
                (folder / "plan.json.partial").write_text("{")
            embed_corpus(corpus, options, folder, workers=0, shard_rows=SHARD_ROWS)
            assert content(folder) == whole

    def test_finished_shards_are_not_made_again(self, embed: Callable[..., Any], tmp_path: Path) -> None:
        embed()
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("shard-*")}
        shard_path(tmp_path / "work", 2).unlink()
        steps: list[tuple[int, int]] = []
        embed(progress=lambda done, count: steps.append((done, count)))
        after = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("shard-*")}
        assert {path.name for path in before if before[path] != after[path]} == {"shard-00002.arrow"}
        assert steps[0] == (COUNT - SHARD_ROWS, COUNT)
        assert steps[-1] == (COUNT, COUNT)

    @pytest.mark.parametrize("damage", [b"", b"ARROW1", None])
    def test_a_damaged_shard_is_made_again(
        self, embed: Callable[..., Any], whole: dict[str, bytes], tmp_path: Path, damage: bytes | None
    ) -> None:
        embed()
        path = shard_path(tmp_path / "work", 1)
        path.write_bytes(whole[path.name][:-40] if damage is None else damage)
        embed()
        assert content(tmp_path / "work") == whole

    @pytest.mark.slow
    def test_runs_killed_at_random_moments_end_in_the_bytes_of_an_uninterrupted_one(
        self, options: EncoderOptions, tmp_path: Path
    ) -> None:
        table, count = passages(2000), 2000
        straight, killed = tmp_path / "straight", tmp_path / "killed"
        pq.write_table(table, tmp_path / "passages.parquet")
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "from services.indexing.embed import embed_corpus\n"
            "from services.indexing.options import EncoderOptions\n"
            "from tests.tiny_context_encoder import corpus_of\n"
            "import pyarrow.parquet as pq\n"
            "if __name__ == '__main__':\n"
            "    table = pq.read_table(sys.argv[1])\n"
            f"    options = EncoderOptions({options.name!r}, device='cpu', batch_tokens={options.batch_tokens})\n"
            "    embed_corpus(corpus_of(table), options, Path(sys.argv[2]), workers=0, shard_rows=64)\n"
        )
        (tmp_path / "run.py").write_text(script)
        command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "passages.parquet")]
        # Another number of threads would round otherwise.
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        rng = random.Random(0)
        subprocess.run([*command, str(straight)], env=environment, check=True)
        command.append(str(killed))
        for shards in (0, 5, 15):  # kill after so many shards and a moment, which falls anywhere within one
            run = subprocess.Popen(command, env=environment)
            until_shards(killed, shards + 1, run)
            time.sleep(rng.random() * 0.05)
            run.kill()
            assert run.wait() == -signal.SIGKILL
        assert len(list(killed.glob("shard-*.arrow"))) < len(list(straight.glob("shard-*.arrow")))
        subprocess.run(command, env=environment, check=True)
        ours, theirs = (list(shards_source(path, ENCODER).batches) for path in (killed, straight))
        assert sum(map(len, ours)) == count
        for one, other in zip(ours, theirs, strict=True):
            assert one.equals(other)
        assert not list(killed.glob("*.partial"))


class TestWorkers:
    @pytest.mark.slow
    def test_several_workers_embed_what_one_process_does(
        self, embed: Callable[..., Any], tmp_path: Path, folder: Path
    ) -> None:
        steps: list[tuple[int, int]] = []
        embed(workers=2, dtype="float32", progress=lambda done, count: steps.append((done, count)))
        assert steps[-1] == (COUNT, COUNT)
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        batches = pa.Table.from_batches(list(shards_source(tmp_path / "work", ENCODER).clean_batches()))
        assert batches.drop_columns("embedding").to_pydict() == passages(COUNT).to_pydict()
        vectors = batches["embedding"].combine_chunks().flatten().to_numpy().reshape(COUNT, DIMENSION)
        np.testing.assert_allclose(vectors, one_at_a_time(folder, passages(COUNT)), atol=1e-5)

    @pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_metadata_goes_with_its_passage(self, embed: Callable[..., Any], tmp_path: Path, workers: int) -> None:
        metadata = metadata_columns(random_metadata(COUNT, 3))
        table = pa.table({**dict(zip(passages(1).column_names, passages(COUNT).columns, strict=True)), **metadata})
        corpus = replace(corpus_of(table), metadata=METADATA)
        plan = embed(corpus=corpus, workers=workers)
        assert plan.metadata == types_of(METADATA)
        embed(corpus=corpus)  # goes on with what is finished
        with pytest.raises(StartupError, match=r"metadata \{'year'.*\}, not \{\}"):
            embed(corpus=corpus_of(table))
        source = shards_source(tmp_path / "work", ENCODER)
        assert source.metadata == METADATA
        found = pa.Table.from_batches(list(source.clean_batches()))
        expected = {name: column.cast(METADATA.field(name).type) for name, column in metadata.items()}
        assert (
            found.select(["id", *METADATA.names]).to_pydict() == pa.table({"id": table["id"], **expected}).to_pydict()
        )

    @pytest.mark.slow
    def test_a_dead_worker_fails_the_run_and_leaves_no_process(self, embed: Callable[..., Any], tmp_path: Path) -> None:
        def progress(done: int, _count: int) -> None:
            if done == 0:
                os.kill(children()[-1], signal.SIGKILL)

        with pytest.raises(InferenceError, match=r"worker 1 died .*SIGKILL.*try fewer workers.*run again to go on"):
            embed(workers=2, progress=progress, corpus=corpus_of(passages(400)))
        assert not children()
        assert embed(corpus=corpus_of(passages(400))).count == 400

    @pytest.mark.slow
    def test_what_a_worker_refuses_is_raised_here(self, embed: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(StartupError, match="there is no encoder folder"):
            embed(workers=1, options=EncoderOptions(str(tmp_path / "nowhere"), device="cpu"))
        assert not children()

    @pytest.mark.slow
    @pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
    def test_ending_the_run_ends_its_workers(
        self, options: EncoderOptions, tmp_path: Path, sent: signal.Signals
    ) -> None:
        # So many that it cannot be done before the signal comes.
        pq.write_table(passages(60_000), tmp_path / "passages.parquet")
        script = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from services.indexing.corpus import parquet_corpus\n"
            "from services.indexing.embed import embed_corpus\n"
            "from services.indexing.options import EncoderOptions\n"
            "if __name__ == '__main__':\n"
            # A shell that starts the tests in the background has them ignore it, and so would this.
            "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"    options = EncoderOptions({options.name!r}, device='cpu')\n"
            "    corpus = parquet_corpus(Path(sys.argv[1]))\n"
            "    embed_corpus(corpus, options, Path(sys.argv[2]), workers=2, shard_rows=2000)\n"
        )
        (tmp_path / "run.py").write_text(script)
        run = subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "passages.parquet"), str(tmp_path / "work")],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        until_shards(tmp_path / "work", 1, run)
        workers = children(run.pid)
        assert len(workers) >= 2
        if sent == signal.SIGINT:
            os.killpg(run.pid, sent)  # a terminal's Ctrl-C goes to the whole group
        else:
            run.kill()
        _, errors = run.communicate(timeout=30)
        assert run.returncode in {-sent, 130}
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        if sent == signal.SIGINT:
            assert errors.count(b"Traceback") == 1  # the run's own; the workers end in silence
            assert not list((tmp_path / "work").glob("*.partial"))


def until_shards(folder: Path, count: int, run: "subprocess.Popen[bytes]") -> None:
    until(lambda: len(list(folder.glob("shard-*.arrow"))) >= count or run.poll() is not None)


def until(condition: Callable[[], bool], within_s: float = 90) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(of: int | None = None) -> list[int]:
    """Living worker processes of a process, in the order they were started."""
    pid = of or os.getpid()
    pids = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return sorted(p for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes())


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"corpus": corpus_of(passages(COUNT), identity="sha256-1")}, "corpus sha256-0, not sha256-1"),
            ({"dtype": "float32"}, "dtype float16, not float32"),
            ({"shard_rows": 9}, "shard_rows 8, not 9"),
        ],
    )
    def test_another_run_in_the_same_folder(
        self, embed: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], says: str
    ) -> None:
        embed()
        before = content(tmp_path / "work")
        with pytest.raises(StartupError, match=f"another run .{says}.*choose another folder, or remove that one"):
            embed(**changes)
        assert content(tmp_path / "work") == before

    @pytest.mark.parametrize("change", ["weights", "computes in", "type ids"])
    def test_another_encoder_in_the_same_folder(
        self, embed: Callable[..., Any], options: EncoderOptions, tmp_path: Path, change: str
    ) -> None:
        embed()
        other = {
            "weights": lambda: replace(options, name=str(save_context_encoder(tmp_path / "other", seed=1))),
            "computes in": lambda: replace(options, dtype="bfloat16"),
            "type ids": lambda: replace(options, type_ids="segments"),
        }[change]()
        says = {"weights": "fingerprint", "computes in": "dtype", "type ids": "type_ids"}[change]
        with pytest.raises(StartupError, match=rf"another run \(encoder\.{says} "):
            embed(options=other)

    def test_the_same_weights_elsewhere_are_the_same_encoder(
        self, embed: Callable[..., Any], options: EncoderOptions, tmp_path: Path
    ) -> None:
        embed()
        assert embed(options=replace(options, name=str(save_context_encoder(tmp_path / "copy")))).count == COUNT

    def test_a_folder_in_use(self, embed: Callable[..., Any], tmp_path: Path) -> None:
        with work_folder(tmp_path / "work"), pytest.raises(StartupError, match="another run is embedding into"):
            embed()

    def test_a_plan_that_cannot_be_read(self, embed: Callable[..., Any], tmp_path: Path) -> None:
        embed()
        (tmp_path / "work" / "plan.json").write_text("{}")
        with pytest.raises(StartupError, match=r"plan\.json cannot be read.*remove the folder"):
            embed()

    def test_shards_without_a_plan(self, embed: Callable[..., Any], tmp_path: Path) -> None:
        embed()
        (tmp_path / "work" / "plan.json").unlink()
        with pytest.raises(StartupError, match="shards but no plan"):
            embed()

    def test_a_plan_of_another_run_put_beside_the_shards(self, embed: Callable[..., Any], tmp_path: Path) -> None:
        embed()
        embed(into=tmp_path / "other", shard_rows=9)
        (tmp_path / "other" / "plan.json").replace(tmp_path / "work" / "plan.json")
        with pytest.raises(StartupError, match="5 of 5 shards are missing"):
            shards_source(tmp_path / "work", ENCODER)

    @pytest.mark.parametrize(
        ("column", "values", "says"),
        [
            ("id", [4, 5, 4], "id 4 is in row 0 and again in row 2"),
            ("id", [4, -5, 6], "`id` is -5 in row 1"),
            ("id", ["a", "b", "c"], "`id` must be int64, it is string"),
            ("title", ["a", None, "c"], "`title` is null in row 1"),
            ("text", [1, 2, 3], "`text` must be string, it is int64"),
            ("text", None, "must have one column `text`"),
        ],
    )
    def test_passages_that_are_not_clean_are_found_before_any_is_embedded(
        self, embed: Callable[..., Any], tmp_path: Path, column: str, values: list[Any] | None, says: str
    ) -> None:
        table = passages(3).drop_columns(column)
        if values is not None:
            table = table.append_column(column, pa.array(values))
        with pytest.raises(InvalidRequest, match=says):
            embed(corpus=corpus_of(table, batch_rows=1 if column == "title" else 5))
        assert set(content(tmp_path / "work")) == set()

    def test_no_passages(self, embed: Callable[..., Any]) -> None:
        with pytest.raises(InvalidRequest, match="no passages"):
            embed(corpus=corpus_of(passages(0)))

    def test_a_corpus_that_changes_its_length(self, embed: Callable[..., Any]) -> None:
        tables = iter([passages(COUNT), passages(COUNT - 1)])
        with pytest.raises(InvalidRequest, match="has 36 passages now, and had 37 before"):
            embed(corpus=Corpus(lambda: next(tables).to_batches(), "sha256-0"))

    def test_embeddings_that_do_not_fit_half_precision(
        self, embed: Callable[..., Any], options: EncoderOptions, tmp_path: Path
    ) -> None:
        model = DPRContextEncoder.from_pretrained(save_context_encoder(tmp_path / "wide"))
        model.ctx_encoder.encode_proj.weight.data *= 1e6
        model.save_pretrained(tmp_path / "wide")
        with pytest.raises(InferenceError, match=r"embedding of passage \d+ holds NaN or infinity as float16"):
            embed(options=replace(options, name=str(tmp_path / "wide")))


class TestSource:
    def test_a_collection_is_built_from_the_shards(
        self, embed: Callable[..., Any], tmp_path: Path, folder: Path
    ) -> None:
        embed()
        source = shards_source(tmp_path / "work", ENCODER, attribution="made up")
        assert (source.count, source.dimension, source.dtype) == (COUNT, DIMENSION, "float16")
        build_collection(tmp_path / "collection", source)
        collection = Collection.open(tmp_path / "collection", device="cpu")
        expected = one_at_a_time(folder, passages(COUNT))
        found = collection.search(expected[20:21], [1])[0]
        best = int(np.argmax(expected @ expected[20]))
        assert found.rows.tolist() == [best]
        np.testing.assert_allclose(found.embeddings[0], expected[best], atol=5e-3)
        assert collection.passage(best * 3 + 1).text == passages(COUNT)["text"][best].as_py()

    def test_an_unfinished_run_is_no_source(self, embed: Callable[..., Any], tmp_path: Path) -> None:
        embed()
        shard_path(tmp_path / "work", 3).unlink()
        with pytest.raises(StartupError, match=r"1 of 5 shards are missing .* run the embedding again"):
            shards_source(tmp_path / "work", ENCODER)

    def test_an_empty_folder_is_no_source(self, tmp_path: Path) -> None:
        with pytest.raises(StartupError, match="holds no embeddings"):
            shards_source(tmp_path, ENCODER)


class TestCorpus:
    def test_parquet_files_are_read_one_after_the_other(self, tmp_path: Path) -> None:
        table = passages(COUNT).append_column("url", pa.array(["x"] * COUNT))
        pq.write_table(table.slice(0, 20), tmp_path / "a.parquet")
        pq.write_table(table.slice(20), tmp_path / "b.parquet")
        corpus = parquet_corpus(tmp_path / "a.parquet", tmp_path / "b.parquet")
        assert pa.Table.from_batches(list(corpus.batches())).to_pydict() == passages(COUNT).to_pydict()
        assert corpus.check() == COUNT

    def test_identity_is_of_what_the_files_hold(self, tmp_path: Path) -> None:
        one, same, other = (tmp_path / name for name in ("one", "same", "other"))
        one.write_bytes(b"a")
        same.write_bytes(b"a")
        other.write_bytes(b"b")
        assert files_identity(one) == files_identity(same)
        assert len({files_identity(one), files_identity(other), files_identity(one, other)}) == 3
        with pytest.raises(InvalidRequest, match="nowhere cannot be read"):
            files_identity(tmp_path / "nowhere")


class TestProgress:
    def test_a_log_says_what_was_done_and_how_fast(self) -> None:
        console = Console(file=io.StringIO(), width=120)
        with EmbeddingProgress(console) as progress:
            progress.show(8, 20)
            progress.show(12, 20)
            progress.show(20, 20)
        lines = console.file.getvalue().splitlines()
        assert lines[0] == "8 of 20 passages are embedded already"
        assert lines[1].startswith("20 of 20 passages  ")
        assert "passages/s" in lines[1]
        assert len(lines) == 2


def test_a_plan_tells_people_what_the_folder_holds(embed: Callable[..., Any], tmp_path: Path) -> None:
    plan = embed()
    assert json.loads((tmp_path / "work" / "plan.json").read_text()) == plan.model_dump()


def test_the_side_that_only_plans_and_reads_needs_no_torch() -> None:
    code = "import sys, services.indexing.embed, services.indexing.source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
