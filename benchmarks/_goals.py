"""What is measured: every ratio that the project claims, its goal, its peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from benchmarks._measure import Bench, Figure, Variant
from benchmarks.workers._problem import Problem
from examples.recommender.criteo import SIZES

K = 5
# Where Keras's optimizers run: the worker, the mode, and what it is called.
GRAPH = ("tensorflow", "graph")
JIT = ("tensorflow", "jit")
JAX = ("jax", "jit")
TORCH = ("torch", "eager")
TFA = ("tfa", "graph")
PLACES = {"graph": GRAPH, "jit": JIT, "jax": JAX, "torch": TORCH}
TITLES = {"graph": "TF graph", "jit": "TF jit", "jax": "JAX jit", "torch": "torch"}

Measure = Callable[[Bench], Figure]


@dataclasses.dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        name: to choose it by on the command line.
        what: what is compared, in words.
        where: the backend and how it runs.
        measure: measures it.
        limit: what it should not exceed; `None` where nothing was set.
        is_floor: `limit` is what it should reach, instead.
        peers: the same of other libraries, by their names.
    """

    name: str
    what: str
    where: str
    measure: Measure
    limit: float | None = None
    is_floor: bool = False
    peers: dict[str, Measure] = dataclasses.field(default_factory=dict)

    def is_met(self, value: float) -> bool | None:
        """Whether a measured value reaches the goal."""
        if self.limit is None:
            return None
        return value >= self.limit if self.is_floor else value <= self.limit


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the problems, those of the goals by default.

    Attributes:
        huge_table, big_table, table, medium_table, small_table: rows of the embedding
            tables.
        huge_width: columns of a table that has as many rows as memory allows.
        wide_table: rows of the table of keras issue 4365.
        wide_width: its columns.
        wide_rows: lookups a step there, 20 words in each of 128 texts.
        rows: lookups a step.
        draw: how rows are drawn, see `Problem`.
        matrices, matrix: the dense weights, 21 million.
        layers: number of small weights where the first step is measured.
        gpu_matrices, gpu_matrix: the dense weights on a GPU, 100 million.
        tables: rows of DLRM's tables, those of Criteo's categories, at most 10^6.
        clicks: its batch size.
        vocabularies: of the plot.
    """

    huge_table: int = 10**8
    huge_width: int = 8
    wide_table: int = 793_471
    wide_width: int = 512
    wide_rows: int = 2560
    big_table: int = 10**7
    table: int = 10**6
    medium_table: int = 10**5
    small_table: int = 10**4
    rows: int = 4096
    draw: str = "uniform"
    matrices: int = 7
    matrix: tuple[int, int] = (3000, 1000)
    layers: int = 50
    gpu_matrices: int = 10
    gpu_matrix: tuple[int, int] = (10_000, 1000)
    tables: tuple[int, ...] = SIZES
    clicks: int = 2048
    vocabularies: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7)

    def lookups(self, vocabulary: int, sparse: bool) -> Problem:
        """A table with a gradient in some rows."""
        return Problem(vocabulary, rows=self.rows, draw=self.draw, sparse=sparse)

    @property
    def dense(self) -> Problem:
        return Problem(matrices=self.matrices, matrix=self.matrix)

    @property
    def gpu_dense(self) -> Problem:
        return Problem(matrices=self.gpu_matrices, matrix=self.gpu_matrix)

    def layered(self, sparse: bool) -> Problem:
        """Many small weights, which take long to trace and no time to update."""
        return dataclasses.replace(
            self.lookups(self.small_table, sparse),
            matrices=self.layers,
            matrix=(64, 64),
        )


def goals(sizes: Sizes) -> list[Goal]:
    """All lines of the table."""
    return [
        *_fit_goals(sizes),
        *_huge_goals(sizes),
        *_wide_goals(sizes),
        *_dlrm_goals(sizes),
        *_setup_goals(sizes),
        *_lazy_goals(sizes),
        *_lookahead_goals(sizes),
        *_dense_lazy_goals(sizes),
        *_memory_goals(sizes),
        *_first_step_goals(sizes),
        *_gpu_goals(sizes),
    ]


def scaling_variants(sizes: Sizes, vocabulary: int) -> list[Variant]:
    """The curves of the plot of step time against vocabulary."""
    problem = sizes.lookups(vocabulary, sparse=True)
    return [
        Variant(*GRAPH, "Adam", problem),
        Variant(*GRAPH, "Lazy decay", problem),
        Variant(*GRAPH, "Lazy freeze", problem),
        Variant(*TFA, "LazyAdam", problem),
    ]


def _step(over: Variant, under: Variant, cycle: int = 1) -> Measure:
    return lambda bench: bench.step_ratio(over, under, cycle)


def _big_step(over: Variant, under: Variant) -> Measure:
    def measure(bench: Bench) -> Figure:
        with bench.room(over):
            return bench.step_ratio(over, under)

    return measure


def _step_apart(over: Variant, under: Variant) -> Measure:
    return lambda bench: bench.step_ratio_apart(over, under)


def _step_memory(variant: Variant, small: Variant) -> Measure:
    size = 4 * (variant.problem.weights - small.problem.weights)
    return lambda bench: bench.step_memory(variant, small, size)


def _first(over: Variant, under: Variant) -> Measure:
    return lambda bench: bench.first_step_ratio(over, under)


def _share(variant: Variant, streams: float) -> Measure:
    return lambda bench: bench.bandwidth_share(variant, streams, K)


def _fit_goals(sizes: Sizes) -> Iterator[Goal]:
    """Whole steps of `model.fit`: forward, backward, optimizer, metrics and all."""
    for place, floor in (("graph", 40), ("jit", 15), ("jax", 30), ("torch", 60)):

        def fit(optimizer: str, rows: int, place: str = place) -> Variant:
            problem = sizes.lookups(rows, sparse=False)
            return Variant(*PLACES[place], optimizer, problem, "fit")

        lazy = fit("Lazy decay", sizes.table)
        for moments in ("decay", "freeze"):
            optimizer = f"Lazy {moments}"
            large = fit(optimizer, sizes.table)
            yield Goal(
                f"fit-{moments}-scale-{place}",
                f"fit: {optimizer}, {sizes.table:.0e} rows / {sizes.medium_table:.0e}",
                TITLES[place],
                _step(large, fit(optimizer, sizes.medium_table)),
                1.5,
            )
            yield Goal(
                f"fit-{moments}-big-{place}",
                f"fit: {optimizer}, {sizes.big_table:.0e} rows / {sizes.table:.0e}",
                TITLES[place],
                _big_step(fit(optimizer, sizes.big_table), large),
                2,
            )
        yield Goal(
            f"fit-adam-{place}",
            "fit: Adam / Lazy decay",
            TITLES[place],
            _step(fit("Adam", sizes.table), lazy),
            floor,
            is_floor=True,
        )
        yield Goal(
            f"fit-small-{place}",
            f"fit: Lazy decay / Adam, {sizes.small_table:.0e} rows",
            TITLES[place],
            _step(fit("Lazy decay", sizes.small_table), fit("Adam", sizes.small_table)),
            1.5,
        )
        yield Goal(
            f"fit-lookahead-{place}",
            "fit: Lookahead(Lazy decay) / Lazy decay",
            TITLES[place],
            _step(fit("Lookahead(Lazy decay)", sizes.table), lazy),
            1.5,
        )
        in_use = fit("Adam, package in use", sizes.small_table)
        apart = dataclasses.replace(
            in_use,
            worker=f"{in_use.worker} apart",
            optimizer="Adam, package not imported",
        )
        yield Goal(
            f"fit-imported-{place}",
            f"fit: {in_use.optimizer} / not imported",
            TITLES[place],
            _step_apart(in_use, apart),
            # Nothing, and the noise between processes.
            1.05,
        )
        yield Goal(
            f"fit-memory-{place}",
            f"fit: memory beyond weights and slots, Lazy decay, {sizes.table:.0e} rows "
            f"less {sizes.medium_table:.0e}, in tables",
            TITLES[place],
            _step_memory(lazy, fit("Lazy decay", sizes.medium_table)),
            0.05,
        )
        if place == "graph":
            tfa = Variant(*TFA, "LazyAdam", lazy.problem, "fit")
            yield Goal(
                "fit-tfa",
                "fit: Lazy decay / tfa LazyAdam",
                TITLES[place],
                _step(lazy, tfa),
                1.1,
            )
            yield Goal(
                "fit-bare",
                "fit: Lazy decay / tfa's operations, same TF",
                TITLES[place],
                _step(lazy, dataclasses.replace(lazy, optimizer="bare LazyAdam")),
            )
        if place == "torch":
            yield Goal(
                "fit-torch-loop",
                "fit: Lazy decay / a plain loop with SparseAdam",
                TITLES[place],
                _step(lazy, dataclasses.replace(lazy, optimizer="torch SparseAdam")),
                1.5,
            )


def _huge_goals(sizes: Sizes) -> Iterator[Goal]:
    """A table that leaves no room for a gradient of its shape, trained by `fit`."""

    def lazy(place: str, rows: int) -> Variant:
        problem = dataclasses.replace(
            sizes.lookups(rows, sparse=False), width=sizes.huge_width
        )
        return Variant(*PLACES[place], "Lazy decay", problem, "fit")

    shape = f"{sizes.huge_table:.0e} x {sizes.huge_width}"
    for place in ("graph", "jax", "torch"):
        yield Goal(
            f"fit-huge-{place}",
            f"fit: Lazy decay, {shape} / {sizes.table:.0e} x {sizes.huge_width}",
            TITLES[place],
            _big_step(lazy(place, sizes.huge_table), lazy(place, sizes.table)),
            2,
        )


def _wide_goals(sizes: Sizes) -> Iterator[Goal]:
    """The model of keras issue 4365, whose steps took 2.3 s in 2016."""
    problem = Problem(sizes.wide_table, sizes.wide_width, sizes.wide_rows)
    for place in ("graph", "jax", "torch"):
        adam, lazy = (
            Variant(*PLACES[place], optimizer, problem, "fit")
            for optimizer in ("Adam", "Lazy decay")
        )
        yield Goal(
            f"fit-wide-{place}",
            f"fit: Adam / Lazy decay, {sizes.wide_table} x {sizes.wide_width}",
            TITLES[place],
            _big_step(adam, lazy),
        )


def _dlrm_goals(sizes: Sizes) -> Iterator[Goal]:
    """DLRM, with 26 tables of Criteo's sizes."""
    first, *others = sizes.tables
    problem = Problem(first, 16, sizes.clicks, tables=tuple(others))
    for place, floor in (("graph", 12), ("jit", 12), ("jax", 14), ("torch", 25)):
        adam, lazy, both = (
            Variant(*PLACES[place], optimizer, problem, "fit")
            for optimizer in ("Adam", "Lazy decay", "Lookahead(Lazy decay)")
        )
        yield Goal(
            f"fit-dlrm-{place}",
            "fit: DLRM, Adam / Lazy decay",
            TITLES[place],
            _step(adam, lazy),
            floor,
            is_floor=True,
        )
        for name, variant, limit in (("lazy", lazy, 1.5), ("lookahead", both, 2)):
            yield Goal(
                f"fit-dlrm-first-{name}-{place}",
                f"fit: DLRM, first step, {variant.optimizer} / Adam",
                TITLES[place],
                _first(variant, adam),
                limit,
            )
        if place == "torch":
            yield Goal(
                "fit-dlrm-torch-loop",
                "fit: DLRM, Lazy decay / a plain loop with SparseAdam",
                TITLES[place],
                _step(lazy, dataclasses.replace(lazy, optimizer="torch SparseAdam")),
                1.2,
            )


# Set-ups by their names: the dtype policy, what `_setups.SETUPS` calls the rest, the
# places that have it, and how many times as long as the plain step it may take.
SETUPS: dict[str, tuple[str, str, Sequence[str], float | None]] = {
    "bfloat16": ("mixed_bfloat16", "plain", [*PLACES], 2),
    "float16": ("mixed_float16", "plain", [*PLACES], 2),
    "accumulation": ("float32", "accumulation", [*PLACES], 2),
    "clipping": ("float32", "clipping", [*PLACES], 2),
    "activity": ("float32", "activity", [*PLACES], 2),
    "compiled": ("float32", "plain", ["torch"], 2),
    "mirrored": ("float32", "mirrored", ["graph"], 3),
    "mirrored-float16": ("mixed_float16", "mirrored", ["graph"], 3),
    "mirrored-clipping": ("float32", "mirrored-clipping", ["graph"], 3),
    "data-parallel": ("float32", "data-parallel", ["jax"], 3),
    "model-parallel": ("float32", "model-parallel", ["jax"], 3),
    "ema": ("float32", "ema", [*PLACES], None),
    "regularizer": ("float32", "regularizer", [*PLACES], None),
}
ON_DEVICES = (
    "mirrored",
    "mirrored-float16",
    "mirrored-clipping",
    "data-parallel",
    "model-parallel",
)


def _setup_goals(sizes: Sizes) -> Iterator[Goal]:
    """The row step in what people train with, over the plain one."""
    for name, (policy, setup, places, limit) in SETUPS.items():
        for place in places:
            worker, mode = PLACES[place]
            problem = sizes.lookups(sizes.table, sparse=False)
            plain = Variant(worker, mode, "Lazy decay", problem, "fit")
            large = dataclasses.replace(
                plain,
                worker=f"{worker} on 2 CPUs" if name in ON_DEVICES else worker,
                mode="jit" if name == "compiled" else mode,
                problem=dataclasses.replace(problem, policy=policy, setup=setup),
            )
            yield Goal(
                f"fit-setups-{name}-{place}",
                f"fit: Lazy decay, {name} / plain",
                TITLES[place],
                _step(large, plain),
                limit,
            )
            medium = dataclasses.replace(large.problem, vocabulary=sizes.medium_table)
            yield Goal(
                f"fit-setups-{name}-scale-{place}",
                f"fit: Lazy decay, {name}, {sizes.table:.0e} rows / "
                f"{sizes.medium_table:.0e}",
                TITLES[place],
                _step(large, dataclasses.replace(large, problem=medium)),
                1.5 if limit else None,
            )


def _lazy_goals(sizes: Sizes) -> Iterator[Goal]:
    large = sizes.lookups(sizes.table, sparse=True)
    small = sizes.lookups(sizes.small_table, sparse=True)
    decay = Variant(*GRAPH, "Lazy decay", large)
    tfa = Variant(*TFA, "LazyAdam", large)
    for moments, limit in (("freeze", 1.0), ("decay", 1.3)):
        yield Goal(
            f"lazy-{moments}-tfa",
            f"step: Lazy {moments} / tfa LazyAdam",
            TITLES["graph"],
            _step(Variant(*GRAPH, f"Lazy {moments}", large), tfa),
            limit,
        )
        yield Goal(
            f"lazy-{moments}-bare",
            f"step: Lazy {moments} / tfa's operations, same TF",
            TITLES["graph"],
            _step(
                Variant(*GRAPH, f"Lazy {moments}", large),
                Variant(*GRAPH, "bare LazyAdam", large),
            ),
        )
    yield Goal(
        "lazy-adam",
        "step: Adam / Lazy decay",
        TITLES["graph"],
        _step(Variant(*GRAPH, "Adam", large), decay),
        40,
        is_floor=True,
        peers={"tfa": _step(Variant(*TFA, "Adam", large), tfa)},
    )
    for moments in ("decay", "freeze"):
        lazy = Variant(*GRAPH, f"Lazy {moments}", large)
        yield Goal(
            f"lazy-{moments}-scale",
            f"step: Lazy {moments}, {sizes.table:.0e} rows / {sizes.small_table:.0e}",
            TITLES["graph"],
            _step(lazy, dataclasses.replace(lazy, problem=small)),
            1.5,
            peers={"tfa": _step(tfa, dataclasses.replace(tfa, problem=small))},
        )
    yield Goal(
        "lookahead-lazy",
        "step: Lookahead(Lazy decay) / Lazy decay",
        TITLES["graph"],
        _step(Variant(*GRAPH, "Lookahead(Lazy decay)", large), decay, K),
        1.5,
        peers={"tfa": _step(Variant(*TFA, "Lookahead(LazyAdam)", large), tfa, K)},
    )
    yield Goal(
        "lazy-jit",
        "step: Lazy decay, jit / graph",
        "TF",
        _step(Variant(*JIT, "Lazy decay", large), decay),
    )


def _lookahead_goals(sizes: Sizes) -> Iterator[Goal]:
    limits = {
        "Adam": {"graph": 1.10, "jit": 1.18, "jax": 1.18, "torch": 1.05},
        "SGD": {"graph": 1.15, "jit": 1.22, "jax": 1.22, "torch": 1.15},
    }
    for inner, by_place in limits.items():
        for place, limit in by_place.items():
            lookahead, bare = _lookahead_pair(place, inner, sizes.dense)
            peers = _lookahead_peers(place, inner, sizes.dense)
            yield Goal(
                f"lookahead-{inner.lower()}-{place}",
                f"step: Lookahead({inner}) / {inner}",
                TITLES[place],
                _step(lookahead, bare, K),
                limit,
                peers={name: _step(*pair, K) for name, pair in peers.items()},
            )
    for place, where in PLACES.items():
        outer = Variant(*where, "Lookahead(Adam, outer SGD)", sizes.dense)
        yield Goal(
            f"outer-adam-{place}",
            "step: Lookahead(Adam), outer SGD with momentum / Adam",
            TITLES[place],
            _step(outer, dataclasses.replace(outer, optimizer="Adam"), K),
            1.2,
        )


def _lookahead_pair(
    place: str, inner: str, problem: Problem
) -> tuple[Variant, Variant]:
    """Lookahead and what it wraps."""
    where = PLACES[place]
    over, under = f"Lookahead({inner})", inner
    return Variant(*where, over, problem), Variant(*where, under, problem)


def _lookahead_peers(
    place: str, inner: str, problem: Problem
) -> dict[str, tuple[Variant, Variant]]:
    """The same pair of other libraries."""
    if place == "graph":
        name, where, over, under = "tfa", TFA, f"Lookahead({inner})", inner
    elif place == "jax":
        name, where, under = "optax", JAX, f"optax {inner.lower()}"
        over = f"{under} lookahead"
    elif place == "torch":
        name, where, under = "pytorch_optimizer", TORCH, f"torch {inner}"
        over = f"{under} pytorch_optimizer.Lookahead"
    else:
        return {}
    return {name: (Variant(*where, over, problem), Variant(*where, under, problem))}


def _dense_lazy_goals(sizes: Sizes) -> Iterator[Goal]:
    problem = sizes.lookups(sizes.table, sparse=False)
    sparse = sizes.lookups(sizes.table, sparse=True)
    for place, limit in (("torch", 0.25), ("graph", 0.35), ("jax", 1.1)):
        for moments in ("decay", "freeze"):
            lazy = Variant(*PLACES[place], f"Lazy {moments}", problem)
            adam = Variant(*PLACES[place], "Adam", problem)
            peers = {}
            if place == "torch" and moments == "freeze":
                # It needs a sparse gradient, which Keras's layers do not make.
                sparse_adam = Variant(*TORCH, "torch SparseAdam", sparse)
                torch_adam = Variant(*TORCH, "torch Adam", problem)
                peers["SparseAdam / torch Adam"] = _step(sparse_adam, torch_adam)
            yield Goal(
                f"lazy-{moments}-dense-{place}",
                f"step: Lazy {moments} / Adam, dense gradient",
                TITLES[place],
                _step(lazy, adam),
                limit,
                peers=peers,
            )


def _memory_goals(sizes: Sizes) -> Iterator[Goal]:
    def extra_weights(over: Variant, under: Variant) -> Measure:
        size = 4 * sizes.dense.weights
        return lambda bench: bench.extra_memory(over, under, size, "copies")

    def extra_rows(over: Variant, under: Variant) -> Measure:
        size = sizes.table
        return lambda bench: bench.extra_memory(over, under, size, "B a row")

    for place in PLACES:
        lookahead, adam = _lookahead_pair(place, "Adam", sizes.dense)
        pairs = _lookahead_peers(place, "Adam", sizes.dense)
        yield Goal(
            f"memory-lookahead-{place}",
            "peak memory, Lookahead(Adam) - Adam, in copies of the weights",
            TITLES[place],
            extra_weights(lookahead, adam),
            # One copy, and the noise of a process's memory.
            1.05,
            peers={name: extra_weights(*pair) for name, pair in pairs.items()},
        )
    for place, where in PLACES.items():
        problem = sizes.lookups(sizes.table, sparse=where[0] == "tensorflow")
        lazy = Variant(*where, "Lazy decay", problem)
        adam = Variant(*where, "Adam", problem)
        # The batch's rows: the gradient, summed; table and slots, old and new.
        batch = 8 * 4 * problem.rows * problem.width
        integers = 8 if where[0] == "tensorflow" else 4
        peers = {}
        if place == "graph":
            their_lazy = Variant(*TFA, "LazyAdam", problem)
            their_adam = Variant(*TFA, "Adam", problem)
            peers["tfa LazyAdam - Adam"] = extra_rows(their_lazy, their_adam)
        yield Goal(
            f"memory-lazy-{place}",
            "peak memory, Lazy decay - Adam, by row of the table",
            TITLES[place],
            extra_rows(lazy, adam),
            round(integers + batch / problem.vocabulary, 1),
            peers=peers,
        )


def _first_step_goals(sizes: Sizes) -> Iterator[Goal]:
    for name, optimizer, theirs in (
        ("lookahead", "Lookahead(Adam)", "Lookahead(Adam)"),
        ("lazy", "Lazy decay", "LazyAdam"),
    ):
        for place, where in PLACES.items():
            problem = sizes.layered(sparse=where[0] == "tensorflow")
            wrapped, bare = (
                Variant(*where, name, problem) for name in (optimizer, "Adam")
            )
            peers = {}
            if place == "graph":
                tfa = Variant(*TFA, theirs, problem)
                peers["tfa"] = _first(tfa, Variant(*TFA, "Adam", problem))
            yield Goal(
                f"first-{name}-{place}",
                f"first step, {optimizer} / Adam, {len(problem.shapes)} weights",
                TITLES[place],
                _first(wrapped, bare),
                1.5,
                peers=peers,
            )


def _gpu_goals(sizes: Sizes) -> Iterator[Goal]:
    # Adam reads gradient, weights and two slots and writes the last three; a sync
    # reads and writes fast and slow weights.
    streams = {"Adam": 7, "Lookahead(Adam)": 7 + 4 / K}
    table = sizes.lookups(sizes.table, sparse=False)
    for backend, mode in (JAX, TORCH):
        where = (f"{backend} on GPU", mode)
        dense = {name: Variant(*where, name, sizes.gpu_dense) for name in streams}
        lazy, adam = (Variant(*where, name, table) for name in ("Lazy decay", "Adam"))
        yield Goal(
            f"gpu-lookahead-{backend}",
            "step: Lookahead(Adam) / Adam",
            where[0],
            _step(dense["Lookahead(Adam)"], dense["Adam"], K),
        )
        yield Goal(
            f"gpu-lazy-dense-{backend}",
            "step: Lazy decay / Adam, dense gradient",
            where[0],
            _step(lazy, adam),
        )
        for name, variant in dense.items():
            yield Goal(
                f"gpu-bandwidth-{name.partition('(')[0].lower()}-{backend}",
                f"{name}, bytes needed / bytes that a copy moves in the time",
                where[0],
                _share(variant, streams[name]),
            )
