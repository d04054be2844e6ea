"""Wrong uses: what came, what to write instead, and nothing has changed."""

# mypy: disable-error-code="misc,arg-type,var-annotated,call-arg,dict-item"
# A checker of types would refuse most of these, too.

import re
from importlib.util import find_spec
from typing import Any

import keras
import numpy as np
import pytest
from harness import (
    BACKEND,
    QUICK,
    assert_same_bits,
    both,
    make_data,
    numpy,
)
from keras import ops

from keras_lookahead_lazy import LazyOptimizer, Lookahead, SlowWeights, inject
from keras_lookahead_lazy._keras import chain, is_taken_over

WRAPPERS = [Lookahead, LazyOptimizer]
nan = float("nan")


@pytest.fixture(autouse=True, scope="module")
def _fresh_session():
    """Once, for clearing a session takes longer than most cases."""
    yield
    keras.utils.clear_session()


def adam(*_: Any) -> keras.Optimizer:
    return keras.optimizers.Adam(0.05)


def model_of(name: str = "words", rows: int = 12) -> keras.Model:
    layers = [keras.layers.Embedding(rows, 3, name=name), keras.layers.Flatten()]
    layers.append(keras.layers.Dense(1, name="head"))
    return keras.Sequential([keras.Input((4,), dtype="int32"), *layers], name="net")


def without_table() -> keras.Model:
    dense = keras.layers.Dense(1, name="head")
    return keras.Sequential([keras.Input((4,)), dense], name="net")


def two_towers() -> keras.Model:
    tokens = keras.Input((4,), dtype="int32")
    rows = []
    for name in ("left", "right"):
        words = keras.layers.Embedding(12, 3, name="words")
        tower = keras.Sequential([keras.Input((4,), dtype="int32"), words], name=name)
        rows.append(keras.layers.Flatten()(tower(tokens)))
    head = keras.layers.Dense(1, name="head")
    return keras.Model(tokens, head(keras.layers.Concatenate()(rows)), name="net")


def build(optimizer: keras.Optimizer, model: keras.Model) -> keras.Optimizer:
    optimizer.build(model.trainable_variables)
    return optimizer


def built(make: Any) -> Any:
    """Makes the optimizer, built for the model."""
    return lambda model: build(make(adam()), model)


def compiled(make: Any) -> Any:
    """Makes the optimizer, with which the model has been trained a step."""

    def compile_model(model):
        optimizer = make(adam())
        model.compile(optimizer, "mse", **QUICK)
        model.train_on_batch(*make_data(4))
        return optimizer

    return compile_model


def ones(model):
    return [ops.ones(weight.shape) for weight in model.trainable_variables]


class FromTheWeights(keras.optimizers.SGD):
    """Keeps an average of the weights, which starts from them."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.average = [self.add_variable_from_reference(v, "avg") for v in variables]
        for average, variable in zip(self.average, variables, strict=True):
            average.assign(variable)


# What others call an optimizer


def of_library(module: str, name: str) -> Any:
    """Looks like an object of a library that may not be installed."""
    return type(name, (), {"__module__": module})()


def of_optax() -> Any:
    if find_spec("optax"):
        import optax

        return optax.adam(1e-3)
    return of_library("optax._src.base", "GradientTransformationExtraArgs")


def of_torch() -> Any:
    if BACKEND == "torch":  # whose triton may crash in one process with TensorFlow
        import torch

        return torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    return of_library("torch.optim.adam", "Adam")


# A case: what makes the optimizer at hand (for the model), what is done wrong with the
# optimizer and the model, the error, and what it says: what came, and what to write.
# The model is `model_of()` where no other is given.

CONSTRUCTOR = {
    f"k={k!r}": (
        adam,
        lambda o, m, k=k: Lookahead(o, k=k),
        ValueError,
        rf"`k` .*at least 1, such as k=5\. Received: k={re.escape(repr(k))}\.",
    )
    for k in (0, -1, 1.5, 5.0, True, "5", None, nan, [5])
}
CONSTRUCTOR |= {
    f"alpha={alpha!r}": (
        adam,
        lambda o, m, alpha=alpha: Lookahead(o, alpha=alpha),
        ValueError,
        rf"`alpha` .*\(0, 1\], such as alpha=0\.5.*alpha={re.escape(repr(alpha))}\.",
    )
    for alpha in (0, -0.1, 1.5, nan, float("inf"), "x", "0.5", None, True, [0.5])
}
CONSTRUCTOR |= {
    f"inner_state={state!r}": (
        adam,
        lambda o, m, state=state: Lookahead(o, inner_state=state),
        ValueError,
        "`inner_state` .*'maintain', 'interpolate' or 'reset'.*Received: inner_state="
        + re.escape(repr(state)),
    )
    for state in ("pullback", "Reset", None, 0, ["reset"])
}
CONSTRUCTOR |= {
    f"moments={moments!r}": (
        adam,
        lambda o, m, moments=moments: LazyOptimizer(o, moments=moments),
        ValueError,
        f"`moments` .*'decay' or 'freeze'.*moments={re.escape(repr(moments))}",
    )
    for moments in ("Decay", "frozen", None, 1, ["decay"])
}
CONSTRUCTOR |= {
    f"{wrapper.__name__}({name})": (
        adam,
        lambda o, m, wrapper=wrapper, make=make: wrapper(make(m)),
        TypeError,
        rf"{wrapper.__name__} wraps a Keras optimizer.*"
        rf"{wrapper.__name__}\(keras\.optimizers\.Adam\(1e-3\)\).*{words}",
    )
    for wrapper in WRAPPERS
    for name, make, words in (
        ("a class", lambda m: keras.optimizers.Adam, r"class Adam; write Adam\(\)"),
        ("a number", lambda m: 1e-3, "0.001 of type float"),
        ("nothing", lambda m: None, "None of type NoneType"),
        ("a list", lambda m: [keras.optimizers.Adam], "of type list"),
        ("a layer", lambda m: m.layers[0], "Embedding name=words.* of type Embedding"),
        ("a model", lambda m: m, r"the model 'net'; .*model\.compile"),
        ("an array", lambda m: np.zeros((9, 9)), r"array of shape \(9, 9\)"),
        (
            "a schedule",
            lambda m: keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5),
            r"schedule ExponentialDecay; write Adam\(schedule\)",
        ),
        ("optax", lambda m: of_optax(), r"optax\..*Gradient.*of optax cannot train"),
        ("torch", lambda m: of_torch(), r"torch\.optim.*Adam.*of torch cannot train"),
        (
            "tf_keras",
            lambda m: of_library("tf_keras.src.optimizers.adam", "Adam"),
            r"tf_keras.*Adam; an optimizer of tf_keras cannot train a Keras 3 model",
        ),
        (
            "TensorFlow Addons",
            lambda m: of_library("tensorflow_addons.optimizers.lookahead", "Lookahead"),
            r"tensorflow_addons.*Lookahead; an optimizer of tensorflow_addons cannot",
        ),
    )
}
CONSTRUCTOR |= {
    f"{wrapper.__name__}: {name}": (adam, use(wrapper), error, words)
    for wrapper in WRAPPERS
    for name, use, error, words in (
        (
            "unknown optimizer",
            lambda cls: lambda o, m: cls("adamm"),
            ValueError,
            "optimizer.*adamm",
        ),
        (
            "dict that is no config",
            lambda cls: lambda o, m: cls({"learning_rate": 0.1}),
            ValueError,
            r"serialize\(optimizer\).*keys \['learning_rate'\]",
        ),
        (
            "config of a layer",
            lambda cls: (
                lambda o, m: cls(keras.saving.serialize_keras_object(m.layers[-1]))
            ),
            ValueError,
            "optimizer identifier.*Dense",
        ),
        (
            "own config without an optimizer",
            lambda cls: lambda o, m: cls.from_config({"name": "x"}),
            ValueError,
            r"inner optimizer as 'optimizer'.*keys \['name'\]",
        ),
        (
            "name that is none",
            lambda cls: lambda o, m: cls(o, name=5),
            ValueError,
            "`name` must be a string.*name=5",
        ),
    )
}
CONSTRUCTOR |= {
    f"{wrapper.__name__}: {setting} of the inner optimizer": (
        adam,
        lambda o, m, wrapper=wrapper, given={setting: value}: wrapper(o, **given),
        TypeError,
        rf"no argument `{setting}`.*{wrapper.__name__}\(Adam\({setting}={value}\), ",
    )
    for wrapper in WRAPPERS
    for setting, value in (
        ("clipnorm", 1.0),
        ("clipvalue", 1.0),
        ("global_clipnorm", 1.0),
        ("learning_rate", 0.1),
        ("weight_decay", 0.01),
        ("use_ema", True),
        ("gradient_accumulation_steps", 2),
        ("loss_scale_factor", 8.0),
        ("beta_1", 0.8),
    )
}
CONSTRUCTOR |= {
    f"{library}'s arguments": (
        adam,
        lambda o, m, given=given: Lookahead(o, **given),
        TypeError,
        rf"{'.*'.join(f'`{name}`' for name in given)}.*Lookahead\(\.\.\., {ours}\)\.$",
    )
    for library, given, ours in (
        ("optax", {"sync_period": 6, "slow_step_size": 0.5}, "k=6, alpha=0.5"),
        ("tfa", {"sync_period": 6}, "k=6"),
        ("torch", {"la_steps": 7, "la_alpha": 0.8}, "k=7, alpha=0.8"),
        ("torch, 1", {"pullback_momentum": "reset"}, "inner_state='reset'"),
        ("torch, 2", {"pullback_momentum": "none"}, "inner_state='maintain'"),
        ("torch, 3", {"pullback_momentum": "pullback"}, "inner_state='interpolate'"),
    )
}
CONSTRUCTOR |= {
    "LazyOptimizer: tfa's arguments": (
        adam,
        lambda o, m: LazyOptimizer(o, sync_period=6),
        TypeError,
        "`sync_period`.*are optimizer, embedding_layers, moments, name",
    ),
    "Lookahead's argument in LazyOptimizer": (
        adam,
        lambda o, m: LazyOptimizer(o, k=5),
        TypeError,
        r"no argument `k`. Lookahead has `k`: Lookahead\(LazyOptimizer\(",
    ),
    "LazyOptimizer's arguments in Lookahead": (
        adam,
        lambda o, m: Lookahead(o, embedding_layers=m.layers, moments="freeze"),
        TypeError,
        r"LazyOptimizer has `embedding_layers`, `moments`: Lookahead\(LazyOptimizer\(",
    ),
    "no inner optimizer": (
        adam,
        lambda o, m: Lookahead(k=5),
        TypeError,
        "missing 1 required positional argument: 'optimizer'",
    ),
    "k in the optimizer's place": (
        adam,
        lambda o, m: Lookahead(5, 0.5),
        TypeError,
        "wraps a Keras optimizer.*Received 5 of type int",
    ),
    "layers in the optimizer's place": (
        adam,
        lambda o, m: LazyOptimizer([m.layers[0]], o),
        TypeError,
        "wraps a Keras optimizer.*Received .* of type list",
    ),
}

TABLES = {
    f"embedding_layers={name}": (
        adam,
        lambda o, m, make=make: LazyOptimizer(o, make(m)),
        error,
        words,
    )
    for name, make, error, words in (
        ("[]", lambda m: [], ValueError, "empty list.*None for every"),
        ("()", lambda m: (), ValueError, "empty list.*None for every"),
        (
            "[Dense]",
            lambda m: [m.get_layer("head")],
            ValueError,
            "'head'.*is a Dense, not an Embedding.*pass that variable",
        ),
        ("all layers", lambda m: m.layers, ValueError, "Flatten, not an Embedding"),
        (
            "[model]",
            lambda m: [m],
            ValueError,
            r"'net' is a model\. Pass None .* or \[model\.get_layer",
        ),
        ("model", lambda m: m, TypeError, r"list.*Sequential.*\[\.\.\.\]"),
        ("a layer", lambda m: m.layers[0], TypeError, r"list.*Embedding.*\[\.\.\.\]"),
        ("a name", lambda m: "words", TypeError, r"list.*'words' of type str.*\[\."),
        ("a set", lambda m: {"words"}, TypeError, r"list.*of type set.*\[\.\.\.\]"),
        ("a dict", lambda m: {"words": 1}, TypeError, r"list.*of type dict.*\[\."),
        ("3", lambda m: 3, TypeError, r"list.*3 of type int.*\[\.\.\.\]"),
        ("[3]", lambda m: [3], TypeError, "3 of type int"),
        ("[None]", lambda m: [None], TypeError, "None of type NoneType"),
        ("[[layer]]", lambda m: [m.layers[:1]], TypeError, "names.*of type list"),
        (
            "[array]",
            lambda m: [np.zeros((2, 2))],
            TypeError,
            r"variables and names.*array of shape \(2, 2\) of type ndarray",
        ),
        ("[Embedding]", lambda m: [keras.layers.Embedding], TypeError, "of type type"),
        (
            "[vector]",
            lambda m: [m.get_layer("head").bias],
            ValueError,
            r"head/bias.*\(1,\).*two dimensions",
        ),
    )
}
# These are known as soon as there is a model.
TABLES |= {
    f"embedding_layers: {name}": (
        lambda m, make=make: LazyOptimizer(adam(), make(m)),
        build,
        ValueError,
        words,
    )
    for name, make, words in (
        (
            "layer of another model",
            lambda m: [model_of("others").get_layer("others")],
            "'others'.*not part of this model.*words/embeddings",
        ),
        (
            "layer that is not built",
            lambda m: [keras.layers.Embedding(3, 3, name="loose")],
            "'loose'.*not part of this model.*words/embeddings",
        ),
        (
            "variable of another model",
            lambda m: [model_of("others").get_layer("others").embeddings],
            "others/embeddings'.*not among.*words/embeddings",
        ),
        ("unknown name", lambda m: ["word"], "'word'.*no trainable.*words/embeddings"),
        ("empty name", lambda m: [""], "''.*words/embeddings"),
        ("name of a Dense", lambda m: ["head"], "'head'.*head/kernel"),
        (
            "path of a bias",
            lambda m: ["head/bias"],
            r"'head/bias'.*no.*table.*\(1,\)",
        ),
    )
}

NESTING = {
    "LazyOptimizer around Lookahead": (
        adam,
        lambda o, m: LazyOptimizer(Lookahead(o)),
        ValueError,
        r"inside Lookahead, not around.*Lookahead\(LazyOptimizer\(Adam",
    ),
    "LazyOptimizer around LazyOptimizer": (
        adam,
        lambda o, m: LazyOptimizer(LazyOptimizer(o)),
        ValueError,
        r"LazyOptimizer cannot be inside another.*one.*embedding_layers=\[",
    ),
    "LazyOptimizer around LazyOptimizer, loss scaling between": (
        adam,
        lambda o, m: LazyOptimizer(
            keras.optimizers.LossScaleOptimizer(LazyOptimizer(o))
        ),
        ValueError,
        r"LazyOptimizer cannot be inside another.*one.*embedding_layers=\[",
    ),
    "inner optimizer of another LazyOptimizer": (
        built(LazyOptimizer),
        lambda o, m: LazyOptimizer(o.inner_optimizer),
        ValueError,
        "Adam.*another LazyOptimizer.*its own",
    ),
    "inner optimizer of another LazyOptimizer, built later": (
        built(LazyOptimizer),
        lambda o, m: build(shared_by_two(), m),
        ValueError,
        "Adam.*another LazyOptimizer.*its own",
    ),
}
NESTING |= {
    f"{name} around a loss that is scaled": (
        lambda m, wrap=wrap: wrap(keras.optimizers.LossScaleOptimizer(adam())),
        lambda o, m: keras.optimizers.LossScaleOptimizer(o),
        ValueError,
        "LossScaleOptimizer.*compile the plain",
    )
    for name, wrap in (
        ("Lookahead", Lookahead),
        ("LazyOptimizer", LazyOptimizer),
        ("Lookahead(LazyOptimizer)", both),
    )
}
if hasattr(keras.optimizers, "ScheduleFreeAdamW"):
    NESTING |= {
        f"Lookahead(ScheduleFreeAdamW), {state}": (
            lambda m: keras.optimizers.ScheduleFreeAdamW(),
            lambda o, m, state=state: Lookahead(o, inner_state=state),
            ValueError,
            r"keeps weights in its slots.*Received: inner_state='\w+'\. "
            r"Write Lookahead\(ScheduleFreeAdamW\(\.\.\.\), "
            r"inner_state='interpolate'\)\.",
        )
        for state in ("maintain", "reset")
    }
    NESTING |= {
        f"{wrapper.__name__} around a MultiOptimizer of ScheduleFreeAdamW": (
            lambda m: keras.optimizers.ScheduleFreeAdamW(),
            lambda o, m, wrapper=wrapper: wrapper(
                keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(o))
            ),
            ValueError,
            words,
        )
        for wrapper, words in (
            (Lookahead, r"'interpolate'\) inside the MultiOptimizer\."),
            (LazyOptimizer, "inside MultiOptimizer, not around"),
        )
    }
    NESTING["LazyOptimizer(ScheduleFreeAdamW)"] = (
        lambda m: keras.optimizers.ScheduleFreeAdamW(),
        lambda o, m: LazyOptimizer(o),
        ValueError,
        r"cannot go around ScheduleFreeAdamW\..*LazyOptimizer\(AdamW\(\.\.\.\)\) with "
        "a learning rate schedule.*MultiOptimizer",
    )


def shared_by_two() -> keras.Optimizer:
    inner = adam()
    first, second = LazyOptimizer(inner), LazyOptimizer(inner)
    build(first, model_of())
    return second


MODELS = {
    f"{wrapper.__name__}: {name}": (given(wrapper), use, error, words)
    for wrapper in WRAPPERS
    for name, given, use, error, words in (
        (
            "build of a model",
            lambda cls: lambda m: cls(adam()),
            lambda o, m: o.build(m),
            TypeError,
            r"not the Sequential 'net'.*build\(model\.trainable_variables\)",
        ),
        (
            "build of nothing",
            lambda cls: lambda m: cls(adam()),
            lambda o, m: o.build(None),
            TypeError,
            r"build\(model\.trainable_variables\).*None of type NoneType",
        ),
        (
            "build of one variable",
            lambda cls: lambda m: cls(adam()),
            lambda o, m: o.build(m.trainable_variables[0]),
            TypeError,
            r"list of weights: .*build\(model\.trainable_variables\)\. Received",
        ),
        (
            "build of arrays",
            lambda cls: lambda m: cls(adam()),
            lambda o, m: o.build(m.get_weights()),
            TypeError,
            r"model\.trainable_variables.*array of shape \(12, 3\) of type ndarray",
        ),
        (
            "inner optimizer of another model",
            lambda cls: lambda m: cls(build(adam(), model_of("others"))),
            build,
            ValueError,
            rf"Adam .*built for other weights.*words/embeddings.*{wrapper.__name__}\(",
        ),
        (
            "one optimizer for two models",
            lambda cls: compiled(cls),
            lambda o, m: train(o, model_of()),
            ValueError,
            rf"other weights.*its own {wrapper.__name__}\(",
        ),
        (
            "layer that was added since",
            lambda cls: lambda m: add_layer(compiled(cls)(m), m),
            lambda o, m: train(o, m),
            ValueError,
            "does not know .*more/kernel.* with new weights, .*needs a new one",
        ),
        (
            "layer that was unfrozen since",
            lambda cls: lambda m: build_without_head(cls(adam()), m),
            lambda o, m: o.apply(ones(m), m.trainable_variables),
            ValueError,
            "does not know .*head/kernel.* newly unfrozen ones, needs a new one",
        ),
        (
            "table that was swapped since",
            lambda cls: built(cls),
            lambda o, m: o.apply(ones(m), model_of("others").trainable_variables),
            ValueError,
            "does not know .*others/embeddings.*with new weights, .*needs a new one",
        ),
        (
            "set_weights before the build",
            lambda cls: lambda m: cls(adam()),
            lambda o, m: o.set_weights([np.int32(3), np.int32(2), np.float32(0.1)]),
            ValueError,
            rf"{wrapper.__name__} is not built.*\.build\(model\.trainable_variables\)",
        ),
        (
            "another inner optimizer, set",
            lambda cls: built(cls),
            lambda o, m: setattr(o, "inner_optimizer", adam()),
            AttributeError,
            rf"`inner_optimizer` is fixed.*new optimizer, {wrapper.__name__}\(\.\.\.\)",
        ),
    )
}
MODELS |= {
    f"{name}, set {when}": (
        given,
        lambda o, m, name=name, value=value: setattr(o, name, value),
        AttributeError,
        rf"`{name}` is fixed.*new optimizer, Lookahead\(\.\.\.\)",
    )
    for name, value in (("k", 7), ("alpha", 0.25), ("inner_state", "reset"))
    for when, given in (
        ("before the build", lambda m: Lookahead(adam())),
        ("after the build", built(Lookahead)),
    )
}
MODELS |= {
    "moments that do not exist, set": (
        built(LazyOptimizer),
        lambda o, m: setattr(o, "moments", "frozen"),
        ValueError,
        "`moments` .*'decay' or 'freeze'.*Received: moments='frozen'",
    ),
    "slots that start from the weights, and reset": (
        lambda m: Lookahead(FromTheWeights(0.1), inner_state="reset"),
        build,
        ValueError,
        "inner_state='reset'.*FromTheWeights.*'maintain' or 'interpolate'",
    ),
    "slots that start from the weights, and reset, in apply": (
        lambda m: Lookahead(FromTheWeights(0.1), inner_state="reset"),
        lambda o, m: o.apply(ones(m), m.trainable_variables),
        ValueError,
        "inner_state='reset'.*FromTheWeights.*'maintain' or 'interpolate'",
    ),
}


def add_layer(optimizer, model):
    model.add(keras.layers.Dense(1, name="more"))
    return optimizer


def train(optimizer, model):
    model.compile(optimizer, "mse", **QUICK)
    before = model.get_weights()
    try:
        model.train_on_batch(*make_data(4))
    finally:
        assert_same_bits(model.get_weights(), before)


def build_without_head(optimizer, model):
    optimizer.build(model.layers[0].trainable_variables)
    return optimizer


STEPS = {
    f"{name}: {what}": (given, use, error, words)
    for name, given in (
        ("Lookahead", built(Lookahead)),
        ("LazyOptimizer", built(LazyOptimizer)),
        ("both", built(both)),
        ("not built", lambda m: both(adam())),
    )
    for what, use, error, words in (
        (
            "too few gradients",
            lambda o, m: o.apply(ones(m)[:2], m.weights),
            ValueError,
            "one gradient per weight, or None.*2 gradients for 3 weights",
        ),
        (
            "too many gradients",
            lambda o, m: o.apply(ones(m), m.weights[:2]),
            ValueError,
            "one gradient per weight, or None.*3 gradients for 2 weights",
        ),
        (
            "no gradient at all",
            lambda o, m: o.apply([None] * 3, m.weights),
            ValueError,
            r"No gradients provided for any variable\. Each of the 3 is None",
        ),
        (
            "pairs",
            lambda o, m: o.apply(list(zip(ones(m), m.weights, strict=True)), m.weights),
            TypeError,
            r"apply\(gradients, weights\)\. For pairs.*apply_gradients\(pairs\).*type",
        ),
        (
            "an iterator of pairs",
            lambda o, m: o.apply(zip(ones(m), m.weights, strict=True), m.weights),
            TypeError,
            r"apply_gradients\(pairs\).* of type zip",
        ),
        (
            "one gradient, not in a list",
            lambda o, m: o.apply(ones(m)[0], m.weights[:1]),
            TypeError,
            r"a list of gradients.*array of shape \(12, 3\)",
        ),
        (
            "one weight, not in a list",
            lambda o, m: o.apply(ones(m)[:1], m.weights[0]),
            TypeError,
            "a list of weights",
        ),
        (
            "arrays for weights",
            lambda o, m: o.apply(ones(m), m.get_weights()),
            TypeError,
            r"model\.trainable_variables.*array of shape \(12, 3\)",
        ),
        (
            "gradient of a table with fewer rows",
            lambda o, m: o.apply([ops.ones((5, 3)), *ones(m)[1:]], m.weights),
            ValueError,
            r"words/embeddings has shape \(5, 3\); the weight has \(12, 3\)",
        ),
        (
            "gradient of a row for a table",
            lambda o, m: o.apply([ops.ones((3,)), *ones(m)[1:]], m.weights),
            ValueError,
            r"words/embeddings has shape \(3,\); the weight has \(12, 3\)",
        ),
        (
            "gradient of another shape behind others",
            lambda o, m: o.apply([*ones(m)[:2], ops.ones((1, 1))], m.weights),
            ValueError,
            r"head/bias has shape \(1, 1\); the weight has \(1,\)",
        ),
    )
}
STEPS |= {
    "gradients without weights": (
        lambda m: both(adam()),
        lambda o, m: o.apply(ones(m)),
        ValueError,
        r"not built.*optimizer\.build\(model\.trainable_variables\)",
    ),
    "too few gradients without weights": (
        built(both),
        lambda o, m: o.apply(ones(m)[:2]),
        ValueError,
        "2 gradients for 3 weights",
    ),
}

CALLBACKS = {
    "SlowWeights of a Lookahead": (
        built(Lookahead),
        lambda o, m: SlowWeights(o),
        TypeError,
        r"`end_on_slow_weights` must be True or False, as in SlowWeights\(True\).*Look",
    ),
    "SlowWeights of a number": (
        adam,
        lambda o, m: SlowWeights(save_best_slow_weights=1),
        TypeError,
        "`save_best_slow_weights` must be True or False.* 1 of type int",
    ),
    "SlowWeights without Lookahead": (
        compiled(LazyOptimizer),
        lambda o, m: m.fit(*make_data(4), callbacks=[SlowWeights()], verbose=0),
        ValueError,
        r"no slow weights.*LazyOptimizer.*Lookahead\(\.\.\.\).*inject",
    ),
    "inject into no model": (
        adam,
        lambda o, m: inject(o),
        TypeError,
        r"`model` must be a compiled model: inject\(model\).*of type Adam",
    ),
    "inject before compile": (
        adam,
        lambda o, m: inject(m),
        ValueError,
        "'net' is not compiled.*compile",
    ),
    "inject twice": (
        compiled(Lookahead),
        lambda o, m: inject(m, k=7),
        ValueError,
        "'net' has a Lookahead already.*k=5.*compile",
    ),
    "slow_weights of no model": (
        built(Lookahead),
        lambda o, m: o.slow_weights(adam()).__enter__(),
        TypeError,
        "`model` must be the model that this Lookahead trains.*of type Adam",
    ),
    "slow_weights of another model": (
        built(Lookahead),
        lambda o, m: o.slow_weights(model_of()).__enter__(),
        ValueError,
        "does not train the model 'net'.*Compile the model with it, and build or fit",
    ),
    "slow_weights before the build": (
        lambda m: Lookahead(adam()),
        lambda o, m: o.slow_weights(m).__enter__(),
        ValueError,
        "does not train the model 'net'.*Compile the model with it, and build or fit",
    ),
    "load_slow_weights of another model": (
        built(Lookahead),
        lambda o, m: o.load_slow_weights(model_of()),
        ValueError,
        "does not train the model 'net'.*Compile the model with it, and build or fit",
    ),
}
CALLBACKS |= {
    f"inject with {name}={value}": (
        compiled(lambda inner: inner),
        lambda o, m, given={name: value}: inject(m, **given),
        ValueError,
        f"`{name}`.*Received: {name}={value}",
    )
    for name, value in (("k", 0), ("k", 2.5), ("alpha", 0), ("alpha", nan))
}

CASES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    **CONSTRUCTOR,
    **TABLES,
    **NESTING,
    **MODELS,
    **STEPS,
    **CALLBACKS,
}
# Other models than that of the rest.
OTHER_MODELS: dict[str, tuple[Any, Any, str]] = {
    "no embedding": (without_table, None, r"no embedding table.*head/kernel \(4, 1"),
    "two tables of a name": (
        two_towers,
        ["words"],
        "'words'.*several.*left/words.*right/words.*whole path",
    ),
}


def everything(optimizer: keras.Optimizer, model: keras.Model) -> tuple[list, list]:
    """What a wrong use must not change."""
    arrays, facts = numpy(model.variables), [getattr(model, "optimizer", None)]
    for each in chain(optimizer):
        arrays += numpy(each.variables)
        facts += [each.built, is_taken_over(each), each.get_config()]
    return arrays, facts


def check(optimizer, model, use, error, words):
    before, facts = everything(optimizer, model)
    with pytest.raises(error, match=f"(?s){words}"):
        use(optimizer, model)
    after, facts_after = everything(optimizer, model)
    assert facts_after == facts
    assert_same_bits(after, before)


@pytest.mark.parametrize("case", [*CASES, *OTHER_MODELS])
def test_wrong_use(case):
    if case in OTHER_MODELS:
        make_model, layers, words = OTHER_MODELS[case]
        optimizer = LazyOptimizer(adam(), layers)
        check(optimizer, make_model(), build, ValueError, words)
    else:
        given, use, error, words = CASES[case]
        model = model_of()
        check(given(model), model, use, error, words)


@pytest.mark.parametrize("wrap", [*WRAPPERS, both], ids=["ahead", "lazy", "both"])
def test_a_config_runs_no_code(wrap, tmp_path, monkeypatch):
    """What a file names is looked up among what Keras knows, and never called."""
    trap = tmp_path / "trap.py"
    trap.write_text("raise SystemExit('imported')\ndef spring(**_): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = wrap(adam()).get_config()
    innermost = config
    while "optimizer" in innermost:
        outer, innermost = innermost, innermost["optimizer"]["config"]
    foreign = {"class_name": "spring", "registered_name": None, "config": {}}
    for inner in (
        {"module": "trap", **foreign},
        {"module": "os", **foreign, "class_name": "abort"},
        {"module": "builtins", "class_name": "function", "config": "exit"},
    ):
        outer["optimizer"] = inner
        with pytest.raises((TypeError, ValueError), match=r"locate|deserializ"):
            type(wrap(adam())).from_config(config)


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
@pytest.mark.parametrize("wrap", [*WRAPPERS, both], ids=["ahead", "lazy", "both"])
def test_a_lambda_in_a_file_is_not_run(wrap, tmp_path):
    model = model_of()
    model.compile(wrap(keras.optimizers.SGD(lambda: 0.1)), "mse")
    config = model.optimizer.get_config()
    with pytest.raises(ValueError, match=r"lambda.*safe_mode=False"):
        type(model.optimizer).from_config(config)
    model.save(tmp_path / "model.keras")
    with pytest.raises((TypeError, ValueError), match=r"lambda|could not be deserial"):
        keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert float(loaded.optimizer.learning_rate) == pytest.approx(0.1)
