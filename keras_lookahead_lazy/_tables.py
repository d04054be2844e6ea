"""Find the embedding tables among a model's weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras

from keras_lookahead_lazy import _keras
from keras_lookahead_lazy._arguments import shown

# The names that `keras.layers.Embedding` gives to its table and, with LoRA, to the
# factor of the table that has one row per token.
TABLE_NAMES = ("embeddings", "lora_embeddings_a")

Source: TypeAlias = keras.layers.Layer | keras.Variable | str


def check_sources(sources: Any) -> list[Source] | None:
    """Return `embedding_layers` as a list, or raise an error with advice."""
    if sources is None:
        return None
    if isinstance(sources, (str, keras.Variable, keras.layers.Layer)) or not isinstance(
        sources, Sequence
    ):
        raise TypeError(
            "`embedding_layers` must be a list of Embedding layers, variables or "
            f"names, or None for every Embedding layer. Received: {shown(sources)} of "
            f"type {type(sources).__name__}. Write embedding_layers=[...]."
        )
    if not sources:
        raise ValueError(
            "`embedding_layers` is an empty list. Pass None for every Embedding "
            "layer of the model, or name at least one."
        )
    for source in sources:
        if isinstance(source, keras.layers.Embedding):
            continue
        if isinstance(source, keras.Model):
            raise ValueError(
                f"`embedding_layers` takes layers, but {source.name!r} is a model. "
                "Pass None for every Embedding layer in it, or "
                "[model.get_layer(name), ...]."
            )
        if isinstance(source, keras.layers.Layer):
            raise ValueError(
                f"Layer {source.name!r} in `embedding_layers` is a "
                f"{type(source).__name__}, not an Embedding. If it holds a table "
                "that is looked up by row, pass that variable, or its path."
            )
        if isinstance(source, keras.Variable):
            if len(source.shape) < 2:
                raise ValueError(
                    f"Variable {source.path!r} in `embedding_layers` has shape "
                    f"{tuple(source.shape)}; a table needs at least two dimensions."
                )
        elif not isinstance(source, str):
            raise TypeError(
                "`embedding_layers` takes Embedding layers, variables and names. "
                f"Received in the list: {shown(source)} of type "
                f"{type(source).__name__}."
            )
    return list(sources)


def find_tables(
    sources: list[Source] | None,
    variables: list[keras.Variable],
    weights: list[keras.Variable],
) -> tuple[list[keras.Variable], list[str]]:
    """Find the tables among the weights to train.

    Args:
        sources: The user's `embedding_layers`.
        variables: The weights to train.
        weights: All weights of the model, if the model is known.

    Returns:
        The tables, and the names of sources whose tables are frozen. If `sources` is
        `None`, these are all frozen tables, provided that no table is trainable.

    Raises:
        ValueError: If a source is neither a table nor frozen, or if there is no table.
    """
    frozen = [weight for weight in weights if not _is_in(weight, variables)]
    if sources is None:
        tables = [v for v in variables if _is_table(v)]
        frozen_tables = [_keras.path(v) for v in frozen if _is_table(v)]
        if not tables and not frozen_tables:
            raise ValueError(
                "LazyOptimizer found no embedding table among the trainable "
                f"variables: {_listing(variables)}. A table is what a "
                "keras.layers.Embedding makes; for another kind of layer pass its "
                "variable, or the variable's path, in `embedding_layers`."
            )
        return tables, [] if tables else frozen_tables
    tables, frozen_tables = [], []
    for source in sources:
        if _is_frozen(source, variables, frozen):
            frozen_tables.append(_name(source))
        else:
            found = _tables_of(source, variables)
            tables += [table for table in found if not _is_in(table, tables)]
    return tables, frozen_tables


def _is_frozen(source: Source, variables: list, frozen: list) -> bool:
    """Return whether a source stands for a table that is frozen."""
    if isinstance(source, keras.Variable):
        return not _is_in(source, variables) and (
            not source.trainable or _is_in(source, frozen)
        )
    if isinstance(source, keras.layers.Layer):
        tables = [v for v in source.weights if _is_table(v)]
        return bool(tables) and not any(
            _is_in(table, source.trainable_variables) for table in tables
        )
    return not _fits(source, variables) and _fits(source, frozen)


def _fits(name: str, variables: list[keras.Variable]) -> bool:
    try:
        _named(name, variables)
    except ValueError:
        return False
    return True


def _name(source: Source) -> str:
    if isinstance(source, str):
        return source
    return source.path if isinstance(source, keras.Variable) else source.name


def source_names(
    sources: list[Source] | None,
    tables: list[keras.Variable],
    variables: list[keras.Variable],
    frozen: list[str],
) -> list[str] | None:
    """Names that find the same tables in a copy of the model.

    `tables` are those that were found among `variables`, none before the build, and
    `frozen` the names of sources whose tables were frozen then.
    """
    if sources is None:
        return None
    if tables:
        found = [f"{table.path}:{_position(table, variables)}" for table in tables]
        return found + frozen
    return [_name(source) for source in sources]


def unique_names(
    tables: list[keras.Variable], variables: list[keras.Variable]
) -> list[str]:
    """Path of each table, with its position among `variables` where two share one."""
    paths = [table.path for table in tables]
    return [
        path if paths.count(path) == 1 else f"{path}:{_position(table, variables)}"
        for path, table in zip(paths, tables, strict=True)
    ]


def acts_on_rows(constraint: Any) -> bool:
    """Whether a constraint's value for a row depends on that row alone."""
    if constraint is None or isinstance(constraint, keras.constraints.NonNeg):
        return True
    by_axis = (
        keras.constraints.MaxNorm,
        keras.constraints.MinMaxNorm,
        keras.constraints.UnitNorm,
    )
    return isinstance(constraint, by_axis) and constraint.axis in (1, -1, [1], [-1])


def _tables_of(source: Source, variables: list[keras.Variable]) -> list[keras.Variable]:
    if isinstance(source, str):
        return [_named(source, variables)]
    if isinstance(source, keras.Variable):
        if not _is_in(source, variables):
            raise ValueError(
                f"Variable {source.path!r} in `embedding_layers` is not among the "
                f"trainable variables of the model: {_listing(variables)}."
            )
        return [source]
    tables = [v for v in variables if _is_table(v) and _is_in(v, source.weights)]
    if not tables:
        raise ValueError(
            f"Layer {source.name!r} in `embedding_layers` has no table among the "
            "trainable variables: it is not part of this model, or it is frozen. "
            f"The trainable variables are: {_listing(variables)}."
        )
    return tables


def _named(name: str, variables: list[keras.Variable]) -> keras.Variable:
    """Return the one variable whose path, or whose layer's path, `name` matches.

    Paths are not stable: the `net/words/embeddings` of a Sequential is
    `words/embeddings` once the model has been loaded. So a match at the end is enough,
    and either of the two may be longer. If two paths have become equal, `path:3` means
    the variable at position 3.
    """
    position = ""
    if re.search(r":\d+$", name):  # a layer's name may have a colon, too
        name, _, position = name.rpartition(":")
    for matches in (
        [v for v in variables if _keras.path(v) == name],
        [v for v in variables if _is_table(v) and _same_end(_owner(v), name)],
        [v for v in variables if _same_end(_keras.path(v), name)],
    ):
        if len(matches) > 1 and position:
            matches = [v for v in matches if position == str(_position(v, variables))]
        if len(matches) == 1:
            break
        if matches:
            raise ValueError(
                f"The name {name!r} in `embedding_layers` matches several variables: "
                f"{_listing(matches)}. Write the whole path of one."
            )
    else:
        raise ValueError(
            f"The name {name!r} in `embedding_layers` matches no trainable variable. "
            f"The trainable variables are: {_listing(variables)}."
        )
    if len(matches[0].shape) < 2 or not (
        _is_table(matches[0]) or matches[0].name == name.split("/")[-1]
    ):
        raise ValueError(
            f"The name {name!r} in `embedding_layers` is not an embedding table but "
            f"{_listing(matches)}."
        )
    return matches[0]


def _same_end(path: str, name: str) -> bool:
    return f"/{path}".endswith(f"/{name}") or f"/{name}".endswith(f"/{path}")


def _owner(variable: keras.Variable) -> str:
    return _keras.path(variable).rpartition("/")[0]


def _is_table(variable: keras.Variable) -> bool:
    return variable.name in TABLE_NAMES and len(variable.shape) == 2


def _is_in(variable: keras.Variable, variables: list[keras.Variable]) -> bool:
    return any(variable is other for other in variables)


def _position(variable: keras.Variable, variables: list[keras.Variable]) -> int:
    return next(i for i, other in enumerate(variables) if other is variable)


def _listing(variables: list[keras.Variable]) -> str:
    listed = [f"{_keras.path(v)} {tuple(v.shape)}" for v in variables]
    return ", ".join(listed) or "none"
