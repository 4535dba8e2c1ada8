"""Physics-informed networks: residuals of equations, conditions and data, each at its own points, as one Keras model with one loss.

Raissi, Perdikaris & Karniadakis (2019), *Physics-informed neural networks*. Names follow DeepXDE (Lu et al., 2021).
"""

import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common.checks import count, positive
from keras_hf.differentiation import taylor


def derivatives(u, points, coordinates, *wanted):
    """Returns the value and partial derivatives of a function at points.

    In a graph, as in training: by Taylor series that are carried through the operations of u (Griewank & Walther, 2008, chapter 13), for all outputs
    and derivatives in one pass. Cost: that of the value times the number of derivatives wanted and of those below them ("u_xx" needs "u_x"), whatever
    the number of outputs. There are rules for what Dense, Add, Multiply, Concatenate, Reshape, Normalization and Rescaling layers and elementwise
    functions of Keras and TensorFlow are made of. Elsewhere, and eagerly: by nested gradient tapes, one backward pass for each prefix and output.
    Both are exact, and correct inside the second derivatives of training.

    Args:
        u: Callable `(N, d) -> (N, k)`, such as a Keras model; row by row.
        points: Tensor `(N, d)`.
        coordinates: String of d different letters, the names of the columns: "tx".
        *wanted: Strings: "u" is the value, "u_t" a first and "u_xx" a second derivative, and so on to any order.

    Returns:
        List of tensors `(N, k)`, one for each of `wanted`; the tensor itself if there is one.

    Raises:
        ValueError: If a name is not made of "u", "_" and letters of `coordinates`, or if `coordinates` does not fit the points.

    Example:

    >>> x = tf.constant([[1.0, 2.0]])
    >>> u_x, u_xy = derivatives(lambda p: p[:, :1] ** 2 * p[:, 1:], x, "xy", "u_x", "u_xy")
    >>> u_x.numpy(), u_xy.numpy()
    (array([[4.]], dtype=float32), array([[2.]], dtype=float32))
    """
    if points.shape.rank != 2 or len(set(coordinates)) != len(coordinates) or points.shape[1] != len(coordinates):
        raise ValueError(
            "`coordinates` must be one letter for each column of `points`, all different. "
            f"Received: coordinates={coordinates!r}, points of shape {tuple(points.shape)}."
        )
    orders = [_order(name, coordinates) for name in wanted]
    needed = {tuple(order[:length]) for order in orders for length in range(len(order) + 1)}
    found = None if tf.executing_eagerly() else taylor.partial_derivatives(u, points, needed)
    if found is None:
        found = _up_to(u, points, max(map(len, needed), default=0), needed)
    values = [found[order] for order in orders]
    return values[0] if len(values) == 1 else values


def _order(name, coordinates):
    """The columns that a name such as "u_xx" differentiates by, in a fixed order: derivatives commute."""
    head, _, letters = name.partition("_")
    if head != "u" or not set(letters) <= set(coordinates) or (name != "u" and not letters):
        raise ValueError(
            f"Derivatives are named 'u', 'u_x', 'u_xx', ..., with letters of coordinates={coordinates!r}. Received: {name!r}."
        )
    return tuple(sorted(coordinates.index(letter) for letter in letters))


def _up_to(u, points, order, needed):
    """All needed derivatives up to an order, a dict from columns to tensors `(N, k)`."""
    if order == 0:
        return {(): u(points)}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(points)
        found = _up_to(u, points, order - 1, needed)
    gradients = {}
    for columns in sorted(columns for columns in needed if len(columns) == order):
        prefix = columns[:-1]
        if prefix not in gradients:
            gradients[prefix] = _gradient_by_output(tape, found[prefix], points)
        found[columns] = gradients[prefix][:, :, columns[-1]]
    return found


def _gradient_by_output(tape, values, points):
    """The gradient of every column of `values`, `(N, k, d)`."""
    num_outputs = values.shape[1]
    ones = tf.ones_like(values)
    cotangents = (
        [ones] if num_outputs == 1 else [ones * row for row in tf.unstack(tf.eye(num_outputs, dtype=values.dtype))]
    )
    found = [tape.gradient(values, points, output_gradients=u) for u in cotangents]
    return tf.stack([tf.zeros_like(points) if gradient is None else gradient for gradient in found], 1)


@keras.saving.register_keras_serializable("keras_hf")
class PINN(keras.Model):
    """The residuals of a physics-informed network, as a Keras model to train with `HFModel` and the loss "mse".

    A *term* is a function `(u, points) -> residual`, of the solution u, a callable `(N, d) -> (N, k)`, and points `(N, d)`; its residual is `(N, m)`
    or `(N,)`. Equations, boundary and initial conditions and data are terms alike. Each has points of its own:

        pinn = PINN(network, {"equation": equation, "boundary": boundary})
        model = HFModel(pinn)
        model.compile(loss="mse")
        x, y, sample_weight = pinn.cases({"equation": inner, "boundary": on_the_boundary}, weights={"boundary": 4.0})
        model.fit(x, y, sample_weight=sample_weight, epochs=500)

    The loss is then `sum over terms of weight * mean of squared residuals`, the mean over the term's points and over its m components.

    Every term is evaluated at its own points, and in place of those of other terms at the first of its own that `cases` got: cases are independent of
    each other, and an equation with `u_r / r` and a condition at r = 0 have finite derivatives.

    Use float64: `keras.config.set_floatx("float64")` before the network is made. Residuals are second derivatives, and float32 is a failure mode of
    its own.

    Args:
        network: Keras model, `(N, d') -> (N, k)`.
        terms: Dict from names to callables `(u, points) -> residual`.
        features: Callable `(N, d) -> (N, d')`, what the network gets in place of the points, such as `[cos x, sin x]` for a periodic solution; `None`
            = the points.
        transform: Callable `(points, output) -> (N, k)`, the solution made of the network's output: a hard constraint, such as
            `lambda x, u: x * (1 - x) * u` for zero at 0 and 1; `None` = the output.
        external_trainable_variables: List of `keras.Variable`, unknown coefficients of an inverse problem that the terms use.

    Raises:
        ValueError: If there is no term.

    Warns:
        UserWarning: If the network does not compute in float64.

    References:
        Raissi, Perdikaris & Karniadakis (2019), *Physics-informed neural networks*.
    """

    # The exact solver pays for larger systems than elsewhere, and XLA for its passes; see `solver_choice` and `structure`.
    solves_equations = True

    def __init__(
        self, network, terms, features=None, transform=None, external_trainable_variables=(), name="pinn", **kwargs
    ):
        super().__init__(name=name, **kwargs)
        if not terms:
            raise ValueError("`terms` must hold at least one residual. Received: none.")
        if network.compute_dtype != "float64":
            warnings.warn(
                "The residuals of a `PINN` are second derivatives, of which float32 leaves few digits. Make the network after "
                f'`keras.config.set_floatx("float64")`. Received: a network that computes in {network.compute_dtype}.',
                stacklevel=2,
            )
        self.network, self.terms = network, dict(terms)
        self._features, self._transform = features, transform
        self.external_trainable_variables = list(external_trainable_variables)
        for variable in self.external_trainable_variables:
            self._track_variable(variable)
        self._num_residuals, self._residuals, self._places = None, {}, {}
        # A network that has its weights can load others at once.
        self.built = network.built

    def solution(self, points):
        """Returns the solution at points, `(N, d) -> (N, k)`, features and transform included."""
        points = tf.convert_to_tensor(points, keras.config.floatx()) if not tf.is_tensor(points) else points
        output = self.network(points if self._features is None else self._features(points))
        return output if self._transform is None else self._transform(points, output)

    def call(self, inputs):
        points, term = inputs["points"], tf.reshape(tf.cast(inputs["term"], tf.int32), [-1, 1])
        found, sizes = [], {}
        for number, (name, residual) in enumerate(self.terms.items()):
            is_own, own = tf.equal(term, number), points
            if name in self._places:
                # Zero times a derivative that is not finite is NaN: each term gets points where it has one.
                own = tf.where(is_own, points, tf.cast(self._places[name], points.dtype))
            found.append((is_own, _as_matrix(residual(self.solution, own))))
            sizes[name] = found[-1][1].shape[1]
        self._num_residuals, largest = sizes, max(sizes.values())
        padded = [(is_own, tf.pad(residual, [[0, 0], [0, largest - residual.shape[1]]])) for is_own, residual in found]
        return tf.add_n([tf.where(is_own, residual, tf.zeros([], residual.dtype)) for is_own, residual in padded])

    def observation_groups(self, x):
        """Returns the number of the term that every component of the residuals belongs to, int32 `(N, m)`; -1 where a term has fewer components."""
        term, sizes = tf.reshape(tf.cast(x["term"], tf.int32), [-1, 1]), self._sizes()
        own = tf.gather(tf.constant([sizes[name] for name in self.terms]), term)
        return tf.where(tf.range(max(sizes.values())) < own, term, -1)

    def cases(self, points, weights=None):
        """Returns inputs, targets and weights for `fit`, `evaluate` and `validation_data`.

        Args:
            points: Dict from the names of all terms to points, arrays `(N_i, d)`, or to pairs `(points, values)`, with values `(N_i,)` or `(N_i, m)`
                that the term is to have instead of zero.
            weights: Dict from names to the weights of terms, positive floats; 1 where none is given.

        Returns:
            `x`, a dict of arrays; `y` `(N, m)`; `sample_weight` `(N,)`.

        Raises:
            ValueError: If a name is not that of a term, if a term is missing, or if points do not have the shape `(N_i, d)`, all of the same d.
        """
        weights = weights or {}
        for name in [*points, *weights]:
            if name not in self.terms:
                raise ValueError(
                    f"Points and weights are given by the names of terms: {', '.join(self.terms)}. Received: {name!r}."
                )
        missing = [name for name in self.terms if name not in points]
        if missing:
            raise ValueError(f"Every term needs points. Received: none for {', '.join(map(repr, missing))}.")
        dtype = keras.config.floatx()
        groups = []
        for name, given in points.items():
            where, values = given if isinstance(given, tuple) else (given, None)
            where = np.asarray(where, dtype)
            if where.ndim != 2 or not len(where):
                raise ValueError(
                    f"The points of a term must be an array (N, d), N >= 1. Received: shape={where.shape} for {name!r}."
                )
            groups.append((name, where, values, positive(f"weights[{name!r}]", weights.get(name, 1.0))))
        columns = {name: where.shape[1] for name, where, _, _ in groups}
        needed = self._num_inputs() or max(columns.values())
        if set(columns.values()) != {needed}:
            raise ValueError(
                f"Points must have as many columns as the solution has coordinates, {needed}. Received: {columns}."
            )
        for name, where, _, _ in groups:
            self._places.setdefault(name, where[:1])
        sizes = self._sizes()
        total, largest = sum(len(where) for _, where, _, _ in groups), max(sizes.values())
        parts = []
        for name, where, values, weight in groups:
            target = np.zeros((len(where), largest), dtype)
            if values is not None:
                target[:, : sizes[name]] = np.reshape(values, (len(where), sizes[name]))
            # Keras' mean is over all cases and over the components of the largest residual.
            share = weight * total / len(where) * largest / sizes[name]
            number = np.full((len(where), 1), list(self.terms).index(name), "int32")
            parts.append((where, number, target, np.full(len(where), share, dtype)))
        where, number, target, share = (np.concatenate(column) for column in zip(*parts, strict=True))
        return {"points": where, "term": number}, target, share

    def redrawn(self, draw, weights=None, every=1):
        """Returns a `tf.data.Dataset` of batches of points that are drawn anew; give `fit` the number of updates as `steps_per_epoch` or `epochs`.

        Args:
            draw: Callable without arguments that returns what `cases` takes; always with the same numbers of points.
            weights: See `cases`.
            every: Integer >= 1: new points every so many updates.
        """
        count("every", every)
        as_tuple = lambda: self.cases(draw(), weights)  # noqa: E731
        first = as_tuple()
        signature = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), first)

        def batches():
            batch = first
            while True:
                for _ in range(every):
                    yield batch
                batch = as_tuple()

        return tf.data.Dataset.from_generator(batches, output_signature=signature)

    def by_residual(self, name, candidates, num_points, power=1.0, constant=1.0, seed=None):
        """Draws points of a term where its residual is large: each of many candidates with a probability that grows with its residual.

        The probability is proportional to `|r|^power / mean(|r|^power) + constant`. For `redrawn`:

            draw = lambda: {"equation": pinn.by_residual("equation", rng.random((20_000, 2)), 2_000), "boundary": on_boundary}
            model.fit(pinn.redrawn(draw, every=100), steps_per_epoch=100, epochs=10)

        Cost: one evaluation of the term at all candidates.

        Args:
            name: String, the term.
            candidates: Array `(M, d)`, M >= `num_points`.
            num_points: Integer >= 1.
            power: Float >= 0, how much large residuals are preferred.
            constant: Float >= 0, the share of points that are drawn evenly, beside 1 of those that are not; 0 leaves regions empty.
            seed: Integer or `np.random.Generator`; `None` = another draw in every call.

        Returns:
            Array `(num_points, d)`, some of the candidates, each at most once. Candidates of residuals that are not finite are not drawn.

        Raises:
            ValueError: If there is no such term, or if there are fewer candidates with a probability than points.

        References:
            Wu, Zhu, Tan, Kartha & Lu (2023), *A comprehensive study of non-adaptive and residual-based adaptive sampling for physics-informed neural
            networks*: `power=1, constant=1` are its defaults.
        """
        if name not in self.terms:
            raise ValueError(f"`name` must be that of a term: {', '.join(self.terms)}. Received: {name!r}.")
        count("num_points", num_points)
        candidates = np.asarray(candidates, keras.config.floatx())
        residual = self._residual_of(name, candidates[:1])(tf.constant(candidates)).numpy()
        size = np.linalg.norm(residual.astype("float64"), axis=1)
        is_finite = np.isfinite(size)
        preference = np.where(is_finite, 1.0, 0.0)
        if size[is_finite].any():
            # Relative to the largest, so that no power overflows.
            size = np.where(is_finite, size / size[is_finite].max(), 0.0) ** power
            preference *= size / size[is_finite].mean() + constant
        if (preference > 0).sum() < num_points:
            raise ValueError(
                f"There must be at least as many candidates with a finite residual as points. Received: {(preference > 0).sum()} for "
                f"num_points={num_points}."
            )
        rng = np.random.default_rng(seed)
        return candidates[rng.choice(len(candidates), num_points, replace=False, p=preference / preference.sum())]

    def _residual_of(self, name, point):
        """A term as one compiled function of points, `(N, d) -> (N, m)`; `point` is one of them, `(1, d)`."""
        if name not in self._residuals:
            self.solution(point)  # makes weights, which no trace may
            function = tf.function(lambda points: _as_matrix(self.terms[name](self.solution, points)), autograph=False)
            spec = tf.TensorSpec([None, point.shape[1]], point.dtype)
            self._residuals[name] = function.get_concrete_function(spec)
        return self._residuals[name]

    def _num_inputs(self):
        """The coordinates of the solution, where the network's inputs tell."""
        shape = getattr(self.network, "input_shape", None) if self._features is None and self.network.built else None
        return shape[-1] if isinstance(shape, tuple) else None

    def _sizes(self):
        """Components of every term's residual, a dict."""
        if self._num_residuals is None:
            # Traced, as in training: `tf.gradients` works nowhere else.
            self._num_residuals = {
                name: self._residual_of(name, place).structured_outputs.shape[1] for name, place in self._places.items()
            }
        return self._num_residuals

    def get_config(self):
        """Raises: terms are functions, which no file holds."""
        raise NotImplementedError(
            "The terms of a `PINN` are functions, which no file holds. Save the network, `pinn.network.save(...)`, or weights and training state, "
            "`model.save_weights(...)`, and load these into a model that the same code has made and compiled: `model.load_weights(...)`."
        )


def _as_matrix(residual):
    """A residual as `(N, m)`."""
    return residual if residual.shape.rank == 2 else residual[:, None]
