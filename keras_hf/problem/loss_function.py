"""The loss of a model on given cases as functions of one flat vector, for solvers that are not part of the package."""

import contextlib
import functools

import numpy as np
import tensorflow as tf

from keras_hf.common.vectors import assign, num_weights, pack, unpack, vector_dtype
from keras_hf.problem.batching import divide
from keras_hf.problem.fixed_network import FixedNetwork
from keras_hf.problem.local_objective import LocalCases
from keras_hf.problem.objective import Objective
from keras_hf.problem.replicas import across_replicas, replica_number
from keras_hf.problem.structure import second_derivatives_explained


class LossFunction:
    """The loss that `HFModel.fit` minimises, on given cases, as functions of one flat vector of all trainable weights, `(n,)`.

    `HFModel.objective` makes it. The order of weights is that of `model.trainable_variables`, each flattened row by row. Vectors come as anything
    that NumPy takes, and results as Python floats and float64 arrays, as `scipy.optimize.minimize` wants them; they are computed in the type of
    the weights: float32 stops a solver where steps change the loss by less than about 1e-7 of itself.

    The loss is Keras' `compute_loss` of all cases in training mode: the compiled loss with its reduction (by default the mean over cases and over the
    entries of an output; with sample weights the sum of weighted losses by the number of cases), plus regularizers and added losses, once. Products
    are with the curvature of the compiled optimizer over the same cases, regularizers included, the damping not. It is one fixed function: random
    layers such as `Dropout` draw the same numbers in every call, and BatchNormalization normalizes by the statistics of the cases (where memory calls
    for several pieces, by those of each piece: see `HessianFree(micro_batch_size=...)`). `growing_batch`, `curvature_batch_size` and constraints are
    for `fit` alone: all cases count, and weights are taken as they are.

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

    def __init__(self, data, variables, task_of, optimizer, strategy, guard):
        # `task_of(data)` gives `fixed_network.Task` and `structure.Structure`; `guard()` is open while something is computed.
        self._data, self._variables, self._optimizer = data, variables, optimizer
        self._strategy, self._guard = strategy, guard
        self._task = functools.cache(lambda: task_of(data))
        # That of now, whatever is trained later: random numbers depend on it.
        self._update_number = int(optimizer.iterations.numpy())
        curvature = optimizer.curvature
        self._loss_and_gradient = self._compiled(lambda objective: objective.loss_and_gradient()[:2])
        self._loss = self._compiled(
            lambda objective: objective.loss_at(tf.zeros([objective.num_weights], objective.dtype))
        )
        self._product = self._compiled(lambda objective, v: objective.product(curvature)(v))

    @property
    def weights(self):
        """The weights that the model has now, float64 `(n,)`."""
        return pack([tf.convert_to_tensor(variable) for variable in self._variables], tf.float64).numpy()

    def assign(self, w):
        """Gives the model the weights `w`, and nothing else: moving statistics of BatchNormalization stay as they were.

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

    @contextlib.contextmanager
    def _at(self, w):
        """Gives the model the weights `w` while it is open, in the state in which an update computes."""
        before = [variable.read_value() for variable in self._variables]
        try:
            self.assign(w)
            with self._guard():
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

    def _compiled(self, function):
        """Compiles `function(objective, *vectors)`, the objective being that at the model's weights."""

        @tf.function(autograph=False)
        def compute(*vectors):
            found = self._strategy.run(lambda: self._with_objective(lambda objective: function(objective, *vectors)))
            # The same on all replicas.
            return tf.nest.map_structure(lambda value: self._strategy.experimental_local_results(value)[0], found)

        return compute

    def _with_objective(self, function):
        """Calls `function(objective)` once for all replicas, each of which has its part of the cases."""
        task, structure = self._task()
        task = task._replace(constraints=[None] * len(task.variables), update_metrics=lambda data, y_pred: None)
        count = self._strategy.num_replicas_in_sync
        data, most = self._data, -(-self._data.static_num_cases // count)
        if count > 1:
            data = data.take(tf.range(replica_number(), data.num_cases, count))
        piece_size = self._optimizer.micro_batch_size or structure.default_piece_size(self._data)
        if "unknown" in structure.combinations:
            piece_size = None
        structure = structure._replace(chunk_is_one_piece=piece_size is None or piece_size >= most)
        pieces = divide(data.num_cases, None, piece_size, self._update_number, self._optimizer.seed)
        fixed = FixedNetwork(task, structure, tf.constant(self._update_number))
        with second_derivatives_explained(structure.layer_of_op):
            return across_replicas(
                lambda replicas, cases: function(Objective(replicas, cases, fixed, chunk_is_batch=True)),
                LocalCases(fixed, data, pieces),
            )
