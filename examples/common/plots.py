"""The colours and the style of all pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

# Apart in hue and in lightness, so also for colour-blind readers and in grey.
BLACK, BLUE, SKY, ORANGE = "#222222", "#0072b2", "#56b4e9", "#e08a00"
GREEN = "#009e73"
GREY = "#888888"  # of what the curves are compared with

matplotlib.rcParams.update(
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
)

Epochs = Sequence[Mapping[str, float]]  # what each epoch of a run measured


@dataclass(frozen=True)
class Curve:
    """How the table and the picture show one optimizer; dashed is with Lookahead."""

    label: str
    color: str
    dashed: bool = False

    @property
    def line(self) -> str:
        """Its style in Matplotlib's words."""
        return "--" if self.dashed else "-"


def draw_measure(
    axes: Axes,
    key: str,
    label: str,
    runs: Mapping[str, Sequence[Epochs]],
    curves: Mapping[str, Curve],
    over: str = "epoch",
) -> None:
    """Draw what each epoch measured: the mean over seeds, and thinly every seed.

    Over the epochs, or over the seconds of training ("trained_seconds"), also means.
    """
    for name, seeds in runs.items():
        curve = curves[name]
        numbers = np.mean([[epoch[over] for epoch in epochs] for epochs in seeds], 0)
        values = np.array(
            [[epoch[key] for epoch in epochs] for epochs in seeds], dtype="float64"
        )
        axes.plot(
            numbers,
            values.mean(axis=0),
            curve.line,
            color=curve.color,
            label=curve.label,
            linewidth=2,
            marker="o",
            markersize=5,
            markerfacecolor="white" if curve.dashed else curve.color,
        )
        if len(seeds) > 1:  # behind the mean
            axes.plot(
                numbers, values.T, curve.line, color=curve.color, lw=0.7, alpha=0.5
            )
    axes.set_ylabel(label)
    if over == "epoch":
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0.8, len(numbers) + 0.2)
    else:
        axes.set(xscale="log", xlabel="seconds of training (log scale)")
        axes.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend of one of a figure's axes below all of them."""
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) < 5 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
