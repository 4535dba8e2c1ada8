"""Derivatives to any order by Taylor series, carried through the operations of a graph: of a function of points, and along a curve of weights.

A tensor t that is made of inputs z has the series `t(z + h) = t(z) + sum over indices a of t_a h^a`; an index is the sorted tuple of what one
differentiates by, (0, 0, 1) for "xxy", and `t_a` the partial derivative over a!. The value is in the graph. The *coefficients* of t are a list: for
each order a tensor `(m, *shape)`, one row for each index of this order, or `None` for zeros. An axis may have size 1 where t's has more. So an
operation costs a few calls, however many indices there are. Rules say what an operation makes of the coefficients of its inputs.

Griewank & Walther (2008), *Evaluating Derivatives*, chapter 13; Bettencourt, Johnson & Duvenaud (2019), *Taylor-mode automatic differentiation for
higher-order derivatives in JAX*, rules for operations in place of layers.
"""

import collections
import functools
import itertools
import math

import numpy as np
import tensorflow as tf


class _NoRuleError(Exception):
    """An operation has no rule, or none in this form."""


def partial_derivatives(u, points, wanted):
    """Returns the value and partial derivatives of a function at points, in a graph.

    Args:
        u: Callable `(N, d) -> (N, k)`, row by row.
        points: Symbolic tensor `(N, d)`.
        wanted: Set of indices, sorted tuples of columns; () is the value.

    Returns:
        Dict from indices to tensors `(N, k)`; `None` where an operation of u has no rule.
    """
    if not any(wanted):
        return {(): u(points)}
    series, coefficients = _of_points(points, wanted)
    found = _carried(series, lambda moved: u(moved[0]), [points], [coefficients])
    return None if found is None else {(): found[0], **series.derivatives(*found)}


def derivatives_of(value, points, wanted):
    """Returns partial derivatives as `partial_derivatives` does, of a tensor `(N, k)` that is made of points in the same graph."""
    if value.graph is not points.graph:
        return None
    series, coefficients = _of_points(points, wanted)
    found = _through(series, {points.ref(): coefficients}, value, points.graph.get_operations())
    return None if found is None else series.derivatives(*found)


def _of_points(points, wanted):
    series = _Series(wanted)
    columns = np.eye(points.shape[1])[[column for (column,) in series.indices[0]]]
    return series, [tf.constant(columns[:, None], points.dtype), *[None] * (series.order - 1)]


def derivative_along(function, start, *terms):
    """Returns the derivative of order k, at t = 0, of `function(start + t c_1 + ... + t^k / k! c_k)`, in a graph.

    Args:
        function: Callable that takes a list of tensors and returns a tensor.
        start: List of symbolic tensors.
        *terms: Lists c_1, ..., c_k of tensors of the same shapes, k >= 1.

    Returns:
        Tensor; `None` where an operation of the function has no rule.
    """
    last = (0,) * len(terms)
    series = _Series({last})
    coefficients = [
        [_scaled(1 / math.factorial(order), part[None]) for order, part in enumerate(parts, start=1)]
        for parts in zip(*terms, strict=True)
    ]
    found = _carried(series, function, start, coefficients)
    return None if found is None else series.derivatives(*found)[last]


def _carried(series, function, inputs, coefficients):
    """The value of a function and its coefficients; in place of both, `None` if an operation has no rule."""
    inputs = [tf.identity(x) for x in inputs]  # in this graph, and different from what the function may know
    graph = inputs[0].graph
    num_others = len(graph.get_operations())
    value = function(inputs)
    known = {x.ref(): h for x, h in zip(inputs, coefficients, strict=True)}
    return _through(series, known, value, graph.get_operations()[num_others:])


def _through(series, known, value, operations):
    """As `_carried`, of the coefficients that are known of some tensors, by their references."""
    known = dict(known)
    try:
        for op in _leading_to(value, operations):
            of_inputs = [known.get(x.ref()) for x in op.inputs]
            if any(h is not None for h in of_inputs):
                found = _rule_of(op)(series, op, *of_inputs)
                known.update((x.ref(), h) for x, h in zip(op.outputs, found, strict=True) if _moves(h))
    except _NoRuleError:
        return None
    return value, known.get(value.ref())


def _moves(h):
    return h is not None and any(part is not None for part in h)


def _leading_to(value, made):
    """Those of some operations, in the order in which they were made, that a tensor depends on."""
    needed = {value.op.name}
    for op in reversed(made):
        if op.name in needed:
            needed.update(x.op.name for x in op.inputs)
    return [op for op in made if op.name in needed]


class _Series:
    """Arithmetic of truncated series.

    Args:
        wanted: Indices. Carried are they and all that divide them.

    Attributes:
        indices: A list for each order, from the first on.
        order: Integer, the highest one.
    """

    def __init__(self, wanted):
        self.order = max(map(len, wanted))
        self.indices = [
            sorted(set(itertools.chain.from_iterable(itertools.combinations(index, order) for index in wanted)))
            for order in range(1, self.order + 1)
        ]

    def product(self, f, g, multiply=tf.multiply):
        """Coefficients of the product of two series without a value, of each of which coefficients are given."""
        found = [None] * self.order
        for left, right in itertools.product(range(self.order), repeat=2):
            order = left + right + 1
            # Of a square, those that come twice once.
            if order < self.order and f[left] is not None and g[right] is not None and not (f is g and left > right):
                term = self._term(order, left, f[left], right, g[right], f is g, multiply)
                found[order] = term if found[order] is None else found[order] + term
        return found

    def _term(self, order, left, f, right, g, is_square, multiply):
        """What coefficients of two orders add to those of a third; orders are counted from 0."""
        pairs = collections.Counter()
        for place, index in enumerate(self.indices[order]):
            for part in set(itertools.combinations(index, left + 1)):
                rest = tuple(sorted((collections.Counter(index) - collections.Counter(part)).elements()))
                pair = self.indices[left].index(part), self.indices[right].index(rest)
                pairs[(place, *(sorted(pair) if is_square and left == right else pair))] += 1
        target, *places = zip(*pairs, strict=True)
        terms = multiply(_taken(f, places[0]), _taken(g, places[1]))
        numbers = np.array(list(pairs.values()), "float64") * (2 if is_square and left != right else 1)
        if target == tuple(range(len(self.indices[order]))):
            if (numbers == numbers[0]).all():
                return _scaled(numbers[0], terms)
            return terms * tf.constant(numbers.reshape(-1, *[1] * (terms.shape.rank - 1)), terms.dtype)
        sums = np.zeros((len(self.indices[order]), len(target)))
        sums[target, range(len(target))] = numbers
        return tf.tensordot(tf.constant(sums, terms.dtype), terms, 1)

    def composed(self, outer, h):
        """Coefficients of s(x), of those of s at the value of x, `outer`, tensors from the first order on, and of x."""
        found, power = _scaled_by(outer[0], h), h
        for coefficient in outer[1 : self.order]:
            power = self.product(power, h)
            found = _added(found, _scaled_by(coefficient, power))
        return found

    def multiplied(self, x, f, y, g, multiply=tf.multiply):
        """Coefficients of the product of x and y, of which f and g are those, `None` = a constant."""
        found = [None] * self.order
        if f is not None:
            found = _added(found, [part if part is None else multiply(part, y) for part in f])
        if g is not None:
            found = _added(found, [part if part is None else multiply(x, part) for part in g])
        return found if f is None or g is None else _added(found, self.product(f, g, multiply))

    def derivatives(self, value, h):
        """All partial derivatives, a dict."""
        found = {}
        for indices, part in zip(self.indices, h or [None] * self.order, strict=True):
            if part is None:
                found |= dict.fromkeys(indices, tf.zeros_like(value))
                continue
            for index, row in zip(indices, tf.unstack(_full(part, value), len(indices)), strict=True):
                found[index] = _scaled(math.prod(map(math.factorial, collections.Counter(index).values())), row)
        return found


def _taken(part, places):
    """Some rows of a tensor."""
    if places == tuple(range(places[0], places[0] + len(places))):
        return part if len(places) == part.shape[0] else part[places[0] : places[-1] + 1]
    return tf.gather(part, places)


def _added(f, g):
    """Coefficients of a sum."""
    return [t if s is None else s if t is None else s + t for s, t in zip(f, g, strict=True)]


def _scaled_by(factor, h):
    """Coefficients times a tensor."""
    return [part if part is None else factor * part for part in h]


def _full(part, x):
    """Coefficients of one order without axes of size 1 in place of those of their tensor."""
    if x.shape.is_fully_defined() and part.shape[1:] == x.shape:
        return part
    return tf.broadcast_to(part, tf.concat([[part.shape[0]], tf.shape(x)], 0))


def _of_shape(part, x):
    """The shape of full coefficients of a tensor x, as many as a part has."""
    shape = [-1 if size is None else size for size in x.shape]
    return [part.shape[0], *shape] if shape.count(-1) < 2 else tf.concat([[part.shape[0]], tf.shape(x)], 0)


# Rules: callables `(series, op, *coefficients of inputs) -> list of coefficients of the outputs`. In place of coefficients, `None` is a constant.

_RULES = {}


def _rule_of(op):
    if op.type not in _RULES:
        raise _NoRuleError(op.type)
    return _RULES[op.type]


def _rule(*types):
    """Registers a rule."""

    def register(rule):
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def _number(x):
    """The value of a constant of the graph, an array."""
    value = tf.get_static_value(x)
    if value is None:
        raise _NoRuleError(x.name)
    return value


# Constants.


@_rule(
    *("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "StopGradient", "Sign", "Floor", "Ceil", "Round", "Rint"),
    *("Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual", "IsNan", "IsFinite", "IsInf"),
)  # fmt: skip
def _constant(series, op, *inputs):
    return [None] * len(op.outputs)


# Linear operations.


@_rule("Identity", "Snapshot")
def _identity(series, op, h):
    return [h]


@_rule("IdentityN")
def _custom_gradient(series, op, *inputs):
    try:
        op.get_attr("_gradient_op_type")
    except ValueError:
        return list(inputs)
    # `tf.custom_gradient` may make a derivative of its own; that of Swish is known to be that of its operations.
    product = op.inputs[0].op
    if product.type != "Mul" or product.inputs[0] is not op.inputs[1] or product.inputs[1].op.type != "Sigmoid":
        raise _NoRuleError(op.type)
    return list(inputs)


@_rule("Cast")
def _cast(series, op, h):
    dtype = op.outputs[0].dtype
    if dtype.is_complex:
        raise _NoRuleError(op.type)
    return [[part if part is None else tf.cast(part, dtype) for part in h] if dtype.is_floating else None]


@_rule("Neg")
def _negative(series, op, h):
    return [_scaled_by(-1, h)]


def _aligned(op, inputs):
    """Coefficients of the inputs of an elementwise operation, as many axes in all as the output has, after the first."""
    rank = op.outputs[0].shape.rank
    return [h if h is None else [part if part is None else _of_rank(part, rank) for part in h] for h in inputs]


def _of_rank(part, rank):
    """Coefficients with axes of size 1 in front, where broadcasting puts them."""
    if rank is None or part.shape.rank is None:
        raise _NoRuleError("rank")
    if part.shape.rank == rank + 1:
        return part
    return tf.reshape(part, tf.concat([[part.shape[0]], [1] * (rank + 1 - part.shape.rank), tf.shape(part)[1:]], 0))


@_rule("Add", "AddV2", "AddN", "BiasAdd")
def _add(series, op, *inputs):
    return [functools.reduce(_added, [h for h in _aligned(op, inputs) if h is not None])]


@_rule("Sub")
def _subtract(series, op, *inputs):
    f, g = _aligned(op, inputs)
    zero = [None] * series.order
    return [_added(zero if f is None else f, zero if g is None else _scaled_by(-1, g))]


@_rule("SelectV2")
def _select(series, op, *inputs):
    _, f, g = _aligned(op, inputs)
    zero, none = tf.zeros([], op.outputs[0].dtype), [None] * series.order
    pairs = zip(none if f is None else f, none if g is None else g, strict=True)
    return [
        [
            None
            if s is None and t is None
            else tf.where(op.inputs[0], zero if s is None else s, zero if t is None else t)
            for s, t in pairs
        ]
    ]


def _slice(op, part):
    begin, end, strides = _with_first(op, 1, 0), _with_first(op, 2, 0), _with_first(op, 3, 1)
    # A bit for each axis; the first is taken whole.
    masks = {name: op.get_attr(name) << 1 for name in ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask")}
    masks |= {name: op.get_attr(name) << 1 | 1 for name in ("begin_mask", "end_mask")}
    return tf.strided_slice(part, begin, end, strides, **masks)


def _gather(op, part):
    if op.get_attr("batch_dims"):
        raise _NoRuleError(op.type)
    return tf.gather(part, op.inputs[1], axis=_axes(op, 2))


def _behind(axis):
    """Axes of a tensor in its coefficients, which have one more in front."""
    return np.where(np.asarray(axis) < 0, axis, np.asarray(axis) + 1).tolist()


def _axes(op, place):
    """The axes in coefficients that one of an operation's inputs names."""
    return _behind(_number(op.inputs[place]))


def _with_first(op, place, row):
    """One of an operation's inputs, an entry for each axis, with one in front for the first axis of coefficients."""
    return tf.concat([[row], tf.cast(op.inputs[place], tf.int32)], 0)


def _reshape(op, part):
    return tf.reshape(part, _of_shape(part, op.outputs[0]))


# Operations that are linear in their first input and get numbers beside: callables of the full coefficients of one order, whose result is those of
# the output, or a list of those of all outputs.
_LINEAR = {
    "Reshape": _reshape,
    "ExpandDims": _reshape,
    "Squeeze": _reshape,
    "BroadcastTo": lambda op, part: _full(_of_rank(part, op.outputs[0].shape.rank), op.outputs[0]),
    "Transpose": lambda op, part: tf.transpose(part, [0, *(_number(op.inputs[1]) + 1)]),
    "Pad": lambda op, part: tf.pad(part, _with_first(op, 1, [0, 0])),
    "Tile": lambda op, part: tf.tile(part, _with_first(op, 1, 1)),
    "StridedSlice": _slice,
    "GatherV2": _gather,
    "Sum": lambda op, part: tf.reduce_sum(part, _axes(op, 1), keepdims=op.get_attr("keep_dims")),
    "Mean": lambda op, part: tf.reduce_mean(part, _axes(op, 1), keepdims=op.get_attr("keep_dims")),
    "Unpack": lambda op, part: tf.unstack(part, len(op.outputs), _behind(op.get_attr("axis"))),
    "SplitV": lambda op, part: tf.split(part, _number(op.inputs[1]), _axes(op, 2)),
    "Split": lambda op, part: tf.split(part, len(op.outputs), _axes(op, 0)),
}
# Where the input is not the first.
_PLACES = {"Split": 1}


@_rule(*_LINEAR)
def _linear(series, op, *inputs):
    place = _PLACES.get(op.type, 0)
    h = inputs[place]
    if h is None or any(other is not None for other in inputs if other is not h):
        raise _NoRuleError(op.type)
    parts = [part if part is None else _LINEAR[op.type](op, _full(part, op.inputs[place])) for part in h]
    if len(op.outputs) == 1:
        return [[part[0] if isinstance(part, list) else part for part in parts]]
    return [[part if part is None else part[number] for part in parts] for number in range(len(op.outputs))]


@_rule("ConcatV2")
def _concat(series, op, *inputs):
    axis = _axes(op, -1)
    return [_joined(series, op.inputs[:-1], inputs[:-1], lambda parts: tf.concat(parts, axis))]


@_rule("Pack")
def _stack(series, op, *inputs):
    axis = _behind(op.get_attr("axis"))
    return [_joined(series, op.inputs, inputs, lambda parts: tf.stack(parts, axis))]


def _joined(series, tensors, inputs, join):
    """Coefficients of what is joined of several tensors."""
    found = []
    for order, indices in enumerate(series.indices):
        parts = [None if h is None else h[order] for h in inputs]
        if all(part is None for part in parts):
            found.append(None)
            continue
        pairs = zip(tensors, parts, strict=True)
        found.append(join([_zeros(len(indices), x) if part is None else _full(part, x) for x, part in pairs]))
    return found


def _zeros(num, x):
    return tf.zeros(tf.concat([[num], tf.shape(x)], 0), x.dtype)


# Products.


@_rule("Mul")
def _multiply(series, op, *inputs):
    (x, y), (f, g) = op.inputs, _aligned(op, inputs)
    return [series.multiplied(x, f, y, g)]


@_rule("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _matmul(series, op, f, g):
    x, y = op.inputs
    names = ("transpose_a", "transpose_b") if op.type == "MatMul" else ("adj_x", "adj_y")
    transposed = dict(zip(("transpose_a", "transpose_b"), map(op.get_attr, names), strict=True))

    def multiply(x, y):
        if y.shape.rank == 2 and not transposed["transpose_a"]:
            # As one matrix: TensorFlow multiplies a batch by one matrix as a batch, and so is its gradient.
            rows = tf.matmul(tf.reshape(x, [-1, x.shape[-1]]), y, **transposed)
            return tf.reshape(rows, [x.shape[0], *[-1] * (x.shape.rank == 3), rows.shape[-1]])
        if x.shape.rank == 2:
            return tf.stack([tf.matmul(x, row, **transposed) for row in tf.unstack(y)])
        return tf.matmul(x, y, **transposed)

    if x.shape.rank != y.shape.rank or None in (x.shape[-1], y.shape[-1]):
        raise _NoRuleError(op.type)
    # Summed over, an axis must have its size; one of rows alone may be of size 1.
    f = f and [
        _full(part, x) if part is not None and (transposed["transpose_a"] or part.shape[2:] != x.shape[1:]) else part
        for part in f
    ]
    g = g and [part if part is None else _full(part, y) for part in g]
    return [series.multiplied(x, f, y, g, multiply)]


@_rule("RealDiv")
def _divide(series, op, *inputs):
    (x, y), (f, g) = op.inputs, _aligned(op, inputs)
    inverse = tf.math.reciprocal(y)
    if g is None:
        return [_scaled_by(inverse, f)]
    return [series.multiplied(x, f, inverse, series.composed(_power(y, inverse, series.order, -1), g))]


@_rule("SquaredDifference")
def _squared_difference(series, op, *inputs):
    x, y = op.inputs
    return [series.composed(_square(x - y, None, series.order), *_subtract(series, op, *inputs))]


@_rule("Prod")
def _product(series, op, h, _):
    axes, x = np.reshape(_number(op.inputs[1]), [-1]), op.inputs[0]
    if len(axes) != 1 or x.shape[int(axes[0])] is None:
        raise _NoRuleError(op.type)
    axis = int(axes[0]) % x.shape.rank
    values = tf.unstack(x, axis=axis)
    parts = [[None] * len(values) if part is None else tf.unstack(_full(part, x), axis=axis + 1) for part in h]
    value, found = values[0], [part[0] for part in parts]
    for number, factor in enumerate(values[1:], start=1):
        found = series.multiplied(value, found, factor, [part[number] for part in parts])
        value = value * factor
    return [[part if part is None else tf.reshape(part, _of_shape(part, op.outputs[0])) for part in found]]


# Functions of one number: coefficients of their series at x, where they are y, from the first order on; fewer than `order` where the others are zero.


def _scaled(factor, x):
    return x if factor == 1 else -x if factor == -1 else factor * x


def _integrated(coefficients):
    """Coefficients of a function from the first order on, of those of its derivative from the value on."""
    return [_scaled(1 / order, coefficient) for order, coefficient in enumerate(coefficients, start=1)]


def _riccati(y, order, constant, linear, square):
    """Of a solution of `y' = constant + linear y + square y^2`."""
    found = [y]
    for n in range(order):
        half = (n + 1) // 2
        terms = [_scaled(2 * square / (n + 1), found[i] * found[n - i]) for i in range(half)]
        if n % 2 == 0:
            terms.append(_scaled(square / (n + 1), tf.square(found[half])))
        if linear:
            terms.append(_scaled(linear / (n + 1), found[n]))
        total = functools.reduce(tf.add, terms)
        found.append(total + constant if n == 0 and constant else total)
    return found[1:]


def _cycle(order, *derivatives):
    """Of derivatives that repeat."""
    return [_scaled(1 / math.factorial(n), derivatives[(n - 1) % len(derivatives)]) for n in range(1, order + 1)]


def _power(x, y, order, exponent):
    """Of a power that is no natural number."""
    found = [y]
    for n in range(order):
        found.append(_scaled((exponent - n) / (n + 1), found[n] / x))
    return found[1:]


def _softplus(x, y, order):
    slope = tf.sigmoid(x)
    return _integrated([slope, *_riccati(slope, order - 1, 0, 1, -1)])


def _sin(x, y, order):
    cosine = tf.cos(x)
    return _cycle(order, cosine, -y, -cosine, y)


def _cos(x, y, order):
    sine = tf.sin(x)
    return _cycle(order, -sine, -y, sine, y)


def _log(x, y, order):
    inverse = tf.math.reciprocal(x)
    return _integrated([inverse, *_power(x, inverse, order - 1, -1)])


def _erf(x, y, order):
    slopes = [2 / math.sqrt(math.pi) * tf.exp(-tf.square(x))]
    for n in range(1, order):
        before = slopes[n - 2] if n > 1 else 0
        slopes.append(-2 / n * (x * slopes[n - 1] + before))
    return _integrated(slopes)


def _elu(x, y, order):
    found = _cycle(order, tf.exp(tf.minimum(x, 0)))
    return [tf.where(x > 0, tf.cast(n == 0, x.dtype), coefficient) for n, coefficient in enumerate(found)]


def _square(x, y, order):
    return [2 * x, tf.ones_like(x)][:order]


_FUNCTIONS = {
    "Tanh": lambda x, y, order: _riccati(y, order, 1, 0, -1),
    "Tan": lambda x, y, order: _riccati(y, order, 1, 0, 1),
    "Sigmoid": lambda x, y, order: _riccati(y, order, 0, 1, -1),
    "Softplus": _softplus,
    "Sin": _sin,
    "Cos": _cos,
    "Sinh": lambda x, y, order: _cycle(order, tf.cosh(x), y),
    "Cosh": lambda x, y, order: _cycle(order, tf.sinh(x), y),
    "Exp": lambda x, y, order: _cycle(order, y),
    "Expm1": lambda x, y, order: _cycle(order, tf.exp(x)),
    "Log": _log,
    "Log1p": lambda x, y, order: _log(1 + x, y, order),
    "Erf": _erf,
    "Erfc": lambda x, y, order: [-coefficient for coefficient in _erf(x, y, order)],
    "Sqrt": lambda x, y, order: _power(x, y, order, 0.5),
    "Rsqrt": lambda x, y, order: _power(x, y, order, -0.5),
    "Reciprocal": lambda x, y, order: _power(x, y, order, -1),
    "Inv": lambda x, y, order: _power(x, y, order, -1),
    "Square": _square,
    "Abs": lambda x, y, order: [tf.sign(x)],
    "Relu": lambda x, y, order: [tf.cast(x > 0, x.dtype)],
    "Elu": _elu,
}


@_rule(*_FUNCTIONS)
def _function(series, op, h):
    return [series.composed(_FUNCTIONS[op.type](op.inputs[0], op.outputs[0], series.order), h)]


def _raised(x, exponent):
    """A power; that of 0 with the exponent 0 has no second derivative in TensorFlow, and a square is a fast one."""
    known = {0: tf.ones_like, 1: tf.identity, 2: tf.square}
    return known[exponent](x) if exponent in known else x**exponent


@_rule("Pow")
def _pow(series, op, f, g):
    if f is None or g is not None or _number(op.inputs[1]).ndim:
        raise _NoRuleError(op.type)
    x, exponent = op.inputs[0], float(_number(op.inputs[1]))
    outer, factor = [], 1.0
    for n in range(series.order):
        factor *= (exponent - n) / (n + 1)
        if not factor:
            break
        outer.append(_scaled(factor, _raised(x, exponent - n - 1)))
    return [series.composed(outer, f) if outer else None]
