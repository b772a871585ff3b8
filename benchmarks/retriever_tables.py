"""Tables and verdicts of `make bench-retriever`."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.retriever_cells import Figures

SEARCH, TAKE = "raw faiss, search", "raw faiss, take"
GIB = 2**30
SINGLE_MS = 1.5
SHARES = {("flat", "full"): 0.9, ("hnsw", "full"): 0.75, ("ivf-pq", "full"): 0.75}
SHARES |= {(kind, "embeddings"): 0.9 for kind, _ in list(SHARES)}
LARGE_BATCH = 64


def of(
    found: Iterable[Figures], system: str, like: Figures, *, form: bool = True, content: bool = True
) -> Figures | None:
    """The figures of another system at the same cell; the first of its forms or contents where they do not count."""
    for one in found:
        same = (one.kind, one.batch, one.clients) == (like.kind, like.batch, like.clients)
        fits = (not form or one.form == like.form) and (not content or one.content == like.content)
        if one.system == system and same and fits:
            return one
    return None


def raw_table(found: Sequence[Figures]) -> Table:
    table = Table(
        title="served queries a second beside raw faiss",
        caption="search: faiss's ids and scores alone; take: as many hits as the service fetches over, and embeddings.",
    )
    for name in ("kind", "content", "form"):
        table.add_column(name)
    for name in (
        "batch",
        "clients",
        "ours/s",
        "p50 ms",
        "p99 ms",
        "search/s",
        "ours / search",
        "take/s",
        "ours / take",
    ):
        table.add_column(name, justify="right")
    for one in (one for one in found if one.system == "ours"):
        search, take = of(found, SEARCH, one), of(found, TAKE, one, form=False, content=False)
        table.add_row(
            one.kind,
            one.content,
            one.form,
            str(one.batch),
            str(one.clients),
            f"{one.queries_per_s:.0f}",
            f"{one.p50_ms:.2f}",
            f"{one.p99_ms:.2f}",
            *_beside(one, search),
            *_beside(one, take),
        )
    return table


def _beside(one: Figures, other: Figures | None) -> tuple[str, str]:
    if other is None:
        return "", ""
    return f"{other.queries_per_s:.0f}", f"{one.queries_per_s / other.queries_per_s:.0%}"


def single_table(found: Sequence[Figures]) -> Table:
    table = Table(title="one query, one client: milliseconds over raw faiss, client included (medians)")
    for name in ("kind", "content", "form"):
        table.add_column(name)
    for name in ("ours", "raw faiss", "over"):
        table.add_column(name, justify="right")
    for one in (one for one in found if (one.system, one.batch, one.clients) == ("ours", 1, 1)):
        raw = of(found, SEARCH, one)
        if raw is not None:
            over = one.p50_ms - raw.p50_ms
            table.add_row(one.kind, one.content, one.form, f"{one.p50_ms:.2f}", f"{raw.p50_ms:.2f}", f"{over:+.2f}")
    return table


def peer_table(found: Sequence[Figures]) -> Table:
    table = Table(
        title="beside the rivals, queries a second",
        caption="Ours in Arrow with embeddings and passages; txtai returns passages without embeddings.",
    )
    for name in ("rival", "kind of ours"):
        table.add_column(name)
    for name in ("batch", "clients", "rival/s", "ours/s", "ours / rival", "rival p50 ms", "ours p50 ms"):
        table.add_column(name, justify="right")
    for one, ours in _beside_peers(found):
        table.add_row(
            one.system,
            one.kind,
            str(one.batch),
            str(one.clients),
            f"{one.queries_per_s:.0f}",
            f"{ours.queries_per_s:.0f}",
            f"{ours.queries_per_s / one.queries_per_s:.1f}",
            f"{one.p50_ms:.2f}",
            f"{ours.p50_ms:.2f}",
        )
    return table


def _beside_peers(found: Sequence[Figures]) -> list[tuple[Figures, Figures]]:
    rivals = (one for one in found if one.system not in {"ours", SEARCH, TAKE})
    return [(one, ours) for one in rivals if (ours := of(found, "ours", one)) is not None]


def memory_table(about: Sequence[dict[str, Any]], count: int) -> Table:
    table = Table(
        title="memory at the end in GiB, also per million passages, and share of the true best that is found",
        caption="private: what cannot be dropped and read again; the rest of resident memory is files, mapped.",
    )
    for name in ("system", "kind"):
        table.add_column(name)
    for name in ("resident", "per million", "private", "per million", "recall@5"):
        table.add_column(name, justify="right")
    for one in about:
        sizes = [one["rss_bytes"] / GIB, one["private_bytes"] / GIB]
        columns = [f"{size:.2f}" for gib in sizes for size in (gib, gib / count * 1e6)]
        table.add_row(one["system"], one["kind"], *columns, f"{one['recall']:.1%}")
    return table


def verdicts(found: Sequence[Figures]) -> list[dict[str, Any]]:
    """Each target: what was found, and whether it is met."""
    judged: list[dict[str, Any]] = []
    for one in (one for one in found if one.system == "ours" and one.form == "arrow" and one.clients == 1):
        raw = of(found, SEARCH, one)
        if raw is None:
            continue
        wanted = SHARES.get((one.kind, one.content))
        if one.batch == LARGE_BATCH and wanted is not None:
            share = one.queries_per_s / raw.queries_per_s
            target = f"{one.kind}, batch {one.batch}, Arrow, {one.content}: at least {wanted:.0%} of raw faiss"
            judged.append({"target": target, "found": f"{share:.1%}", "met": share >= wanted})
        if one.batch == 1 and one.content == "full":
            over = one.p50_ms - raw.p50_ms
            target = f"{one.kind}, one query: at most {SINGLE_MS} ms over raw faiss"
            judged.append({"target": target, "found": f"{over:+.2f} ms", "met": over <= SINGLE_MS})
    beside = _beside_peers(found)
    for rival in dict.fromkeys(one.system for one, _ in beside):
        least = min(ours.queries_per_s / one.queries_per_s for one, ours in beside if one.system == rival)
        judged.append({"target": f"ahead of {rival} everywhere", "found": f"{least:.2f} x at least", "met": least > 1})
    return judged
