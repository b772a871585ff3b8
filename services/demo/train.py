"""Makes the demo checkpoint from nothing: tokenizers, a DPR pair and a BART reader, side by side on two cores.

    python -m services.demo.train

An interrupted run goes on where it was when started again. Seeds and numbers of steps are fixed.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from generator_svc.contexts import context_text, question_form
from services.demo.build import CHECKPOINT, CONTEXT_ENCODER, build_passages
from services.demo.corpus import Passage, build_corpus
from services.demo.evaluate import evaluate_demo, print_report
from services.demo.facts import Entity, load_entities
from services.demo.mixture import Mixture
from services.demo.questions import question_set
from services.demo.synthetic import ExampleStream
from services.training.assemble import save_context_encoder, save_rag_checkpoint
from services.training.checkpoint import load_trained
from services.training.loop import train
from services.training.progress import ProgressBoard
from services.training.reader import ReaderTask, new_reader
from services.training.retriever import RetrievalDev, RetrieverTask, new_dpr_pair
from services.training.schedule import Schedule
from services.training.tokenizers import train_encoder_tokenizer, train_reader_tokenizer

WORK = Path("data/training")
SCHEDULES = {
    "retriever": Schedule(steps=3200, warmup=200, plateau=0.15),
    "reader": Schedule(steps=6000, warmup=300, plateau=0.4),
}
SEED = 0


@dataclass(frozen=True)
class Materials:
    """Everything that both trainings start from."""

    entities: Sequence[Entity]
    passages: Sequence[Passage]
    encoder_tokenizer: PreTrainedTokenizerFast
    reader_tokenizer: PreTrainedTokenizerFast
    digest: str
    """A resumed run must find the same."""

    @classmethod
    def prepare(cls, work: Path) -> "Materials":
        """Build the corpus and load the tokenizers in `work`, training them first if they are not there."""
        entities = load_entities()
        passages = build_corpus(entities)
        folders = work / "encoder_tokenizer", work / "reader_tokenizer"
        if not all(folder.exists() for folder in folders):
            texts = list(_training_texts(entities, passages))
            train_encoder_tokenizer(texts).save_pretrained(folders[0])
            train_reader_tokenizer(texts).save_pretrained(folders[1])
        loaded: list[Any] = [AutoTokenizer.from_pretrained(folder) for folder in folders]
        return cls(entities, passages, loaded[0], loaded[1], digest=_digest(passages, loaded))

    def mixture(self) -> Mixture:
        """The source of training examples; names are made of both vocabularies' tokens too."""
        words, pieces = vocabulary_names(self.encoder_tokenizer, self.reader_tokenizer)
        return Mixture(self.entities, ExampleStream(self.entities, words, pieces), self.encoder_tokenizer)


def _digest(passages: Sequence[Passage], tokenizers: Sequence[PreTrainedTokenizerFast]) -> str:
    """Names what a run depends on besides its schedule. Taken of fresh tokenizers: using one changes its state."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(f"{passage.title}\n{passage.text}\n".encode())
    for tokenizer in tokenizers:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def vocabulary_names(
    encoder_tokenizer: PreTrainedTokenizerFast, reader_tokenizer: PreTrainedTokenizerFast
) -> tuple[list[str], list[str]]:
    """Tokens that begin a word, and tokens that go on with one: a name that is one token must be copied as well."""
    reader, encoder = reader_tokenizer.get_vocab(), encoder_tokenizer.get_vocab()
    starts = [token[1:] for token in reader if token.startswith("Ġ") and len(token) > 3]
    starts += [token for token in encoder if token.isalpha() and len(token) > 2]
    inner = [token for token in reader if token.islower() and len(token) > 1]
    inner += [token[2:] for token in encoder if token.startswith("##")]
    words = sorted({token for token in starts if token.isascii() and token.isalpha()})
    pieces = sorted({token for token in inner if token.isascii() and token.isalpha()})
    return words, pieces


def train_one(name: str, work: Path, steps: int | None = None) -> None:
    """Run one of the two trainings in this process, reporting on standard output as JSON lines."""
    torch.set_num_threads(1)
    materials = Materials.prepare(work)
    mixture = materials.mixture()
    task: RetrieverTask | ReaderTask
    if name == "retriever":
        task = RetrieverTask(materials.encoder_tokenizer, mixture.pairs, _retrieval_dev(materials), seed=SEED)
    else:
        task = ReaderTask(materials.reader_tokenizer, mixture.readings, _reading_dev(materials), seed=SEED)
    train(
        task,
        _schedule(name, steps),
        work / name,
        lambda event: print(json.dumps(event), flush=True),
        seed=SEED,
        recipe={"materials": materials.digest},
    )


def train_demo(work: Path = WORK, steps: int | None = None) -> None:
    """Train both models, write checkpoint, context encoder and embedded passages, and measure the result.

    Args:
        work: where states are kept meanwhile.
        steps: of each training, instead of the full number (to try things out).
    """
    materials = Materials.prepare(work)  # here first: both trainings need the tokenizers
    with ProgressBoard(list(SCHEDULES)) as board, ThreadPoolExecutor() as threads:
        runs = [threads.submit(_run_child, name, work, steps, board) for name in SCHEDULES]
        for run in runs:
            run.result()
    assemble(materials, work)
    board.console.print(f"{build_passages()} passages embedded")
    print_report(evaluate_demo(), board.console)


def assemble(
    materials: Materials, work: Path, checkpoint: Path = CHECKPOINT, context_encoder_folder: Path = CONTEXT_ENCODER
) -> None:
    """Write the trained models, finished or not, in transformers' format."""
    question_encoder, context_encoder = new_dpr_pair(len(materials.encoder_tokenizer))
    pair = torch.nn.ModuleDict({"question": question_encoder, "context": context_encoder})
    reader = new_reader(len(materials.reader_tokenizer))
    load_trained(work / "retriever", pair)
    load_trained(work / "reader", reader)
    save_rag_checkpoint(checkpoint, question_encoder, reader, materials.encoder_tokenizer, materials.reader_tokenizer)
    save_context_encoder(context_encoder_folder, context_encoder, materials.encoder_tokenizer)


def _run_child(name: str, work: Path, steps: int | None, board: ProgressBoard) -> None:
    """One training in a process of its own. One thread each: two that share the cores would only wait."""
    command = [sys.executable, "-m", "services.demo.train", "--only", name, "--work", str(work)]
    if steps is not None:
        command += ["--steps", str(steps)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Keep freed tensors in the heap: handing them back and faulting them in again costs a tenth of the time.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:  # noqa: S603
        for line in child.stdout or ():
            board.show(name, json.loads(line))
    if child.returncode != 0:
        raise RuntimeError(f"training of the {name} ended with code {child.returncode}")


def _training_texts(entities: Sequence[Entity], passages: Sequence[Passage]) -> Iterator[str]:
    """What the tokenizers are trained on: passages and questions of the train split, and invented ones."""
    rng, stream = random.Random(SEED), ExampleStream(entities)
    for passage in passages:
        entity = entities[passage.entity]
        if entity.split == "train":
            yield from (passage.title, passage.text, stream.example(rng, entity).question)
    for _ in range(15_000):
        example = stream.example(rng, stream.entity(rng), 3)
        yield from (example.question, example.text)


def _retrieval_dev(materials: Materials) -> RetrievalDev:
    questions = question_set(materials.entities, materials.passages, "dev", 400, seed=SEED)
    return RetrievalDev(
        [(passage.title, passage.text) for passage in materials.passages],
        [question.text for question in questions],
        [question.gold for question in questions],
    )


def _reading_dev(materials: Materials) -> list[tuple[str, str]]:
    """Contexts with the right passage, and their answers."""
    readings = []
    for question in question_set(materials.entities, materials.passages, "dev", 300, seed=SEED):
        passage = materials.passages[question.gold[0]]
        asked = question_form(question.text, materials.encoder_tokenizer)
        readings.append((context_text(passage.title, passage.text, asked), question.answer))
    return readings


def _schedule(name: str, steps: int | None) -> Schedule:
    full = SCHEDULES[name]
    return full if steps is None else Schedule(steps, full.peak, full.warmup, full.plateau)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint from nothing.")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder for the state of the run (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="steps of each training, to try things out")
    parser.add_argument("--only", choices=list(SCHEDULES), help="run one training in this process, nothing else")
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own, for every file it reads
    if options.only:
        train_one(options.only, options.work, options.steps)
    else:
        train_demo(options.work, options.steps)


if __name__ == "__main__":
    _main()
