"""Facts about the network from one trace before the first update: where to cut it, which operations it has, which states it changes, its memory.

The trace is a scratch graph that is never run.
"""

import collections
import contextlib
import math
import re
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.keras_private import logits as logits_of
from keras_hf.problem.capture import is_capturable, recorded_uses
from keras_hf.problem.hidden_states import recorded_hidden_states, recurrent_layers, require_recordable
from keras_hf.problem.recurrence import recorded_loops

# Bytes that a kept linearization holds per byte that the forward pass and the loss compute: 1.6 to 1.8 were measured on dense autoencoders.
_KEPT_PER_BYTE = 2
# The same for the body of a loop. Its derivatives are loops, too, which pass values by lists: 3.1 to 4.8 were measured on LSTM, GRU and SimpleRNN.
_KEPT_PER_BYTE_OF_LOOP = 4
# Memory in bytes for the kept piece, from which `micro_batch_size=None` derives the number of cases.
_PIECE_MEMORY = 2 * 2**30
# Twice this number is still an int32.
_MOST_CASES = 2**30

# In graph mode, `tf.autodiff.ForwardAccumulator` silently loses the tangent of a tf.Variable that a nested function, loop or branch captures.
_NESTING = re.compile("^(Stateful|Stateless)?(PartitionedCall|While|If|Case)$")
_LOOPS = frozenset({"StatelessWhile", "While"})
# Operations inside a function that compute nothing: they pass on tensors of other operations, or weights, which do not grow with the cases.
_PASSED_ON = frozenset({"Const", "Identity", "Placeholder", "ReadVariableOp"})
# Random numbers from TensorFlow's own generators, whose state an update cannot hold fixed.
_RANDOM = re.compile(
    "^(Random|TruncatedNormal|ParameterizedTruncatedNormal|Multinomial|Stateful(Uniform|Standard|Truncated|Random)|Rng|NonDeterm)"
)
# Matrix products, and the operations that XLA fuses around them. Their second derivatives compile on every device, in every float type.
_BATCHED_PRODUCTS = frozenset({"BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"})
_PRODUCTS = _BATCHED_PRODUCTS | {"MatMul"}
_FUSIBLE = frozenset(
    "Add AddN AddV2 BiasAdd Cast Elu Erf Erfc Exp Expm1 LeakyRelu Log Log1p LogSoftmax Max Maximum Mean Min Minimum Mul Neg Pow RealDiv Reciprocal "
    "Relu Relu6 Rsqrt Select SelectV2 Selu Sigmoid Sign Sin Cos Softmax Softplus Sqrt Square SquaredDifference Sub Sum Tanh "
    # These occur in derivatives with respect to the inputs, as in physics-informed networks.
    "BiasAddGrad Cosh InvGrad ReciprocalGrad RsqrtGrad SigmoidGrad Sinh SoftplusGrad SqrtGrad TanhGrad".split()
)
_MOVING = frozenset(
    "BroadcastGradientArgs BroadcastTo ConcatOffset ConcatV2 Const Equal ExpandDims Fill GatherV2 Greater GreaterEqual Identity Less "
    "LessEqual LogicalAnd LogicalNot LogicalOr NoOp NotEqual OneHot Pack Pad PadV2 Placeholder Prod Range Rank ReadVariableOp Reshape "
    "Shape Slice Split SplitV Squeeze StopGradient StridedSlice StridedSliceGrad Tile Transpose Unpack ZerosLike OnesLike".split()
)


# Machine epsilons. NumPy does not know bfloat16.
_EPSILONS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}

# Operations that only pass a weight on to another operation.
_SAME_VALUE = frozenset({"Cast", "ExpandDims", "Identity", "ReadVariableOp", "Reshape"})


# Operations that are linear in all their inputs together, and operations that are linear in one input if the others are constant.
_LINEAR = frozenset(
    "Add AddN AddV2 BroadcastTo Cast ConcatV2 ExpandDims GatherV2 Identity Mean Neg Pack Reshape Squeeze StridedSlice Sub Sum Tile Transpose".split()
)
_BILINEAR = frozenset({"DivNoNan", "Mul", "RealDiv"})
_ENTRYWISE = frozenset(
    "Add AddN AddV2 Cast Exp Expm1 Identity Log Log1p Maximum Minimum Mul Neg Pow RealDiv Reciprocal Relu Rsqrt Select SelectV2 Sigmoid Sign "
    "Abs Softplus Sqrt Square SquaredDifference Sub Tanh".split()
)


# In TensorFlow 2.21 on CPUs; see `docs/support.md`.
_WRONG_IN_SOME_FORMS = {
    "ResizeBilinear": 'use `interpolation="nearest"`, or `Conv2DTranspose`.',
    "MaxPool": 'use `padding="valid"` or `strides=pool_size`, or average pooling.',
    "MaxPool3D": 'use `padding="valid"` or `strides=pool_size`, or average pooling.',
}


class Structure(NamedTuple):
    """Facts about the traced network, all of them Python values.

    Attributes:
        cuts: Tuple of strings, for each output of the network "logits", "output", "both" or "unused": where the loss is cut from the network.
        states: List of `keras.Variable`, those of `Task.states` that a forward pass changes.
        has_added_loss: Whether layers add losses in `call`.
        nesting_ops: List of strings, the types of operations in the forward pass that hold functions, loops or branches.
        is_random: Whether the forward pass draws random numbers.
        is_vectorizable: Whether `tf.vectorized_map` is right for the forward pass: it has no loops, which are refused under a mask, and no batched
            matrix products, for which oneDNN writes out of bounds if the batch is one case (TensorFlow 2.21, issue 117700: the process dies).
        has_vectorizable_rows: Whether it is right for single cases' outputs and their first derivatives, if loops of recurrent layers are replaced by
            those of `recurrence`.
        is_fusible: Whether XLA compiles the second derivatives of the forward pass, and into fast code, on every device.
        layer_of_op: Dict, type of operation -> name of the first layer that uses it.
        bytes_by_power: Tuple of integers, memory of a kept linearization per case: coefficients of the powers, from the zeroth on, of the longest
            axis of unknown length in the data. A single number if all lengths are known.
        unknown_axes: List of pairs of integers, the axes of unknown length: the number of the tensor among those of the data, and of the axis in it.
        combinations: List of strings, for each term of the compiled loss how its values on pieces combine; see `loss_terms.LossTerm`.
        float_types: Frozenset of the names of the float types that the forward pass computes in.
        has_curvature: Whether the compiled loss has a second derivative with respect to any output.
        is_entrywise: Whether the compiled loss is a sum of functions of single entries of the tensors at which it is cut, so that its second
            derivative is diagonal.
        captured: List of `keras.Layer`, those whose squared gradients `capture` computes from inputs and pre-activation gradients.
        batch_normalizations: List of `keras.layers.BatchNormalization`, those that normalize by the statistics of the piece.
        hidden_layers: List of `keras.layers.RNN`, those whose hidden states are damped; empty without structural damping.
    """

    cuts: tuple
    states: list
    has_added_loss: bool
    nesting_ops: list
    is_random: bool
    is_vectorizable: bool
    has_vectorizable_rows: bool
    is_fusible: bool
    layer_of_op: dict
    bytes_by_power: tuple
    unknown_axes: list
    combinations: list
    float_types: frozenset
    has_curvature: bool
    is_entrywise: bool
    captured: list
    batch_normalizations: list
    hidden_layers: list

    def cut(self, y_pred):
        """Returns the list of tensors that the loss is a function of: the logits if it is computed from them, else the outputs."""
        leaves = keras.tree.flatten(y_pred)
        taken = [(leaf, cut) for leaf, cut in zip(leaves, self.cuts, strict=True) if cut != "unused"]
        tensors = {"logits": lambda leaf: [logits_of(leaf)], "both": lambda leaf: [leaf, logits_of(leaf)]}
        return [tensor for leaf, cut in taken for tensor in tensors.get(cut, lambda leaf: [leaf])(leaf)]

    @property
    def measured_normalizations(self):
        """List of the BatchNormalization layers whose moving statistics only evaluation uses. With `renorm`, training uses them, too."""
        changed = {id(state) for state in self.states}
        return [
            layer
            for layer in self.batch_normalizations
            if id(layer.moving_variance) in changed and not getattr(layer, "renorm", False)
        ]

    @property
    def statistics(self):
        """The places in `states` of the moving mean and the moving variance of these layers: a list of pairs of integers."""
        places = {id(state): place for place, state in enumerate(self.states)}
        return [
            (places[id(layer.moving_mean)], places[id(layer.moving_variance)]) for layer in self.measured_normalizations
        ]

    @property
    def without_rows(self):
        """Reasons why the network has no Jacobian whose rows belong to single cases, each with its cure: a list of pairs of strings."""
        found = (
            (self.batch_normalizations, "BatchNormalization", "use LayerNormalization"),
            (self.is_random, "random layers, such as Dropout", "leave them out"),
            (self.has_added_loss, "losses added in `call`", "add them to the outputs and the compiled loss"),
            (
                "unknown" in self.combinations,
                "a loss of the whole batch",
                "use a loss with one value per case, of that case alone",
            ),
            (self.is_float16 or "bfloat16" in self.float_types, "16-bit arithmetic", "use float64"),
            (self.unknown_axes, "axes of unknown length", "give the input its shape"),
        )
        return [(what, cure) for is_there, what, cure in found if is_there]

    @property
    def suspects(self):
        """Cures, a list of strings, for the layers of which TensorFlow computes some forms of second derivatives wrongly."""
        return [
            f"Layer '{self.layer_of_op[op]}': {cure}"
            for op, cure in _WRONG_IN_SOME_FORMS.items()
            if self.layer_of_op.get(op)
        ]

    @property
    def is_float16(self):
        """Whether the network computes in float16, whose range numbers may leave."""
        return "float16" in self.float_types

    @property
    def rounding(self):
        """The relative difference allowed between two computations of the same number, a float."""
        return 2e-2 if self.float_types & {"float16", "bfloat16"} else 1e-3

    @property
    def epsilon(self):
        """Machine epsilon of the coarsest float type in the forward pass, a float."""
        return max((epsilon for name, epsilon in _EPSILONS.items() if name in self.float_types), default=0.0)

    @property
    def bytes_per_case(self):
        """Memory in bytes of a kept linearization per case, an integer. Axes of unknown length count as of length 1."""
        return sum(self.bytes_by_power)

    def bytes_of(self, data):
        """Returns the memory in bytes of a kept linearization per case of these data.

        An integer, or an int64 scalar if some lengths are known only at run time.

        Args:
            data: `objective.Data`.
        """
        if len(self.bytes_by_power) == 1:
            return self.bytes_per_case
        leaves = keras.tree.flatten(tuple(data))
        lengths = [tf.shape(leaves[leaf], tf.int64)[axis] for leaf, axis in self.unknown_axes]
        longest = tf.maximum(tf.reduce_max(lengths), 1)
        return tf.add_n([num_bytes * longest**power for power, num_bytes in enumerate(self.bytes_by_power)])

    def default_piece_size(self, data, at_most=None):
        """Returns the number of cases whose kept linearization takes about 2 GiB, which is what `micro_batch_size=None` means.

        An integer, or an int32 scalar if `bytes_of` these data is a tensor.

        Args:
            data: `objective.Data`.
            at_most: Integer, the largest number to return, or `None`.
        """
        at_most = min(at_most or _MOST_CASES, _MOST_CASES)
        num_bytes = self.bytes_of(data)
        if tf.is_tensor(num_bytes):
            return tf.cast(tf.clip_by_value(_PIECE_MEMORY // num_bytes, 1, at_most), tf.int32)
        return min(max(1, _PIECE_MEMORY // num_bytes), at_most)


def trace_structure(task, data):
    """Traces network and loss once and returns a `Structure`.

    Args:
        task: `fixed_network.Task`.
        data: `fixed_network.Data`, of which only types and shapes are used.

    Raises:
        ValueError: If the network draws random numbers that no update can hold fixed, or if structural damping finds no hidden states.
    """
    graph = tf.__internal__.FuncGraph("structure")
    with graph.as_default():
        x, y, sample_weight = keras.tree.map_structure(_placeholder, tuple(data))
        capturable = [layer for layer in task.layers if is_capturable(layer) and layer.trainable_variables]
        layers = recurrent_layers(task.layers)
        recurrent = layers if task.structural_damping else []
        recording, loops = recorded_hidden_states(recurrent), recorded_loops(layers)
        scope, recorded = keras.StatelessScope(collect_losses=True), recorded_uses(capturable)
        with scope, recorded as uses, loops as in_loops, recording as calls:
            y_pred = task.network(x)
        if task.structural_damping:
            require_recordable(calls, graph)
        forward = graph.get_operations()
        op_types = {operation.type for operation in forward}
        other_types = {operation.type for operation in forward if operation not in in_loops}
        float_types = frozenset(
            output.dtype.name for operation in forward for output in operation.outputs if output.dtype.is_floating
        )
        layer_of_op = _layers_of_ops(forward, task.layers)
        _check_randomness(graph, layer_of_op)
        num_forward = len(forward)
        leaves = keras.tree.flatten(y_pred)
        logits = [logits_of(leaf) for leaf in leaves]
        cuts, has_curvature, is_entrywise = ["unused"] * len(leaves), False, True
        with keras.StatelessScope():
            terms = task.loss_terms(type(data)(x, y, sample_weight), y_pred)
        if terms:
            sources = [tensor for tensor in leaves + logits if tensor is not None]
            with tf.GradientTape(persistent=True) as outer:
                outer.watch(sources)
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    with keras.StatelessScope():
                        loss = tf.add_n([tf.cast(term.value(), tf.float32) for term in terms])
                forward = graph.get_operations()
                is_entrywise = _is_entrywise(forward[num_forward:], sources, loss)
                gradients = iter(tape.gradient(loss, sources))
            by_output = [next(gradients) for _ in leaves]
            by_logits = [None if tensor is None else next(gradients) for tensor in logits]
            for i, (of_output, of_logits) in enumerate(zip(by_output, by_logits, strict=True)):
                # A loss may use both: the focal loss weights the cross-entropy of logits by the output.
                found = [
                    (name, cut, gradient)
                    for name, cut, gradient in (("output", leaves[i], of_output), ("logits", logits[i], of_logits))
                    if gradient is not None
                ]
                if found:
                    cuts[i] = "both" if len(found) == 2 else found[0][0]
                has_curvature |= any(outer.gradient(gradient, cut) is not None for _, cut, gradient in found)
        num_bytes = _bytes_by_power(forward)
        with keras.StatelessScope():
            combinations = [term.combination() for term in terms]
    # If weights are also used outside the calls of their layer (tied weights, or derivatives of the layer as part of the network), their gradients do
    # not follow from its inputs. The inputs of calls in a loop, or on sparse tensors, cannot be recorded.
    captured = [
        layer
        for layer in capturable
        if all(variable.trainable and _num_uses_of(graph, variable) == len(uses[layer]) for variable in layer.weights)
        and all(isinstance(use.inputs, tf.Tensor) and use.preactivation.graph is graph for use in uses[layer])
    ]
    states = [state for state in task.states if scope.get_current_value(state) is not None]
    changed = {id(state) for state in states}
    return Structure(
        cuts=tuple(cuts),
        states=states,
        has_added_loss=bool(scope.losses),
        nesting_ops=sorted(op for op in op_types if _NESTING.match(op)),
        is_random=any(scope.get_current_value(seed) is not None for seed in task.seeds),
        is_vectorizable=_is_vectorizable(op_types),
        has_vectorizable_rows=_is_vectorizable(other_types),
        is_fusible=op_types <= _PRODUCTS | _FUSIBLE | _MOVING,
        layer_of_op=layer_of_op,
        bytes_by_power=_bytes_of_data(num_bytes, data),
        unknown_axes=_unknown_axes(data),
        combinations=combinations,
        float_types=float_types,
        has_curvature=has_curvature,
        is_entrywise=is_entrywise,
        captured=captured,
        batch_normalizations=[
            layer
            for layer in task.layers
            if isinstance(layer, keras.layers.BatchNormalization) and id(layer.moving_mean) in changed
        ],
        hidden_layers=[layer for layer in recurrent if calls[layer].states],
    )


def _is_vectorizable(op_types):
    return not (op_types & _BATCHED_PRODUCTS or any(map(_NESTING.match, op_types)))


def _num_uses_of(graph, variable):
    """Returns how often a graph uses a `keras.Variable`. A nested function counts once."""
    handles = [inner for outer, inner in graph.captures if outer is variable.value.handle]
    return sum(map(_num_uses, handles))


def _num_uses(value):
    """Returns how many operations use a tensor, directly or after reading, converting or reshaping it."""
    users = [operation for operation in value.consumers() if operation.type != "Shape"]
    return sum(_num_uses(user.outputs[0]) if user.type in _SAME_VALUE else 1 for user in users)


def _placeholder(leaf):
    """Returns a placeholder for data with any number of cases. Even if the number is known, a piece may have another."""
    return None if leaf is None else tf.compat.v1.placeholder(leaf.dtype, [None, *leaf.shape[1:]])


def _unknown_axes(data):
    """Returns `Structure.unknown_axes`."""
    return [
        (number, axis)
        for number, leaf in enumerate(keras.tree.flatten(tuple(data)))
        if leaf is not None
        for axis, length in enumerate(leaf.shape[1:], 1)
        if length is None
    ]


def _bytes_of_data(num_bytes, data):
    """Returns `Structure.bytes_by_power`, from the coefficients by power."""
    if _unknown_axes(data):
        return max(1, num_bytes[0]), *[num_bytes[power] for power in range(1, max(num_bytes, default=0) + 1)]
    # The data's lengths are known, but the trace has lost some of them, or does not show how often a loop turns. As a rule these are numbers of
    # positions or times; the last axis holds features.
    places = [length for leaf in keras.tree.flatten(tuple(data)) if leaf is not None for length in leaf.shape[1:-1]]
    return (max(1, sum(coefficient * max(places, default=1) ** power for power, coefficient in num_bytes.items())),)


def _bytes_by_power(operations):
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
    num_bytes = _bytes_by_power(inner)
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


def _floats_per_case(tensor):
    """Returns the same for a float tensor, and (0, 0) for other types."""
    return _shape_per_case(tensor) if tensor.dtype.is_floating else (0, 0)


def _layers_of_ops(operations, layers):
    """Returns a dict from each type of operation to the name of the first layer that uses it, as far as name scopes show."""
    names = {layer.name for layer in layers}
    found = {}
    for operation in operations:
        # Scopes are named after layers, with a number added if the name was already in use.
        scopes = reversed(operation.name.split("/")[:-1])
        layer = next((name for scope in scopes for name in (scope, re.sub(r"_\d+$", "", scope)) if name in names), None)
        found.setdefault(operation.type, layer)
    return found


def _check_randomness(graph, layer_of_op):
    """Raises if the graph, or a function in it, draws random numbers from TensorFlow's own generators."""
    types = [operation.type for operation in graph.get_operations()]
    types += [node.op for function in graph.as_graph_def().library.function for node in function.node_def]
    for op in types:
        if _RANDOM.match(op):
            layer = layer_of_op.get(op)
            raise ValueError(
                f"{f'Layer {layer!r}' if layer else 'The network'} draws new random numbers in every call, by TensorFlow's {op}. Hessian-free needs "
                "one fixed function per update; draw them from a `keras.random.SeedGenerator` that the layer holds: "
                "`keras.random.normal(shape, seed=self.seed_generator)`."
            )


def _is_entrywise(operations, sources, value):
    """Whether a scalar is certainly a sum of functions of single entries of its sources, by the operations in between.

    Each tensor on the way is of one kind. "entry": it has the shape of a source, and each entry is a function of the source's entry at the same
    place. "single": each entry is a function of one entry of a source. "sum": its entries are sums of such functions. "mixed": anything else.
    Integers and booleans have no derivative and count as constants.
    """
    kinds = {id(source): ("entry", i) for i, source in enumerate(sources)}
    for operation in operations:
        found = [kinds[id(tensor)] for tensor in operation.inputs if id(tensor) in kinds]
        # Complex numbers and the tensor lists of loops count: they lead back to floats.
        outputs = [tensor for tensor in operation.outputs if not (tensor.dtype.is_integer or tensor.dtype.is_bool)]
        if not found or not outputs or operation.type in ("OnesLike", "StopGradient", "ZerosLike"):
            continue
        is_denominator = "Div" in operation.type and id(operation.inputs[1]) in kinds
        kind = _kind(operation, found, sources, is_denominator)
        kinds.update({id(tensor): kind for tensor in outputs})
    return kinds.get(id(value), ("mixed", None))[0] != "mixed"


def _kind(operation, found, sources, is_denominator):
    """Returns the kind, as in `_is_entrywise`, of an operation's output, from those of the inputs that depend on a source."""
    op, names = operation.type, {name for name, _ in found}
    if "mixed" in names:
        return "mixed", None
    if op in _ENTRYWISE and names == {"entry"} and len({source for _, source in found}) == 1:
        source = found[0][1]
        same = str(operation.outputs[0].shape) == str(sources[source].shape)
        if same or len(found) == 1:
            return "entry" if same else "single", source
    if op in _ENTRYWISE and len(found) == 1 and names == {"single"}:
        return found[0]
    if op in _LINEAR or (op in _BILINEAR and len(found) == 1 and not is_denominator):
        moves = op not in ("Sum", "Mean") and len(found) == 1 and "sum" not in names
        return ("single", found[0][1]) if moves else ("sum", None)
    return "mixed", None


@contextlib.contextmanager
def second_derivatives_explained(layer_of_op):
    """Context in which TensorFlow's errors about missing second derivatives become errors that name the layer and the cure.

    Args:
        layer_of_op: Dict; see `Structure`.
    """
    try:
        yield
    except (LookupError, NotImplementedError, TypeError, ValueError) as error:
        missing = re.search(r"gradient registry has no entry for: (\w+)", str(error))
        if missing:
            op = re.sub("Grad$|Backprop", "", missing[1])
            layer = layer_of_op.get(op)
            what = f"Layer {layer!r}" if layer else "A layer of the network, or the loss,"
            raise ValueError(
                f"{what} has no second derivative: TensorFlow has none for {op}, and every product needs one. "
                f"{_CURES.get(op, 'Write it in operations that can be differentiated twice.')}"
            ) from error
        if "recompute_grad" in str(error) or "keywords arguments only when eager" in str(error):
            raise ValueError(
                "A layer under `keras.RematScope` or `tf.recompute_grad` has no second derivative, and every product needs one. Take the scope away "
                "and bound memory by `HessianFree(micro_batch_size=...)`."
            ) from error
        raise


_CURES = {
    "Softsign": "Use `lambda x: x / (1 + keras.ops.abs(x))` as the activation.",
    "ResizeBicubic": 'Use `interpolation="nearest"`, or `Conv2DTranspose`.',
    "CudnnRNNV3": "Set `use_cudnn=False`.",
}
