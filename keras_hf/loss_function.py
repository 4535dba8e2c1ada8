"""The loss of a model on given cases as functions of one flat vector, for solvers that are not part of the package."""

import contextlib
import functools

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common.cluster import replica_number
from keras_hf.common.vectors import assign, epsilon, num_weights, pack, unpack, vector_dtype
from keras_hf.problem.replicas import on_replicas
from keras_hf.training import guard
from keras_hf.training.setup import with_objective

# By how much half the sum of squared residuals and the loss may differ, relative to them.
_RTOL = {tf.float32: 1e-3, tf.float64: 1e-6}


class LossFunction:
    """The loss that `HFModel.fit` minimises, on given cases, as functions of one flat vector of all trainable weights, `(n,)`.

    `HFModel.objective` makes it. The order of weights is that of `model.trainable_variables`, each flattened row by row. Vectors come as anything
    that NumPy takes, and results as Python floats and float64 arrays, as `scipy.optimize.minimize` wants them; they are computed in the type of
    the weights: float32 stops a solver where steps change the loss by less than about 1e-7 of itself.

    The loss is Keras' `compute_loss` of all cases in training mode: the compiled loss with its reduction (by default the mean over cases and over the
    entries of an output; with sample weights the sum of weighted losses by the number of cases), plus regularizers and added losses, once. Products
    are with the curvature of the compiled optimizer over the same cases, regularizers included, the damping not. It is one fixed function: random
    layers such as `Dropout` draw the same numbers in every call, and BatchNormalization normalizes by the statistics of the cases (where memory calls
    for several micro-batches, by those of each micro-batch: see `HessianFree(micro_batch_size=...)`). `growing_batch`, `curvature_batch_size` and
    constraints are for `fit` alone: all cases count, and weights are taken as they are.

    For a loss that is half a sum of squares, such as "mse", `residuals` and `jacobian` are what `scipy.optimize.least_squares` asks for:
    `least_squares(f.residuals, f.weights, f.jacobian)`. Use float64 there.

    Each method is one compiled function, traced at its first call. Each but `assign` leaves all values of the model as they were. Nothing is kept
    between calls: a product makes the linearization at its weights anew.

    Example:

    >>> from scipy.optimize import minimize
    >>> model = HFModel(keras.Sequential([keras.Input((1,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)]))
    >>> model.compile(loss="mse")
    >>> x = np.linspace(-1, 1, 64)[:, None]
    >>> f = model.objective(x, np.sin(3 * x))
    >>> found = minimize(f.loss_and_gradient, f.weights, jac=True, hessp=f.product, method="trust-ncg")
    >>> f.assign(found.x)
    >>> f.loss_at(f.weights) < 1e-2
    True
    """

    def __init__(self, model, data):
        self._model, self._data = model, data
        self._variables = [variable.value for variable in model.trainable_variables]
        # That of now, whatever is trained later: random numbers depend on it.
        self._update_number = int(model.optimizer.iterations.numpy())
        self._loss = self._compiled(lambda objective: objective.loss())
        self._loss_and_gradient = self._compiled(lambda objective: objective.loss_and_gradient()[:2])
        self._product = self._compiled(lambda objective, v: objective.product(self._curvature(objective))(v))
        self._residuals = self._compiled(lambda objective: (_residuals(objective), objective.loss()))
        self._jacobian = self._compiled(_jacobian)

    @property
    def weights(self):
        """The weights that the model has now, float64 `(n,)`."""
        return pack([tf.convert_to_tensor(variable) for variable in self._variables], tf.float64).numpy()

    def assign(self, w):
        """Gives the model the weights `w`, and nothing else: moving statistics of BatchNormalization stay as they were.

        So do spectral norms: the next pass in training mode, or `fit`, divides kernels within `SpectralNormalization` by them.

        Args:
            w: Array `(n,)`.

        Raises:
            ValueError: If `w` is not such a vector.
        """
        assign(self._variables, unpack(self._vector("w", w, tf.float64), self._variables))

    def loss_at(self, w):
        """Returns the loss at `w`, a float. Cost: one forward pass.

        Args:
            w: Array `(n,)`.

        Raises:
            ValueError: If `w` is not such a vector.
        """
        with self._at(w):
            return float(self._loss())

    def loss_and_gradient(self, w):
        """Returns the loss at `w`, a float, and its gradient, float64 `(n,)`. Cost: one gradient.

        Args:
            w: Array `(n,)`.

        Raises:
            ValueError: If `w` is not such a vector.
        """
        with self._at(w):
            loss, gradient = self._loss_and_gradient()
        return float(loss), gradient.numpy().astype("float64")

    def product(self, w, v):
        """Returns the curvature at `w` times `v`, float64 `(n,)`: `hessp` of `scipy.optimize.minimize`. Cost: about three gradients.

        Args:
            w: Array `(n,)`, the weights.
            v: Array `(n,)`.

        Raises:
            ValueError: If `w` or `v` is not such a vector.
        """
        v = self._vector("v", v, vector_dtype(self._variables))
        with self._at(w):
            return self._product(v).numpy().astype("float64")

    def residuals(self, w):
        """Returns the weighted residuals s at `w`, float64 `(rows,)`, with `s's / 2` the loss: `fun` of `scipy.optimize.least_squares`.

        A row for every case and entry of the outputs, and one for every weight with an L2 regularizer. For "mse" with its mean over N cases of k
        entries the rows are `sqrt(2 c / (N k)) (y_pred - y)`, c being the sample weight; for `L2(c)` they are `sqrt(2 c) w`.

        Cost: a few forward passes.

        Args:
            w: Array `(n,)`.

        Raises:
            ValueError: If `w` is not such a vector, if the loss is not half a sum of squares, or if the network has no rows of single cases (see
                `DirectSolver`).
        """
        self._require_rows()
        with self._at(w):
            residuals, loss = self._residuals()
        residuals = residuals.numpy().astype("float64")
        with np.errstate(over="ignore", invalid="ignore"):
            self._require_squares(w, np.sum(residuals**2) / 2, float(loss))
        return residuals

    def jacobian(self, w):
        """Returns the Jacobian of `residuals` at `w`, float64 `(rows, n)`: `jac` of `scipy.optimize.least_squares`.

        Cost: one vectorised gradient per case and entry of the outputs. Memory: at most 1 GiB.

        Args:
            w: Array `(n,)`.

        Raises:
            ValueError: As `residuals`, and if the Jacobian is larger.
        """
        self._require_rows()
        with self._at(w):
            return self._jacobian().numpy().astype("float64")

    def _curvature(self, objective):
        """Returns the curvature as the next update would use it."""
        return self._setup.curvature.prepared(objective, self._model.optimizer.state().curvature)[0]

    def _require_rows(self):
        """Raises an error if the network has no rows of single cases, or a regularizer is not a sum of squares."""
        for what, cure in self._setup.structure.without_rows:
            raise ValueError(
                f"Residuals need the derivative of every case's own outputs in full precision. Received: a network with {what}. "
                f"Use `loss_and_gradient`, or {cure}."
            )
        strategy = self._model.distribute_strategy
        if strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "Residuals are computed on one replica. "
                f"Received: a strategy with {strategy.num_replicas_in_sync}. Make the model outside of its scope."
            )
        for _, regularizer in self._setup.task.regularizers:
            is_squares = isinstance(regularizer, keras.regularizers.L2) or (
                isinstance(regularizer, keras.regularizers.L1L2) and float(regularizer.l1) == 0
            )
            if not is_squares:
                raise ValueError(
                    f"Residuals need regularizers that are sums of squares. Received: regularizer={regularizer!r}. Use `keras.regularizers.L2`, "
                    "or minimise with `loss_and_gradient`."
                )

    def _require_squares(self, w, half, loss):
        """Raises an error if half the sum of squared residuals is not the loss; for numbers that are not finite, nothing can be said."""
        dtype = vector_dtype(self._variables)
        if not abs(half - loss) > _RTOL[dtype] * max(half, loss):
            return
        # Close to a perfect fit both are rounding: then weights changed by rounding give another loss.
        change = 10 * epsilon(dtype) / _RTOL[dtype]
        w = np.asarray(w, "float64")
        other = self.loss_at(w * (1 + change * (-1.0) ** np.arange(len(w))))
        if abs(np.sqrt(max(other, 0)) - np.sqrt(max(loss, 0))) < np.sqrt(max(half, loss)) / 2:
            raise ValueError(
                "Residuals need a loss that is half a sum of squares, such as 'mse', with weights that are not negative. "
                f"Received: a loss of {loss:.6g} where half the sum of squares is {half:.6g}. Minimise it with `loss_and_gradient` and "
                "`scipy.optimize.minimize`, or with `DirectSolver`."
            )

    @contextlib.contextmanager
    def _at(self, w):
        """Gives the model the weights `w` while it is open, in the state in which an update computes."""
        before = [variable.read_value() for variable in self._variables]
        try:
            self.assign(w)
            with guard.unaltered_arithmetic(self._setup.gains_by_optimized_graphs):
                yield
        finally:
            assign(self._variables, before)

    def _vector(self, name, value, dtype):
        value = np.asarray(value)
        size = num_weights(self._variables)
        if value.shape != (size,):
            raise ValueError(
                f"`{name}` must be a vector of shape ({size},), all trainable weights in the order of `weights`. Received: shape={value.shape}."
            )
        return tf.constant(value, dtype)

    @functools.cached_property
    def _setup(self):
        """The model's `setup.Setup`, for all cases and weights as they are."""
        setup = self._model.setup_for(self._data).without_metrics()
        task = setup.task._replace(constraints=[None] * len(self._variables))
        most = -(-self._data.static_num_cases // self._model.distribute_strategy.num_replicas_in_sync)
        return setup._replace(task=task, chunk_size=None, chunk_share=1.0, most_cases=most)

    def _compiled(self, function):
        """Compiles `function(objective, *vectors)`, the objective being that at the model's weights; each replica has its part of the cases."""
        strategy = self._model.distribute_strategy
        count = strategy.num_replicas_in_sync

        def on_replica(*vectors):
            data = self._data
            if count > 1:
                data = data.take(tf.range(replica_number(), data.num_cases, count))
            number = tf.constant(self._update_number)
            return with_objective(
                self._setup, data, lambda objective: function(objective, *vectors), update_number=number
            )

        return tf.function(on_replicas(strategy, on_replica), autograph=False)


def _residuals(objective):
    """The rows' residuals and those of L2 regularizers, `(rows,)`."""
    residuals = objective.rows.residuals
    if not objective.has_regularization:
        return residuals
    places, roots = _regularizer_rows(objective)
    return tf.concat([residuals, roots * tf.gather(objective.start_vector, places)], 0)


def _jacobian(objective):
    """The derivative of `_residuals`, `(rows, n)`."""
    jacobian = objective.rows.jacobian
    if jacobian is None:
        raise ValueError(
            "The Jacobian is formed up to 1 GiB, 2^27 numbers of rows times weights. "
            f"Received: more, with {objective.num_weights} weights. Use fewer cases, or minimise with `loss_and_gradient` and `product`."
        )
    if not objective.has_regularization:
        return jacobian
    places, roots = _regularizer_rows(objective)
    return tf.concat([jacobian, roots[:, None] * tf.one_hot(places, objective.num_weights, dtype=jacobian.dtype)], 0)


def _regularizer_rows(objective):
    """The places of weights with a regularizer in flat vectors, and the roots of its second derivative: `(k,)` each."""
    places, start = [], 0
    for variable in objective.variables:
        size = variable.shape.num_elements()
        if any(variable is regularized for regularized in objective.regularized):
            places.append(np.arange(start, start + size))
        start += size
    places = np.concatenate(places)
    return places, tf.sqrt(tf.gather(objective.regularization_diagonal(), places))
