"""The rows of a benchmark of many fits: means and standard errors over seeds, and tables of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes

from benchmarks.record import markdown_table

__all__ = ["Rows"]


class Rows:
    """The rows of a result, by what was fitted, method, size and metric.

    Args:
        result: Its `rows` have `seed`, `method`, `metric`, `value` and the two columns named below.
        fitted: Column of what was fitted, "arch" say.
        size: Column of the size at which it was scored, "width" say.
        labels: Names of the methods in tables, in their order.
        method: Column of the method.
    """

    def __init__(
        self, result: Mapping[str, Any], fitted: str, size: str, labels: Mapping[str, str], method: str = "method"
    ) -> None:
        self.values: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for row in result["rows"]:
            self.values[row[fitted], row[method], row[size], row["metric"]].append(row["value"])
        self.fitted = list(dict.fromkeys(key[0] for key in self.values))
        self.labels = {name: label for name, label in labels.items() if any(key[1] == name for key in self.values)}

    @property
    def methods(self) -> list[str]:
        """Methods that have rows."""
        return list(self.labels)

    def mean(self, *key: Any) -> float:
        """Return the mean over seeds, or NaN if there are none."""
        return mean(self.values[key]) if key in self.values else float("nan")

    def error(self, *key: Any) -> float:
        """Return the standard error of the mean over seeds."""
        values = self.values.get(key, [])
        return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0

    def cell(self, *key: Any, digits: int = 3, scale: float = 1.0) -> str:
        """Format a mean, with its error if there are several seeds, both times a scale; "-" if there is none."""
        if key not in self.values:
            return "-"
        error = f" ± {scale * self.error(*key):.{digits}f}" if len(self.values[key]) > 1 else ""
        return f"{scale * self.mean(*key):.{digits}f}{error}"

    def table(self, fitted: str, metric: str, sizes: Sequence[Any], digits: int = 3, scale: float = 1.0) -> str:
        """Format one metric, times a scale: a line a method that has it, a column a size."""
        body = []
        for method, label in self.labels.items():
            keys = [(fitted, method, size, metric) for size in sizes]
            cells = [self.cell(*key, digits=digits, scale=scale) for key in keys]
            if any(key in self.values for key in keys):
                body.append([label, *cells])
        heads = [f"{size:g}" if isinstance(size, float | int) else size for size in sizes]
        return markdown_table([metric, *heads], body)

    def draw(
        self,
        ax: Axes,
        fitted: str,
        method: str,
        metric: str,
        sizes: Sequence[Any],
        scale: float = 1.0,
        **style: Any,
    ) -> None:
        """Draw a metric of one method, times a scale, against the size: a line with a band of one standard error.

        A single size is a point with an error bar; ours is the thick line. `style` is matplotlib's.
        """
        sizes = [size for size in sizes if (fitted, method, size, metric) in self.values]
        means = [scale * self.mean(fitted, method, size, metric) for size in sizes]
        errors = [scale * self.error(fitted, method, size, metric) for size in sizes]
        style = {"color": f"C{self.methods.index(method)}", "label": self.labels[method]} | style
        if len(sizes) == 1:
            ax.errorbar(sizes, means, errors, marker="D", markersize=4, **style)
        elif sizes:
            ax.plot(sizes, means, marker="o", markersize=3, linewidth=2.5 if method == "vnd" else 1.2, **style)
            low, high = zip(*((m - e, m + e) for m, e in zip(means, errors, strict=True)), strict=True)
            ax.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)
