"""The weighted Jacobian of one replica's cases, and what else an exact Gauss-Newton step needs of the outputs.

With J the Jacobian of the network's outputs and `H = LL'` the second derivative of the loss with respect to them, one block per case, the rows are
`B = L'J`, so that `B'B` is the Gauss-Newton matrix. With r the gradient of the loss with respect to the outputs and `s = L^+ r`, `B's` is the
gradient of the loss if r lies in the range of H, as it does for squares and for cross-entropies.
"""

import copy
import functools

import tensorflow as tf

from keras_hf.common.loops import mapped, sum_over_blocks
from keras_hf.common.vectors import dense, epsilon, gram, pack, unpack
from keras_hf.differentiation import taylor

# Numbers that one block of cases may take in a vectorised pass (512 MiB in float64), and those of a Jacobian that is kept (1 GiB).
_BLOCK_FLOATS, _KEPT_FLOATS = 2**26, 2**27


def compiles_rows(structure):
    """Whether XLA compiles what is made of one case's outputs: many small operations, which it joins.

    Args:
        structure: `structure.Structure`.
    """
    return structure.is_vectorizable and structure.is_fusible and not structure.nesting_ops


def rows_dtype(structure, dtype):
    """Returns the float type of rows: float64, since a Gram matrix loses half of the digits that rows have.

    Of recurrent networks it is the network's own: their systems are large, and nobody asks them for digits.

    Args:
        structure: `structure.Structure`.
        dtype: That of the network.
    """
    return dtype if structure.nesting_ops else tf.float64


def most_of_same_rows(num_cases, structure, num_weights):
    """Returns the largest number of cases whose rows are best made as those of so many are: an integer, or `None` if more are made alike, too.

    What is chosen by the number of cases: whether all rows come in one pass, whether they are kept, and whether there are fewer rows than weights.

    Args:
        num_cases: Integer.
        structure: `structure.Structure`, with `num_outputs`.
        num_weights: Integer.
    """
    block = _block_of(structure.num_outputs, num_weights, structure.bytes_per_case // 4)
    per_case = max(1, structure.num_outputs)
    limits = block, _KEPT_FLOATS // (per_case * num_weights), (num_weights - 1) // per_case
    return min((limit for limit in limits if limit >= num_cases), default=None)


def _block_of(num_outputs, num_weights, floats_per_case):
    """The number of cases in a block, whose rows come in one vectorised pass."""
    return max(1, _BLOCK_FLOATS // max(1, num_outputs * max(num_weights, floats_per_case)))


class LocalRows:
    """The rows of one replica, `(rows, n)`. A Jacobian that would be too large is formed anew, block by block, wherever it is needed.

    Args:
        micro_batch: `micro_batch.MicroBatch` of all cases of the replica. Each case must have outputs of its own: no layer may mix cases.
        dtype: In which the network computes.
        rows_dtype: Of the rows.
        programs: Dict in which what is traced of the passes is kept, for whatever comes to the same types and shapes; `None` = nothing is shared.
        jit_compile: Whether XLA compiles the passes, anew for every number of cases.
        most_cases: Integer, an upper bound of the number of cases, where only that is known before they come; `None` without one.
    """

    def __init__(self, micro_batch, dtype, rows_dtype, programs=None, jit_compile=False, most_cases=None):
        self._micro_batch, self._dtype, self._variables = micro_batch, dtype, micro_batch.variables
        self.dtype = rows_dtype
        self._programs, self._jit_compile, self._roots = programs, jit_compile, None
        self._num_weights = sum(variable.shape.num_elements() for variable in micro_batch.variables)
        # Not by XLA where eigenvectors are needed: its own stop at a relative accuracy of about 1e-9.
        roots = self._compiled(LocalRows._roots_and_residuals, jit_compile and micro_batch.hessian_is_diagonal)
        self._roots, self.residuals = roots()
        num_cases, size = micro_batch.static_num_cases, self._roots.shape[1]
        self._block = _block_of(size, self._num_weights, micro_batch.floats_per_case)
        self._most_cases = most_cases if num_cases is None else num_cases
        is_kept = self._most_cases is not None and self._most_cases * size * self._num_weights <= _KEPT_FLOATS
        self._rows_of, self._second = (
            self._compiled(function, jit_compile) for function in (LocalRows._rows_of_cases, LocalRows._second_of_cases)
        )
        # The whole Jacobian, or `None` where it is not kept.
        self.jacobian = self._in_blocks(self._rows_of, row_shape=[self._num_weights]) if is_kept else None

    @property
    def per_case(self):
        """Rows of a case: an integer."""
        return self._roots.shape[1]

    def gram(self):
        """Returns `B'B`, `(n, n)`."""
        return self._sum_of(lambda rows, _: gram(rows), [self._num_weights] * 2)

    def pull(self, u):
        """Returns `B'u`, `(n,)`, of u `(rows,)`."""
        return self._sum_of(lambda rows, u: tf.linalg.matvec(rows, u, transpose_a=True), [self._num_weights], u)

    def push(self, v):
        """Returns `Bv`, `(rows,)`, of v `(n,)`."""
        if self.jacobian is not None:
            return tf.linalg.matvec(self.jacobian, v)
        return self._in_blocks(lambda indices: tf.linalg.matvec(self._rows_of(indices), v))

    def second_derivative(self, slope, second=None, at=None, after=None):
        """Returns `L'(f''[slope, slope] + J second)`, `(rows,)`, with f'' and J the derivatives of the outputs at weights `w + at`.

        That is L' times the second derivative of the outputs along a curve of these first and second derivatives. Cost: about four gradients.

        Args:
            slope: Tensor `(n,)`.
            second: Tensor `(n,)`; `None` = zeros.
            at: Tensor `(n,)`; `None` = zeros.
            after: Tensor that is computed first; `None` = nothing. Side by side, several calls would hold the activations of all.
        """
        second, at = (tf.zeros_like(slope) if v is None else v for v in (second, at))
        with tf.control_dependencies([] if after is None else [after]):
            return self._in_blocks(self._second, *(tf.identity(v) for v in (slope, second, at)))

    def tangent_squares(self, v):
        """Returns the square of the norm of `Bv - L'(Jv)`, with Jv by a forward derivative, and that of Bv: what J and J' must agree on."""
        tangents = self._compiled(LocalRows._tangents_of_cases, self._jit_compile)
        by_rows, forward = self.push(tf.cast(v, self.dtype)), self._in_blocks(tangents, v)
        return tf.reduce_sum((by_rows - forward) ** 2), tf.reduce_sum(by_rows**2)

    def losses(self, candidates):
        """Returns the replica's shares of the compiled loss at several weights, float64 `(k,)`, vectorised; the weights stay as they are.

        Args:
            candidates: List of tensors `(k, *weight's shape)`.
        """
        num_candidates = candidates[0].shape[0]  # static: an arc has so many places
        block = max(1, _BLOCK_FLOATS // max(self._micro_batch.floats_per_case, 1))

        compiled = self._compiled(LocalRows._losses_of_cases, self._jit_compile)
        num_cases = self._micro_batch.static_num_cases
        if num_cases is not None and num_cases * num_candidates <= block:
            return compiled(tf.range(num_cases), *candidates)

        return sum_over_blocks(
            self._micro_batch.num_cases,
            max(1, block // num_candidates),
            lambda first, last: compiled(tf.range(first, last), *candidates),
            tf.zeros([num_candidates], tf.float64),
        )

    def _mapped(self, function, args, dtype):
        """Applies a function to every row of nested tensors: vectorised where TensorFlow can."""
        return mapped(function, args, dtype, self._micro_batch.has_vectorizable_rows)

    def _sum_of(self, function, shape, u=None):
        """The sum over blocks of `function(rows, u)`; u is cut as the rows are."""
        if self.jacobian is not None:
            return function(self.jacobian, u)
        size = self._roots.shape[1]

        def terms(first, last):
            part = None if u is None else u[first * size : last * size]
            return function(self._rows_of(tf.range(first, last)), part)

        return sum_over_blocks(self._micro_batch.num_cases, self._block, terms, tf.zeros(shape, self.dtype))

    def _in_blocks(self, function, *args, row_shape=()):
        """Calls `function(indices of cases, *args)` for blocks of cases and joins what comes, whose first axis is the rows."""
        num_cases = self._micro_batch.static_num_cases
        if self._most_cases is not None and self._most_cases <= self._block:
            return function(tf.range(self._micro_batch.num_cases if num_cases is None else num_cases), *args)
        num_blocks = (self._micro_batch.num_cases + self._block - 1) // self._block

        def add_block(number, parts):
            start = number * self._block
            indices = tf.range(start, tf.minimum(start + self._block, self._micro_batch.num_cases))
            return number + 1, parts.write(number, function(indices, *args))

        _, parts = tf.while_loop(
            lambda number, _: number < num_blocks,
            add_block,
            # Of a shape that is known where a replica has no cases, too.
            (
                tf.constant(0),
                tf.TensorArray(self.dtype, num_blocks, infer_shape=False, element_shape=[None, *row_shape]),
            ),
            parallel_iterations=1,
        )
        num_rows = None if num_cases is None else num_cases * self._roots.shape[1]
        return tf.ensure_shape(parts.concat(), [num_rows, *row_shape])

    def _compiled(self, method, jit_compile):
        """Returns a method, a pass over cases, as a program: traced once for all calls with arguments of the same shapes, in any graph.

        What XLA compiles is traced before, outside of its context: inside, gradients of `tf.concat` and `tf.slice` are made of operations without a
        gradient.
        """
        if self._programs is None or tf.executing_eagerly():
            return functools.partial(method, self)

        def program(*args):
            args = self._micro_batch.tensors, self._roots, args
            leaves = tf.nest.flatten(args)
            there = [leaf for leaf in leaves if leaf is not None]
            key = method.__name__, jit_compile, *[(leaf.dtype, tuple(leaf.shape)) for leaf in there]

            def of_leaves(*there):
                given = iter(there)
                filled = [None if leaf is None else next(given) for leaf in leaves]
                tensors, roots, others = tf.nest.pack_sequence_as(args, filled)
                rows = copy.copy(self)
                rows._micro_batch, rows._roots = self._micro_batch.of_tensors(tensors), roots
                return method(rows, *others)

            if key not in self._programs:
                specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in there]
                traced = tf.function(of_leaves, autograph=False).get_concrete_function(*specs)
                settings = {"jit_compile": True} if jit_compile else {"experimental_attributes": {"_noinline": True}}
                self._programs[key] = tf.function(lambda *there: traced(*there), autograph=False, **settings)
            return self._programs[key](*there)

        return program

    def _flat(self, outputs):
        """Outputs, a list of tensors of cases, as `(cases, k)`."""
        sizes = [output.shape[1:].num_elements() for output in outputs]
        flat = [tf.reshape(output, [-1, size]) for output, size in zip(outputs, sizes, strict=True)]
        return tf.cast(tf.concat(flat, 1), self.dtype)

    def _losses_of_cases(self, indices, *candidates):
        """Shares of some cases in the compiled loss at several weights, float64 `(k,)`."""
        cases = self._micro_batch.cases(indices)
        of_weights = lambda weights: cases.accurate_share(cases.forward(list(weights), for_products=True))  # noqa: E731
        return self._mapped(of_weights, tuple(candidates), tf.float64)

    def _roots_and_residuals(self):
        """L of every case, `(cases, k, k)`, and `s = L^+ r`, `(cases * k,)`."""
        micro_batch, evaluation = self._micro_batch, self._micro_batch.forward()
        outputs = evaluation.outputs
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(outputs)
            with tf.GradientTape() as inner:
                inner.watch(outputs)
                loss = micro_batch.loss(evaluation)
            gradients = dense(inner.gradient(loss, outputs), outputs)
        slopes = self._flat(gradients)
        size = slopes.shape[1]

        def image(u):
            """H times the same u, `(k,)`, in every case: `(cases, k)`."""
            parts = tf.split(u, [output.shape[1:].num_elements() for output in outputs])
            u = [
                tf.cast(tf.broadcast_to(tf.reshape(part, [1, *output.shape[1:]]), tf.shape(output)), output.dtype)
                for part, output in zip(parts, outputs, strict=True)
            ]
            return self._flat(dense(outer.gradient(gradients, outputs, output_gradients=u), outputs))

        if micro_batch.hessian_is_diagonal or size == 1:
            values = image(tf.ones([size], self.dtype))
            # A loss that is not convex there (a negative second derivative) has no root: the rows are those of its convex part.
            root = tf.sqrt(tf.maximum(values, 0))
            return tf.linalg.diag(root), tf.reshape(tf.math.divide_no_nan(slopes, root), [-1])
        hessians = tf.transpose(tf.stack([image(u) for u in tf.unstack(tf.eye(size, dtype=self.dtype))]), [1, 0, 2])
        # TensorFlow refuses eigenvectors of what is not finite; the gradient of such a case stays.
        is_finite = tf.reduce_all(tf.math.is_finite(hessians), [1, 2], keepdims=True)
        hessians = tf.where(is_finite, hessians, tf.zeros_like(hessians))
        values, vectors = tf.linalg.eigh((hessians + tf.linalg.matrix_transpose(hessians)) / 2)
        rounding = size * epsilon(self._dtype)
        root = tf.sqrt(tf.where(values > rounding * values[:, -1:], values, tf.zeros_like(values)))
        residuals = tf.math.divide_no_nan(tf.linalg.matvec(vectors, slopes, transpose_a=True), root)
        return vectors * root[:, None], tf.reshape(residuals, [-1])

    def _rows_of_cases(self, indices):
        """The rows of some cases, `(cases * k, n)`: one vectorised gradient per case and output, each with a forward pass of its own."""
        size = self._roots.shape[1]

        def of_row(args):
            index, u = args
            with tf.GradientTape() as tape:
                outputs = self._flat(self._micro_batch.cases(index[None]).forward(for_products=True).outputs)[0]
            gradients = tape.gradient(outputs, self._variables, output_gradients=u)
            return pack(dense(gradients, self._variables), self.dtype)

        columns = tf.linalg.matrix_transpose(tf.gather(self._roots, indices))
        return self._mapped(of_row, (tf.repeat(indices, size), tf.reshape(columns, [-1, size])), self.dtype)

    def _tangents_of_cases(self, indices, v):
        """`L'(Jv)` of some cases, `(cases * k,)`."""
        return self._weighted(indices, _derivative_along(self._outputs_of(indices), self._moved(), self._parts(v)))

    def _second_of_cases(self, indices, slope, second, at):
        """`L'(f''[slope, slope] + J second)` of some cases at weights `w + at`, `(cases * k,)`."""
        terms = self._parts(slope), self._parts(second)
        return self._weighted(
            indices, _derivative_along(self._outputs_of(indices), self._moved(self._parts(at)), *terms)
        )

    def _outputs_of(self, indices):
        """Outputs of some cases as a function of a list of weights: `-> (cases, k)`."""
        cases = self._micro_batch.cases(indices)
        return lambda weights: self._flat(cases.forward(weights).outputs)

    def _parts(self, vector):
        return unpack(vector, self._variables)

    def _moved(self, change=None):
        """The weights, a list of tensors, after a change, a list of tensors."""
        weights = [tf.convert_to_tensor(variable) for variable in self._variables]
        return weights if change is None else [w + d for w, d in zip(weights, change, strict=True)]

    def _weighted(self, indices, derivatives):
        """`L'u` of some cases, `(cases * k,)`, of u `(cases, k)`."""
        roots = tf.gather(self._roots, indices)
        return tf.reshape(tf.linalg.matvec(roots, derivatives, transpose_a=True), [-1])


def _derivative_along(function, start, *terms):
    """The first or second derivative of a function along a curve; see `taylor.derivative_along`. By tapes where an operation has no rule there."""
    found = None if tf.executing_eagerly() else taylor.derivative_along(function, start, *terms)
    if found is not None:
        return found

    def along(t):
        # Not by a power: that of t = 0 has no second derivative in TensorFlow.
        change = (
            terms[0]
            if len(terms) == 1
            else [slope + tf.cast(t, slope.dtype) * (second / 2) for slope, second in zip(*terms, strict=True)]
        )
        return function([w + tf.cast(t, w.dtype) * d for w, d in zip(start, change, strict=True)])

    zero = tf.zeros([], start[0].dtype)
    return _derivative(along, zero) if len(terms) == 1 else _derivative(lambda t: _derivative(along, t), zero)


def _derivative(function, t):
    """The derivative of a tensor with respect to the scalar t.

    By two backward passes, the second of which transposes the first: right wherever there are second derivatives. (Nested forward accumulators are
    exact, too, but XLA compiles what they make anew in every call.)
    """
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(t)
        value = function(t)
    cotangent = tf.zeros_like(value)
    # Recorded by the outer tapes, too, where t is theirs.
    with tf.GradientTape() as transposing:
        transposing.watch(cotangent)
        pulled_back = tape.gradient(value, t, output_gradients=cotangent)
    return dense([None if pulled_back is None else transposing.gradient(pulled_back, cotangent)], [value])[0]
