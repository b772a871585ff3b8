"""The picture of `make bench-retriever`: what one client gets of each system, by batch."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.retriever_cells import Figures
from benchmarks.retriever_tables import SEARCH, TAKE

mpl.use("Agg")
OURS = "#0f9d8f"
RAW = "#9aa0a6"
RIVALS = ("#c0568f", "#3b82c4")


def plot(found: Sequence[Figures], path: Path) -> None:
    """Queries a second with embeddings and passages; ours in Arrow."""
    shown = [
        one for one in found if (one.clients, one.form, one.content) == (1, "arrow", "full") and one.system != TAKE
    ]
    kinds = list(dict.fromkeys(one.kind for one in shown))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.8), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        of_kind = [one for one in shown if one.kind == kind]
        systems = sorted({one.system for one in of_kind}, key=lambda name: (name != SEARCH, name != "ours", name))
        batches = sorted({one.batch for one in of_kind})
        colours = [{SEARCH: RAW, "ours": OURS}.get(name) for name in systems]
        left = iter(RIVALS)
        for i, (name, colour) in enumerate(zip(systems, colours, strict=True)):
            rates = {one.batch: one.queries_per_s for one in of_kind if one.system == name}
            places = [batches.index(batch) + (i - (len(systems) - 1) / 2) * 0.8 / len(systems) for batch in rates]
            bars = axis.bar(places, rates.values(), 0.8 / len(systems), color=colour or next(left), label=name)
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axis.set_xlabel("queries a request")
        axis.set_title(kind, pad=24)
        axis.legend(fontsize=7, frameon=False, ncols=len(systems), loc="lower center", bbox_to_anchor=(0.5, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("queries a second, one client")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
