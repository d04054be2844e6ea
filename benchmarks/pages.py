"""Write the benchmarks' figures and pictures into the pages of the documentation.

`python -m benchmarks.pages` reads `benchmarks/results/*/benchmarks.json` and the files
in the folders `device`, `gpu`, `insight`, `reliability` and `tpu` beside those.
`--check` says whether the pages have the figures that are there. A line that no run has
measured stands there as such.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks._goals import TITLES, Goal, Sizes, goals
from benchmarks.reliability import _table
from examples.common.plots import BLACK, BLUE, Curve, legend
from experiments import _pages
from experiments._pages import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "step-time.png"
FIT_PICTURE = ROOT / "docs" / "images" / "fit-time.png"
FIT_CURVES = {
    "Adam": Curve("Adam", BLACK),
    "Lazy decay": Curve("LazyOptimizer(Adam)", BLUE),
}

MISSING = "not measured"
# Parts of `benchmarks.device` that take no times.
CHECKS = ("correct", "stops", "same_bits")
# The lines of a table by their names, with `{place}` where there is one for each.
FIT = (
    ("fit-adam-{place}", "Adam / LazyOptimizer(Adam), 10^6 rows"),
    ("fit-small-{place}", "LazyOptimizer(Adam) / Adam, 10^4 rows"),
    ("fit-decay-scale-{place}", "LazyOptimizer, 10^6 rows / 10^5 rows"),
    ("fit-freeze-scale-{place}", 'the same, `moments="freeze"`'),
    ("fit-decay-big-{place}", "LazyOptimizer, 10^7 rows / 10^6 rows"),
    ("fit-freeze-big-{place}", 'the same, `moments="freeze"`'),
    ("fit-huge-{place}", "LazyOptimizer, 10^8 rows of 8 / 10^6 rows of 8"),
    (
        "fit-wide-{place}",
        "Adam / LazyOptimizer(Adam), 793,471 rows of 512 (keras issue 4365)",
    ),
    ("fit-lookahead-{place}", "Lookahead(LazyOptimizer) / LazyOptimizer"),
    ("fit-imported-{place}", "Adam, package in use / package not imported"),
    ("fit-memory-{place}", "memory that grows with the table, in table sizes"),
    ("fit-tfa", "LazyOptimizer / tfa LazyAdam"),
    ("fit-bare", "LazyOptimizer / LazyAdam's operations, same TensorFlow"),
    ("fit-torch-loop", "LazyOptimizer / SparseAdam in a plain loop"),
)
SETUPS = tuple(
    (f"fit-setups-{name}{scale}-{{place}}", f"{label}{of}")
    for name, label in (
        ("bfloat16", "`mixed_bfloat16`"),
        ("float16", "`mixed_float16`"),
        ("accumulation", "`gradient_accumulation_steps=4`"),
        ("clipping", "`global_clipnorm`"),
        ("activity", "`activity_regularizer=L2`"),
        ("compiled", "`jit_compile=True`"),
        ("mirrored", "`MirroredStrategy`, 2 replicas"),
        ("mirrored-float16", "the same with `mixed_float16`"),
        ("mirrored-clipping", "`MirroredStrategy` with `global_clipnorm`"),
        ("data-parallel", "`DataParallel`, 2 devices"),
        ("model-parallel", "`ModelParallel`, 2 devices, a table in two halves"),
        ("ema", "`use_ema=True`"),
        ("regularizer", "`embeddings_regularizer=L2`"),
    )
    for scale, of in (("", ""), ("-scale", ", 10^6 rows / 10^5"))
)
DLRM = (
    ("fit-dlrm-{place}", "Adam / LazyOptimizer(Adam)"),
    ("fit-dlrm-first-lazy-{place}", "first step, LazyOptimizer(Adam) / Adam"),
    (
        "fit-dlrm-first-lookahead-{place}",
        "first step, Lookahead(LazyOptimizer(Adam)) / Adam",
    ),
    ("fit-dlrm-torch-loop", "LazyOptimizer(Adam) / SparseAdam in a plain loop"),
)
LAZY_STEPS = (
    ("lazy-adam", "Adam / LazyOptimizer, 10^6 rows"),
    ("lazy-decay-scale", "LazyOptimizer, 10^6 rows / 10^4 rows"),
    ("lazy-freeze-scale", 'the same, `moments="freeze"`'),
    ("lazy-decay-tfa", "LazyOptimizer / tfa LazyAdam"),
    ("lazy-freeze-tfa", 'the same, `moments="freeze"`'),
    ("lazy-decay-bare", "LazyOptimizer / LazyAdam's operations, same TensorFlow"),
    ("lazy-freeze-bare", 'the same, `moments="freeze"`'),
    ("lookahead-lazy", "Lookahead(LazyOptimizer) / LazyOptimizer"),
    ("lazy-decay-dense-{place}", "LazyOptimizer / Adam, dense gradient"),
    ("lazy-freeze-dense-{place}", 'the same, `moments="freeze"`'),
)
LOOKAHEAD_STEPS = (
    ("lookahead-adam-{place}", "Lookahead(Adam) / Adam"),
    ("lookahead-sgd-{place}", "Lookahead(SGD) / SGD"),
    ("outer-adam-{place}", "Lookahead(Adam) with an outer SGD with momentum / Adam"),
)
MEMORY = (
    (
        "memory-lookahead-{place}",
        "Lookahead(Adam) minus Adam, in copies of the weights",
    ),
    ("memory-lazy-{place}", "LazyOptimizer minus Adam, in bytes per table row"),
)
FIRST_STEPS = (
    ("first-lookahead-{place}", "Lookahead(Adam) / Adam"),
    ("first-lazy-{place}", "LazyOptimizer / Adam"),
)
SHORT = (
    ("fit-adam-graph", "Adam / LazyOptimizer(Adam), table of 10^6 x 64, TensorFlow"),
    ("fit-adam-jax", "the same on JAX"),
    ("fit-adam-torch", "the same on PyTorch"),
    (
        "fit-decay-scale-graph",
        "LazyOptimizer(Adam), 10^6 rows / 10^5 rows, TensorFlow",
    ),
    ("fit-torch-loop", "LazyOptimizer(Adam) / SparseAdam in a plain PyTorch loop"),
    ("fit-lookahead-jax", "Lookahead(LazyOptimizer(Adam)) / LazyOptimizer(Adam), JAX"),
)


def lines() -> dict[str, dict[str, Any]]:
    """Every line that a run has measured, by its name."""
    return {goal["name"]: goal for report in _reports() for goal in report["goals"]}


def ratios(chosen: Sequence[tuple[str, str]]) -> Table:
    """Lines by what they compare, a column for each place."""
    table = [["what is compared", *TITLES.values(), "other packages"]]
    for pattern, label in chosen:
        by_place = {goals_by_name()[name].where: name for name in names(pattern)}
        cells = [
            _measured(by_place[place]) if place in by_place else ""
            for place in TITLES.values()
        ]
        peers = [peer for name in by_place.values() for peer in _peers(name)]
        table.append([label, *cells, ", ".join(peers)])
    return table


@cache
def goals_by_name() -> dict[str, Goal]:
    """Every line that can be measured."""
    return {goal.name: goal for goal in goals(Sizes())}


def names(pattern: str) -> list[str]:
    """The lines of a pattern, one a place."""
    by_place = dict.fromkeys(pattern.format(place=place) for place in TITLES)
    return [name for name in by_place if name in goals_by_name()]


def short() -> Table:
    """Write the few ratios that matter most."""
    table = [["time per `fit` step: the first / the second", "ratio"]]
    for name, label in SHORT:
        peers = _peers(name)
        table.append([label, " ".join([_measured(name), *(f"({p})" for p in peers)])])
    return table


def fit_times() -> Table:
    """Whole steps of `fit` in milliseconds, and their ratios."""
    table = [["where", "Adam, ms", "LazyOptimizer(Adam), ms", "ratio"]]
    for name in names("fit-adam-{place}"):
        medians = _medians(name)
        table.append([goals_by_name()[name].where, *medians, _measured(name)])
    return table


def measured() -> Table:
    """Every line, for the pages to cite a cell of it."""
    table = [["line", "measured", "over", "under", "peers"]]
    table += [
        [name, _measured(name), *_medians(name), ", ".join(_peers(name))]
        for name in goals_by_name()
    ]
    return table


def step_times() -> Table:
    """The points of the picture: the optimizer's step in milliseconds."""
    points = [point for report in _reports() for point in report["step_time"]]
    sizes = sorted({point["problem"]["vocabulary"] for point in points})
    table = [["rows of the table", *(f"{size:,}" for size in sizes)]]
    for variant in dict.fromkeys(point["variant"] for point in points):
        times = {
            point["problem"]["vocabulary"]: _figure(point["measured"])
            for point in points
            if point["variant"] == variant
        }
        table.append([variant, *(times.get(size, MISSING) for size in sizes)])
    return table


def insight() -> Table:
    """Compare what the callback does when an epoch ends with a training step."""
    table = [["backend", "end of an epoch, ms", "training step, ms", "ratio"]]
    for path in sorted((RESULTS / "insight").glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        times = (report[name] for name in ("epoch_end_ms", "step_ms", "steps"))
        table.append([report["environment"]["backend"], *map(_figure, times)])
    return table


def tpu() -> Table:
    """What the TPU compiler says that a step needs, a chip."""
    headings = ("state, MB", "temporaries, MB", "of table", "between chips, MB")
    table = [["table", "for", "dtypes", "optimizer", *headings]]
    for program in compiled("tpu"):
        chips, temporaries = program["devices"], program["temporary_bytes"]
        table.append(
            [
                f"{program['vocabulary']:.0e} x {program['width']}",
                f"{chips} chip{'s' * (chips > 1)}",
                program["policy"],
                program["optimizer"],
                f"{program['state_bytes'] / 1e6:,.0f}",
                f"{temporaries / 1e6:,.1f}",
                f"{100 * temporaries / program['table_bytes']:.1f} %",
                f"{program['bytes_crossing'] / 1e6:,.1f}",
            ]
        )
    return table


def gpu() -> Table:
    """What the GPU compiler says that a step needs and waits for, a GPU."""
    headings = ("temporaries of table", "host stops", "launches", "between GPUs, MB")
    table = [["for", "dtypes", "optimizer", *headings]]
    for program in compiled("gpu"):
        temporaries = program["temporary_bytes"] / program["table_bytes"]
        table.append(
            [
                program["place"],
                program["policy"],
                program["optimizer"],
                f"{100 * temporaries:.1f} %",
                str(program["host_stops"]),
                str(program["launches"]),
                f"{program['bytes_crossing'] / 1e6:,.1f}",
            ]
        )
    return table


def device_times(report: dict[str, Any]) -> Table:
    """Steps of `fit` that `benchmarks.device` has timed, and their memory."""
    headings = ("a step, ms", "peak memory, GB", "form")
    table = [["backend", "rows x width", "dtypes", "optimizer", *headings]]
    for part in report["parts"]:
        for found in part["results"] if part["part"] == "fit" else ():
            peak = found.get("peak_bytes")
            table.append(
                [
                    part["backend"],
                    f"{found['vocabulary']:.0e} x {part['width']}",
                    found["policy"],
                    found["optimizer"],
                    _figure(found.get("ms")),
                    _figure(peak / 1e9 if peak else None),
                    _forms(found),
                ]
            )
    return table


def device_recommender(report: dict[str, Any]) -> Table:
    """Steps of DLRM that `benchmarks.device` has timed."""
    table = [["backend", "optimizer", "a step, ms", "first steps, s", "forms"]]
    table += [
        [
            part["backend"],
            found["optimizer"],
            _figure(found.get("ms")),
            _figure(found.get("first_s")),
            _forms(found),
        ]
        for part in report["parts"]
        for found in (part["results"] if part["part"] == "recommender" else ())
    ]
    return table


def _forms(found: dict[str, Any]) -> str:
    """How the tables' steps worked, without reasons, or why there was none."""
    forms = {form.partition(":")[0] for form in found.get("step_forms", ())}
    return ", ".join(sorted(forms)) or found.get("reason", "")


def device_checks(report: dict[str, Any]) -> Table:
    """What `benchmarks.device` has found beside times, an optimizer a line."""
    columns = {
        "error": ("error against float64", "{:.1e}".format),
        "copies_to_host": ("copies to the host, a step", _figure),
        "same": ("same bits twice", lambda same: "yes" if same else "no"),
    }
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for part in report["parts"]:
        for result in part["results"] if part["part"] in CHECKS else ():
            found.setdefault((part["backend"], result["optimizer"]), {}).update(result)
    table = [["backend", "optimizer", *(title for title, _ in columns.values())]]
    for key, result in found.items():
        cells = [
            write(result[name]) if name in result else MISSING
            for name, (_, write) in columns.items()
        ]
        table.append([*key, *cells])
    return table


def on_device(table_of: Callable[[dict[str, Any]], Table]) -> Table:
    """A table of what was measured on a GPU."""
    path = RESULTS / "device" / "device.json"
    return table_of(json.loads(path.read_text(encoding="utf-8")))


def compiled(target: str) -> list[dict[str, Any]]:
    """The programs that were compiled for devices that were not there."""
    path = RESULTS / target / f"{target}.json"
    return json.loads(path.read_text(encoding="utf-8"))["programs"]


TABLES: _pages.Tables = {
    "costs-short": short,
    "fit": partial(ratios, FIT),
    "setups": partial(ratios, SETUPS),
    "dlrm": partial(ratios, DLRM),
    "fit-times": fit_times,
    "lazy-steps": partial(ratios, LAZY_STEPS),
    "lookahead-steps": partial(ratios, LOOKAHEAD_STEPS),
    "memory": partial(ratios, MEMORY),
    "first-steps": partial(ratios, FIRST_STEPS),
    "step-times": step_times,
    "measured": measured,
    "insight": insight,
    "tpu": tpu,
    "gpu": gpu,
    "device-times": partial(on_device, device_times),
    "device-recommender": partial(on_device, device_recommender),
    "device-checks": partial(on_device, device_checks),
    "reliability": _table.answers,
    "reliability-notes": _table.notes,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check; return the exit status."""
    parser = argparse.ArgumentParser("pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    docs = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    differing = _pages.write(docs, TABLES, check)
    picture = RESULTS / "steps" / "step_time.png"
    if not check:
        if picture.exists():  # after a new run
            picture.replace(PICTURE)
        draw_fit_times(FIT_PICTURE)
    return differing


def draw_fit_times(path: Path) -> None:
    """Draw whole steps of `fit` against the rows of the table, for each place."""
    figure = Figure(figsize=(7, 5.5))
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, place in zip(panels.flat, TITLES, strict=True):
        for optimizer, curve in FIT_CURVES.items():
            times = fit_medians(optimizer, place)
            axes.plot(
                list(times),
                list(times.values()),
                color=curve.color,
                label=curve.label,
                linewidth=2,
                marker="o",
                markersize=5,
            )
        axes.set(xscale="log", yscale="log", title=TITLES[place])
    for axes in panels[1]:
        axes.set_xlabel("rows of the table, of 64 numbers")
    figure.supylabel("a step of fit, 4096 look-ups (ms)")
    legend(figure, panels[0, 0])
    figure.savefig(path, dpi=150)


def fit_medians(optimizer: str, place: str) -> dict[int, float]:
    """Milliseconds of a step of `fit` by rows of the table, the median over lines."""
    found: dict[int, list[float]] = {}
    for name, line in lines().items():
        is_time = name.startswith("fit-") and not name.startswith("fit-memory")
        if not (is_time and name.endswith(f"-{place}")):
            continue
        for part in line["parts"].values():
            if (
                part["variant"].startswith(f"{optimizer} (")
                and part["problem"]["width"] == Sizes().lookups(1, sparse=False).width
            ):
                size = part["problem"]["vocabulary"]
                found.setdefault(size, []).append(part["median"])
    return {size: statistics.median(found[size]) for size in sorted(found)}


@cache
def _reports() -> list[dict[str, Any]]:
    paths = sorted(RESULTS.glob("*/benchmarks.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _measured(name: str) -> str:
    return _figure(lines().get(name, {}).get("measured"))


def _peers(name: str) -> list[str]:
    peers = lines().get(name, {}).get("peers", {})
    return [f"{peer}: {_figure(each['measured'])}" for peer, each in peers.items()]


def _medians(name: str) -> list[str]:
    parts = lines().get(name, {}).get("parts", {})
    return [_figure(parts.get(part, {}).get("median")) for part in ("over", "under")]


def _figure(value: float | None) -> str:
    if value is None:
        return MISSING
    value = round(value, 2) + 0.0  # no minus before a zero
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
