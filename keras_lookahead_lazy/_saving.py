"""How the state and the config of a wrapper get into a file, and back."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lookahead_lazy import _keras, _repr
from keras_lookahead_lazy._keras import chain

# The format of the state in a file. Version 0.1 wrote no number, which counts as 1.
FORMAT = 2


class SavedOptimizer(keras.Optimizer):
    """The part of an optimizer wrapper that Keras calls to save and load it.

    Keras saves the inner optimizer separately, so a wrapper stores only its own
    variables, by number, and its own numeric arguments.
    """

    _inner: keras.Optimizer
    # Whether the wrapper around this one has warned about the file being loaded.
    _user_was_warned = False

    def wrappers_around(self) -> list[Any]:
        """Return the wrappers around this one, from the inside out."""
        raise NotImplementedError

    def __dir__(self) -> list[str]:
        """List public names only, because Keras loads every optimizer that it finds.

        It would find the inner optimizer a second time under a private name.
        """
        names = super().__dir__()
        return [n for n in names if n.startswith("__") or not n.startswith("_")]

    def save_own_variables(self, store: Any) -> None:
        for i, variable in enumerate(super().variables):
            store[str(i)] = ops.convert_to_numpy(variable)
        for name, number in self._own_numbers().items():
            store[name] = np.asarray(number)
        for name, fact in self._saved_facts().items():
            store[name] = fact

    def _saved_facts(self) -> dict[str, np.ndarray]:
        """Return what a file must agree with, besides shapes, to be loaded."""
        return {"format": np.asarray(FORMAT)}

    def _own_numbers(self) -> dict[str, float]:
        """Return the constructor's arguments that are numbers."""
        settings = self._own_settings().items()
        return {n: value for n, value in settings if isinstance(value, int | float)}

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` stored: all of it, or nothing.

        If another optimizer or model was saved, or a part is missing, this warns, as
        Keras's optimizers do. The wrapper then starts from the beginning: the next
        update is its first, and also that of the wrappers around it. If the saved
        optimizer had not been built, it does the same without a warning. If Keras is
        going to reject the file (it raises later), nothing is loaded.
        """
        if not self.built or _keras.is_refusing_a_file():
            return
        variables = super().variables
        stored = {name: np.array(store[name]) for name in store.keys()}  # noqa: SIM118
        names = [name for name in stored if name.isdecimal()]
        problem = self._why_not_loaded(stored, names, variables)
        if problem is None:
            for i, variable in enumerate(variables):
                variable.assign(stored[str(i)])
            numbers = stored.keys() & self._own_numbers().keys()
            self._compare({name: stored[name].item() for name in numbers})
            return
        was_built = [stored[name].shape for name in names] != [()]
        if was_built and not self._user_was_warned:
            warnings.warn(
                f"The file holds no state that the optimizer {self.name!r} can use: "
                f"{problem} {type(self).__name__} starts from the beginning.",
                stacklevel=2,
            )
            for optimizer in chain(self)[1:]:  # Keras loads these next
                optimizer.__dict__["_user_was_warned"] = True
        self._user_was_warned = False
        for variable in variables:
            if "int" in variable.dtype:
                variable.assign(ops.zeros_like(variable.value))
        for wrapper in self.wrappers_around():
            wrapper.begin_cycle()

    def _why_not_loaded(
        self, stored: dict[str, np.ndarray], names: list[str], variables: list
    ) -> str | None:
        """Return why stored values cannot be this wrapper's state, or `None`."""
        form = int(stored.get("format", 1))
        if form > FORMAT:
            return (
                f"it has format {form}, and this version of keras_lookahead_lazy "
                f"can read formats up to {FORMAT}. Load it with a newer version."
            )
        missing = set(range(max(map(int, names), default=0))) - set(map(int, names))
        if missing:
            return (
                f"its parts {', '.join(map(str, sorted(missing)))} are missing. The "
                "file may be incomplete; load an earlier one."
            )
        shapes = [stored[name].shape for name in sorted(names, key=int)]
        if shapes == [tuple(v.shape) for v in variables] and self._fits(stored):
            return None
        if (
            form < FORMAT
            and "format" not in stored
            and self._stores_differently(shapes)
        ):
            return (
                "it was written by a version of keras_lookahead_lazy before 0.2.0. To "
                "continue exactly, finish the training with that version. Otherwise "
                "only the weights are loaded."
            )
        found = f"{len(names)} variables are stored and {len(variables)} expected."
        if len(names) == len(variables):
            found = "the stored variables have other shapes or are of other tables."
        return f"{found} It was saved with another optimizer or model, or without one."

    def _fits(self, stored: dict[str, np.ndarray]) -> bool:
        """Return whether the stored facts are those of this wrapper."""
        facts = self._saved_facts()
        return all(
            name == "format" or np.array_equal(stored.get(name, fact), fact)
            for name, fact in facts.items()
        )

    def _stores_differently(self, shapes: list[tuple]) -> bool:
        """Return whether an earlier version would have stored these shapes."""
        return False

    def _compare(self, numbers: dict[str, float]) -> None:
        """Warn if the file was saved with other arguments."""
        own = self._own_numbers()
        for name, number in numbers.items():
            if number != own[name]:
                warnings.warn(
                    f"The file was saved with {name}={number}; training continues with "
                    f"{name}={own[name]} of this {type(self).__name__}. To continue as "
                    f"before, create the optimizer with {name}={number}.",
                    stacklevel=2,
                )

    def __repr__(self) -> str:
        """Return the nested optimizers as you would write them."""
        try:
            settings = self._own_settings().items()
            given = {
                n: _repr.setting(value) for n, value in settings if value is not None
            }
            return _repr.call(type(self), given, _repr.written(self._inner))
        except Exception:  # for example, if the constructor has not finished
            return object.__repr__(self)

    def _own_settings(self) -> dict[str, Any]:
        """Return the constructor's arguments, except the optimizer and the name."""
        return {}

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, serialized."""
        return {
            "name": self.name,
            "optimizer": _keras.serialize(self._inner),
            **{n: _serialized(value) for n, value in self._own_settings().items()},
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> SavedOptimizer:
        """Return an unbuilt optimizer with the arguments in `config`."""
        if "optimizer" not in config:
            raise ValueError(
                f"The config of a {cls.__name__} must contain the config of the inner "
                f"optimizer as 'optimizer'. Received a config with the keys "
                f"{list(config)}."
            )
        config = dict(config)
        for name in config.keys() & {"optimizer", "outer_optimizer"}:
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)


def _serialized(setting: Any) -> Any:
    return (
        _keras.serialize(setting) if isinstance(setting, keras.Optimizer) else setting
    )
