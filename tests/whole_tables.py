"""What a training step computes that is as long as a table.

A step by rows reads and writes rows of a table, of its slots and of what else has an
entry a row. Here each backend's own record of the step is searched for results of the
table's shape that are no write in place: a cast, a copy, a sum, zeros.
"""

import re

from harness import BACKEND, tensor
from traffic import note_layouts

# What only hands an array on, or writes some of its rows.
HLO_IN_PLACE = [
    "parameter",
    "get-tuple-element",
    "tuple",
    "while",
    "conditional",
    "call",
    "bitcast",
    "scatter",
    "dynamic-update-slice",
    "opt-barrier",
]


def whole_results(model, x, y, jit=False, in_loops=False):
    """Descriptions of results whose first dimension is that of the model's table.

    Args:
        model: built and compiled; its table has a length that nothing else has.
        jit: on TensorFlow, whether XLA compiles the step.
        in_loops: whether to search what a step does under a condition, too.
    """
    rows = next(w.shape[0] for w in model.weights if "embeddings" in w.path)
    return globals()[f"_{BACKEND}"](model, x, y, rows, jit, in_loops)


def _jax(model, x, y, rows, jit, in_loops):
    import jax

    model._symbolic_build(data_batch=(x, y))
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in part] for part in parts)

    def step(state, data):  # its own, so that JAX traces it anew
        return model.train_step(state, data)

    note_layouts(model)
    lowered = jax.jit(step, donate_argnums=0).lower(state, (x, y))
    return hlo_results(lowered.compile().as_text(), rows, in_loops)


def hlo_results(text, rows, in_loops):
    """The same, of a program that XLA has compiled."""
    computations = {}
    for block in re.split(r"\n(?=\S)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", block)
        if name:
            computations[name[1]] = block
    entry = next(b for b in computations.values() if b.startswith("ENTRY"))
    searched = [entry]
    if in_loops:
        bodies = re.findall(r"body=%?([\w.\-]+)", entry)
        searched += [computations[name] for name in bodies]
    found = []
    result = re.compile(rf"%?(\S+) = \w+\[{rows}[,\]]\S* ([\w\-]+)\(")
    for line in "\n".join(searched).splitlines():
        hit = result.search(line)
        if not hit or hit[2] in HLO_IN_PLACE:
            continue
        if hit[2] == "fusion":
            called = re.findall(r"calls=%?([\w.\-]+)", line)[0]
            lines = computations[called].splitlines()
            root = next(each for each in lines if each.strip().startswith("ROOT"))
            if re.search(r"\} (scatter|dynamic-update-slice)\(", root):
                continue
        found.append(line.strip()[:160])
    return found


def _tensorflow(model, x, y, rows, jit, in_loops):
    import tensorflow as tf

    function = tf.function(
        lambda x, y: model.train_step((x, y)), jit_compile=jit, autograph=False
    )
    graph = function.get_concrete_function(tf.constant(x), tf.constant(y)).graph
    if jit:
        text = function.experimental_get_compiler_ir(tf.constant(x), tf.constant(y))(
            stage="optimized_hlo"
        )
        return hlo_results(text, rows, in_loops)
    found = []
    for op in graph.get_operations():
        shapes = [o.shape.as_list() for o in op.outputs if o.shape.rank]
        if any(shape[0] == rows for shape in shapes) and op.type != "Placeholder":
            found.append(f"{op.type} {op.name} {shapes}")
    return found


def _torch(model, x, y, rows, jit, in_loops):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Results(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            aliases = any(r.alias_info for r in function._schema.returns)
            is_plain = type(result) in (torch.Tensor, torch.nn.Parameter)
            is_plain = is_plain and result.layout == torch.strided
            if is_plain and result.ndim and result.shape[0] == rows and not aliases:
                found.append(f"{function} {tuple(result.shape)}")
            return result

    model.train_on_batch(x, y)
    with Results():
        model.train_step((tensor(x), tensor(y)))
    return found
