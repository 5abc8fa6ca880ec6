"""The plot of `minigpt bench --plot`: what a table of latencies says, as bars. matplotlib is the extra `plot`."""

import io
from collections.abc import Sequence
from typing import Any

from minigpt.errors import UsageError

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise UsageError(f"--plot needs matplotlib ({error}): install the extra `plot`, pip install '.[plot]'") from None

PANELS = {"mean_ms": "ms per token after the first", "ttft_ms": "ms until the first token"}
BAR, SLOW, INK = "#9ec5e8", "#d9822b", "#222222"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "minigpt", "font.size": 10}  # the same figures give the same file


def draw(rows: Sequence[dict[str, Any]], title: str, kind: str) -> bytes:
    """A picture of the rows of `bench.summarise`: each mean with its 95 % confidence interval, and the p95.

    Args:
        title: what was measured.
        kind: "svg" or "png".
    """
    panels = [name for name in PANELS if name in rows[0]]  # of single tokens there is but the first
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.4 + 0.55 * len(rows)), facecolor="white", layout="constrained")
        figure.suptitle(title, fontsize=11)
        for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            labels = []
            for place, row in enumerate(rows):
                mean, margin = row[name]["mean"], row[name]["margin"]
                axes.barh(place, mean, 0.62, color=BAR)
                if margin is not None:
                    axes.errorbar(mean, place, xerr=margin, color=INK, capsize=4)
                if name == "mean_ms":
                    axes.plot(row["p95_ms"], place, "|", color=SLOW, markersize=14, markeredgewidth=2)
                count = f"{row['stages']} stage{'s' if row['stages'] > 1 else ''}"
                labels.append(f"{count}\n{mean:.2f}" + (f" ± {margin:.2f}" if margin is not None else ""))
            axes.set_xlabel(PANELS[name] + (" (orange: p95)" if name == "mean_ms" else ""))
            axes.set_yticks(range(len(rows)), labels)
            axes.invert_yaxis()
            axes.set_xlim(left=0)
            axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()
