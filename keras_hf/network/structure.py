"""Facts about the network from one trace before the first update: where to cut it, which operations it has, which states it changes, its memory.

The trace is a scratch graph that is never run.
"""

import re
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_hf.common.keras_private import logits as logits_of
from keras_hf.common.vectors import epsilon
from keras_hf.network import memory
from keras_hf.network.capture import is_capturable, recorded_uses
from keras_hf.network.hidden_states import recorded_hidden_states, recurrent_layers, require_recordable
from keras_hf.network.recurrence import recorded_loops
from keras_hf.network.spectral_norm import UnitSpectralNorm
from keras_hf.network.time_steps import has_time_steps, weights_by_rows

# Memory in bytes for the kept micro-batch, from which `micro_batch_size=None` derives the number of cases.
_MICRO_BATCH_MEMORY = 2 * 2**30
# Twice this number is still an int32.
_MOST_CASES = 2**30

# In graph mode, `tf.autodiff.ForwardAccumulator` silently loses the tangent of a tf.Variable that a nested function, loop or branch captures.
_NESTING = re.compile("^(Stateful|Stateless)?(PartitionedCall|While|If|Case)$")
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


class Structure(NamedTuple):
    """Facts about the traced network, all of them Python values.

    Attributes:
        cuts: Tuple of strings, for each output of the network "logits", "output", "both" or "unused": where the loss is cut from the network.
        states: List of `keras.Variable`, the non-trainable values that a forward pass changes, except seeds.
        has_added_loss: Whether layers add losses in `call`.
        nesting_ops: List of strings, the types of operations in the forward pass that hold functions, loops or branches.
        is_random: Whether the forward pass draws random numbers.
        is_vectorizable: Whether `tf.vectorized_map` is right for the forward pass: it has no loops, which are refused under a mask, and no batched
            matrix products, for which oneDNN writes out of bounds if the batch is one case (TensorFlow 2.21, issue 117700: the process dies).
        has_vectorizable_rows: Whether it is right for single cases' outputs and their first derivatives, if loops of recurrent layers are replaced by
            those of `recurrence`, as far as loops and products decide it; see `loops.mapped`.
        is_fusible: Whether XLA is to compile the passes of single cases: the network solves equations, and XLA compiles their second derivatives on
            every device. Updates of Dense layers on data gained up to a fifth by it, and paid 1.4 s for every other number of cases.
        layer_of_op: Dict, type of operation -> name of the first layer that uses it.
        bytes_by_power: Tuple of integers, memory of a kept linearization per case: coefficients of the powers, from the zeroth on, of the longest
            axis of unknown length in the data. A single number if all lengths are known.
        unknown_axes: List of pairs of integers, the axes of unknown length: the number of the tensor among those of the data, and of the axis in it.
        num_outputs: Integer, the numbers of a case at which the loss is cut from the network; `None` where a length is unknown.
        combinations: List of strings, for each term of the compiled loss how its values on micro-batches combine; see `loss_terms.LossTerm`.
        float_types: Frozenset of the names of the float types that the forward pass computes in.
        has_curvature: Whether the compiled loss has a second derivative with respect to any output.
        is_entrywise: Whether the compiled loss is a sum of functions of single entries of the tensors at which it is cut, so that its second
            derivative is diagonal.
        captured: List of `keras.Layer`, those whose squared gradients `capture` computes from inputs and pre-activation gradients.
        batch_normalizations: List of `keras.layers.BatchNormalization`, those that normalize by the statistics of the micro-batch.
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
    num_outputs: int | None
    combinations: list
    float_types: frozenset
    has_curvature: bool
    is_entrywise: bool
    captured: list
    batch_normalizations: list
    hidden_layers: list

    def cut(self, y_pred):
        """Returns the list of tensors that the loss is a function of: the logits if it is computed from them, else the outputs."""
        return _cut(keras.tree.flatten(y_pred), self.cuts)

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
        return max((epsilon(name) for name in self.float_types if "float8" not in name), default=0.0)

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

    def default_micro_batch_size(self, data, at_most=None):
        """Returns the number of cases whose kept linearization takes about 2 GiB, which is what `micro_batch_size=None` means.

        An integer, or an int32 scalar if `bytes_of` these data is a tensor.

        Args:
            data: `objective.Data`.
            at_most: Integer, the largest number to return, or `None`.
        """
        at_most = min(at_most or _MOST_CASES, _MOST_CASES)
        num_bytes = self.bytes_of(data)
        if tf.is_tensor(num_bytes):
            return tf.cast(tf.clip_by_value(_MICRO_BATCH_MEMORY // num_bytes, 1, at_most), tf.int32)
        return min(max(1, _MICRO_BATCH_MEMORY // num_bytes), at_most)


def trace_structure(task, data):
    """Traces network and loss once and returns a `Structure`.

    Args:
        task: `fixed_network.Task`.
        data: `fixed_network.Data`, of which only types and shapes are used.

    Raises:
        ValueError: If the network draws random numbers that no update can hold fixed, if a layer assigns trainable weights, or if structural damping
            finds no hidden states.
    """
    graph = tf.__internal__.FuncGraph("structure")
    with graph.as_default():
        x, y, sample_weight = keras.tree.map_structure(_placeholder, tuple(data))
        capturable = [layer for layer in task.layers if is_capturable(layer) and layer.trainable_variables]
        layers = recurrent_layers(task.layers)
        recurrent = layers if task.structural_damping else []
        recording, loops = recorded_hidden_states(recurrent), recorded_loops(layers)
        scope, recorded = _ChangesRecorded(collect_losses=True), recorded_uses(capturable)
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
        with keras.StatelessScope():
            terms = task.loss_terms(type(data)(x, y, sample_weight), y_pred)
        leaves = keras.tree.flatten(y_pred)
        cuts, has_curvature, is_entrywise, operations = _cut_of(terms, leaves, graph, len(forward))
        sizes = [tensor.shape[1:].num_elements() for tensor in _cut(leaves, cuts)]
        num_bytes = memory.bytes_by_power([*forward, *operations])
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
    captured += [layer for layer in layers if has_time_steps(layer) and _is_trained_in_loops(graph, layer, in_loops)]
    states, changed = _changed_states(task, scope.changed), set(scope.changed)
    return Structure(
        cuts=tuple(cuts),
        states=states,
        has_added_loss=bool(scope.losses),
        nesting_ops=sorted(op for op in op_types if _NESTING.match(op)),
        is_random=any(scope.get_current_value(seed) is not None for seed in task.seeds),
        is_vectorizable=_is_vectorizable(op_types),
        has_vectorizable_rows=_is_vectorizable(other_types),
        is_fusible=task.solves_equations and op_types <= _PRODUCTS | _FUSIBLE | _MOVING,
        layer_of_op=layer_of_op,
        bytes_by_power=memory.bytes_of_data(num_bytes, data),
        unknown_axes=memory.unknown_axes(data),
        num_outputs=None if None in sizes else sum(sizes),
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


def _cut(leaves, cuts):
    taken = [(leaf, cut) for leaf, cut in zip(leaves, cuts, strict=True) if cut != "unused"]
    tensors = {"logits": lambda leaf: [logits_of(leaf)], "both": lambda leaf: [leaf, logits_of(leaf)]}
    return [tensor for leaf, cut in taken for tensor in tensors.get(cut, lambda leaf: [leaf])(leaf)]


def _cut_of(terms, leaves, graph, num_forward):
    """Traces the loss, and looks at what it is computed from.

    Args:
        terms: List of `loss_terms.LossTerm`.
        leaves: List of tensors, the outputs of the network.
        graph: The graph of the trace.
        num_forward: Integer, the number of its operations before the loss.

    Returns:
        `cuts`, `has_curvature` and `is_entrywise` of `Structure`, and the list of the loss's operations.
    """
    cuts, has_curvature = ["unused"] * len(leaves), False
    if not terms:
        return cuts, has_curvature, True, []
    logits = [logits_of(leaf) for leaf in leaves]
    sources = [tensor for tensor in leaves + logits if tensor is not None]
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(sources)
        with tf.GradientTape() as tape:
            tape.watch(sources)
            with keras.StatelessScope():
                loss = tf.add_n([tf.cast(term.value(), tf.float32) for term in terms])
        operations = graph.get_operations()[num_forward:]
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
    return cuts, has_curvature, _is_entrywise(operations, sources, loss), operations


def _is_vectorizable(op_types):
    return not (op_types & _BATCHED_PRODUCTS or any(map(_NESTING.match, op_types)))


def _is_trained_in_loops(graph, layer, in_loops):
    """Whether all weights of a layer that has time steps are trained, and used by its loops alone."""
    weights = weights_by_rows(layer)
    handles = {weight.value.handle.ref() for weight in weights}
    users = [user for outer, inner in graph.captures if outer.ref() in handles for user in inner.consumers()]
    return bool(users) and all(user in in_loops for user in users) and all(weight.trainable for weight in weights)


def _num_uses_of(graph, variable):
    """Returns how often a graph uses a `keras.Variable`. A nested function counts once."""
    handles = [inner for outer, inner in graph.captures if outer is variable.value.handle]
    return sum(map(_num_uses, handles))


def _num_uses(value):
    """Returns how many operations use a tensor, directly or after reading, converting or reshaping it."""
    users = [operation for operation in value.consumers() if operation.type != "Shape"]
    return sum(_num_uses(user.outputs[0]) if user.type in _SAME_VALUE else 1 for user in users)


def _placeholder(leaf):
    """Returns a placeholder for data with any number of cases. Even if the number is known, a micro-batch may have another."""
    return None if leaf is None else tf.compat.v1.placeholder(leaf.dtype, [None, *leaf.shape[1:]])


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


class _ChangesRecorded(keras.StatelessScope):
    """A `keras.StatelessScope` that knows which variables a pass changed."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.changed = {}  # by identity

    def add_update(self, update):
        self.changed[id(update[0])] = update[0]
        super().add_update(update)


def _changed_states(task, changed):
    """Returns the states that a pass changes: those of `Task.states`, then those that Keras does not save, as of a stateful recurrent layer."""
    weights = {id(weight): constraint for weight, constraint in zip(task.weights, task.constraints, strict=True)}
    for key, weight in changed.items():
        if key in weights and not isinstance(weights[key], UnitSpectralNorm):
            raise ValueError(
                "A layer must not assign trainable weights in `call`: an update would judge steps by other weights than it assigns. Received: a "
                f"layer that assigns '{weight.path}'. Use a `constraint` of the weight."
            )
    others = {key: state for key, state in changed.items() if key not in weights}
    for seed in task.seeds:
        others.pop(id(seed), None)
    return [*(state for state in task.states if others.pop(id(state), None) is not None), *others.values()]


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
