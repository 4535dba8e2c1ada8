"""An estimate of the memory that a linearization keeps per case, from the shapes in one trace of network and loss."""

import collections
import math

import keras
import tensorflow as tf

# Bytes that a kept linearization holds per byte that the forward pass and the loss compute: 1.6 to 1.8 were measured on dense autoencoders.
_KEPT_PER_BYTE = 2
# The same for the body of a loop. Its derivatives are loops, too, which pass values by lists: 3.1 to 4.8 were measured on LSTM, GRU and SimpleRNN.
_KEPT_PER_BYTE_OF_LOOP = 4

_LOOPS = frozenset({"StatelessWhile", "While"})
# Operations inside a function that compute nothing: they pass on tensors of other operations, or weights, which do not grow with the cases.
_PASSED_ON = frozenset({"Const", "Identity", "Placeholder", "ReadVariableOp"})


def unknown_axes(data):
    """Returns `structure.Structure.unknown_axes`."""
    return [
        (number, axis)
        for number, leaf in enumerate(keras.tree.flatten(tuple(data)))
        if leaf is not None
        for axis, length in enumerate(leaf.shape[1:], 1)
        if length is None
    ]


def bytes_of_data(num_bytes, data):
    """Returns `structure.Structure.bytes_by_power`, from the coefficients by power."""
    if unknown_axes(data):
        return max(1, num_bytes[0]), *[num_bytes[power] for power in range(1, max(num_bytes, default=0) + 1)]
    # The data's lengths are known, but the trace has lost some of them, or does not show how often a loop turns. As a rule these are numbers of
    # positions or times; the last axis holds features.
    places = [length for leaf in keras.tree.flatten(tuple(data)) if leaf is not None for length in leaf.shape[1:-1]]
    return (max(1, sum(coefficient * max(places, default=1) ** power for power, coefficient in num_bytes.items())),)


def bytes_by_power(operations):
    """Returns the bytes per case that a linearization of operations keeps: a `Counter`, power of the run-time length -> coefficient."""
    num_bytes, entries = collections.Counter(), {}
    for operation in operations:
        entries.update(_entries_of_outputs(operation, entries))
        functions = _functions_of(operation)
        for name, function in functions:
            # The condition of a loop keeps nothing.
            num_bytes.update(_bytes_inside(operation, function) if name != "cond" else {})
        for output in [] if functions else operation.outputs:
            floats, power = entries.get(id(output), (0, 0)) if output.dtype.is_floating else (0, 0)
            num_bytes[power] += _KEPT_PER_BYTE * floats * output.dtype.size
    return num_bytes


def _bytes_inside(operation, function):
    """Returns the same for a function of an operation: a branch, a nested function, or the body of a loop with all its turns."""
    inner = [operation for operation in function.get_operations() if operation.type not in _PASSED_ON]
    num_bytes = bytes_by_power(inner)
    if operation.type not in _LOOPS:
        return num_bytes
    turns = _turns(operation)
    if turns is None and not any(num_bytes.values()):
        # There is no axis of cases: this is a loop over cases, as `tf.map_fn` makes. A turn is a case.
        outputs = [output for operation in inner for output in operation.outputs if output.dtype.is_floating]
        sizes = [(output.shape.num_elements() or 0) * output.dtype.size for output in outputs]
        return collections.Counter({0: _KEPT_PER_BYTE_OF_LOOP * sum(sizes)})
    times, more = (1, 1) if turns is None else (turns, 0)
    times *= _KEPT_PER_BYTE_OF_LOOP // _KEPT_PER_BYTE
    return collections.Counter({power + more: times * coefficient for power, coefficient in num_bytes.items()})


def _turns(loop):
    """Returns the largest number of turns that a loop can make, an integer, or `None` if that is not known before it runs."""
    (condition,) = [function for name, function in _functions_of(loop) if name == "cond"]
    outside = {id(inner): outer for inner, outer in zip(condition.inputs, loop.inputs, strict=True)}
    bounds = [
        tf.get_static_value(outside.get(id(operation.inputs[1]), operation.inputs[1]))
        for operation in condition.get_operations()
        if operation.type == "Less" and operation.inputs[1].dtype.is_integer and operation.inputs[1].shape.rank == 0
    ]
    return min((int(bound) for bound in bounds if bound is not None), default=None)


def _functions_of(operation):
    """Returns the functions that an operation holds: a list of pairs of an attribute's name and a `FuncGraph`."""
    attributes = operation.op_def.attr if operation.op_def is not None else []
    names = [
        (attribute.name, function.name)
        for attribute in attributes
        if attribute.type in ("func", "list(func)")
        for function in _as_list(operation.get_attr(attribute.name))
    ]
    found = [(attribute, operation.graph._get_function(name)) for attribute, name in names]
    return [(attribute, function.graph) for attribute, function in found if function is not None]


def _as_list(value):
    return value if isinstance(value, list) else [value]


def _entries_of_outputs(operation, entries):
    """Returns the entries per case of an operation's outputs, a dict like `entries`. Their first axis may merge cases with positions.

    Dense layers on sequences compute in `(cases * places, units)`, and losses in shapes that the trace does not know: their shapes alone show too few
    entries. A reshape keeps the number of entries. Any other operation is taken to have as many rows per case as its largest input.

    Args:
        operation: `tf.Operation`.
        entries: Dict, id of a tensor -> pair as returned by `_shape_per_case`, for the tensors before this operation.
    """
    known = [(entries[id(tensor)], tensor) for tensor in operation.inputs if entries.get(id(tensor), (0, 0))[0]]
    (largest, largest_power), source = max(known, key=lambda found: found[0][::-1], default=((0, 0), None))
    found = {}
    for output in operation.outputs:
        size, power = _shape_per_case(output)
        if source is not None and size:
            # The number of rows per case, as a factor and a power of the run-time length.
            row, row_power = _row(operation, source, output)
            factor, more = largest / row, largest_power - row_power
            # The trace does not show the sizes of reductions of lost shapes, nor of reshapes that split rows.
            if power + more >= 0 and (more or factor > 1):
                size, power = round(factor * size), power + more
        found[id(output)] = size, power
    return found


def _row(operation, source, output):
    """Returns the number of entries in a row of an operation's largest input, with its power of the run-time length, as `_shape_per_case` does."""
    if operation.type == "MatMul" and source is operation.inputs[0]:
        inner = operation.inputs[1].shape[1 if operation.get_attr("transpose_b") else 0]
        if inner is not None:
            return inner, 0
    return _shape_per_case(output if operation.type == "Reshape" else source)


def _shape_per_case(tensor):
    """Returns the entries per case of a tensor by its shape, and the number of axes of unknown length to multiply them by.

    (0, 0) without an axis of cases. That axis has unknown length; it is the first one, or the second where recurrent layers put time first.
    """
    shape = tensor.shape
    if not shape.rank or shape.is_fully_defined():
        return 0, 0
    known = [length for length in shape if length is not None]
    return math.prod(known), shape.rank - len(known) - 1
