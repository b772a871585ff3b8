"""Tables and the picture of `make bench-build`; ``python -m benchmarks.build_tables`` puts one into docs/index.md."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

LIMIT = 0.25
ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "build.json"
DOCS = ROOT / "docs" / "index.md"
BEGINS, ENDS = "<!-- build.json -->\n", "<!-- end of build.json -->\n"
HEAD = (
    "| kind | passages | build | RAM | disk | a query, p50 | p99 | recall@5 | planned: build | RAM | disk | a query |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def deviations(cell: dict[str, Any]) -> dict[str, float]:
    """Of what was planned from what was measured, as a share of it."""
    planned = cell["planned"]
    return {
        "RAM": planned["ram"] / cell["ram_bytes"] - 1,
        "disk": planned["disk"] / cell["disk_bytes"] - 1,
        "build": planned["build_s"] / cell["build_s"] - 1,
        "query": 1e3 * planned["query_s"] / cell["p50_ms"] - 1,
    }


def worst(result: dict[str, Any]) -> str:
    """How many figures are within the limit, and which are not."""
    found = {
        f"{cell['kind']} {cell['count']:,} {name} {value:+.0%}": abs(value) <= LIMIT
        for cell in result["cells"]
        for name, value in cell["deviation"].items()
    }
    missed = ", ".join(name for name, within in found.items() if not within)
    return f"{sum(found.values())} of {len(found)}" + (f"; not {missed}" if missed else "")


def table(result: dict[str, Any]) -> str:
    """Markdown, as it stands in docs/index.md: what was measured beside what was planned, and the plan of wiki_dpr."""
    lines = [
        f"| `{cell['kind']}` | {cell['count']:,} | {_duration(cell['build_s'])} | {_size(cell['ram_bytes'])} "
        f"| {_size(cell['disk_bytes'])} | {cell['p50_ms']:.2f} ms | {cell['p99_ms']:.2f} ms "
        f"| {cell['recall'] or 0:.3f} | {_planned(cell['planned'])} |"
        for cell in sorted(result["cells"], key=lambda cell: cell["count"])
    ]
    planned = [
        f"| `{need['kind']}` | 21,000,000 | | | | | | | {_planned(need)} |" for need in result.get("wiki_dpr", [])
    ]
    return HEAD + "\n".join([*lines, *planned]) + "\n"


def plot(killed: dict[str, Any], path: Path) -> None:
    """Memory of the build over time, and where it was killed."""
    times, anonymous, mapped = zip(*killed["samples"], strict=True)
    figure, axis = plt.subplots(figsize=(9, 3.6))
    breaks = [i for i in range(1, len(times)) if times[i] - times[i - 1] > 1.5]
    for first, last in zip([0, *breaks], [*breaks, len(times)], strict=True):
        own = [value / 1e6 for value in anonymous[first:last]]
        both = [a + b / 1e6 for a, b in zip(own, mapped[first:last], strict=True)]
        axis.fill_between(
            times[first:last], both, color="#c9ccd1", linewidth=0, label="mapped files" if not first else None
        )
        axis.fill_between(times[first:last], own, color="#0f9d8f", linewidth=0, label="its own" if not first else None)
    for kill in killed["kills"]:
        axis.axvline(kill["at_s"], color="#b3261e", linewidth=1)
        says = f"SIGKILL\n{kill['stored']:,} stored\n{kill['indexed']:,} indexed"
        axis.annotate(
            says, (kill["at_s"], axis.get_ylim()[1]), (4, -4), textcoords="offset points", va="top", fontsize=8
        )
    axis.set_xlabel("seconds")
    axis.set_ylabel("RSS, MB")
    axis.set_title(f"rag index build --kind {killed['kind']}, {killed['count']:,} passages of 768 numbers", fontsize=10)
    axis.set_xlim(0)
    axis.set_ylim(0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def renewed(page: str, result: dict[str, Any]) -> str:
    """The page with this result's table between its marks."""
    before, _, rest = page.partition(BEGINS)
    _, _, after = rest.partition(ENDS)
    return f"{before}{BEGINS}{table(result)}{ENDS}{after}"


def _planned(need: dict[str, Any]) -> str:
    sizes = _size(need["ram"]), _size(need["disk"])
    return " | ".join([_duration(need["build_s"]), *sizes, f"{1e3 * need['query_s']:.2f} ms"])


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"


if __name__ == "__main__":
    DOCS.write_text(renewed(DOCS.read_text(encoding="utf-8"), json.loads(RESULT.read_bytes())), encoding="utf-8")
