"""A fair race with other methods: the settings they run with, and the clock that every method runs against."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from scipy import optimize

from examples.tables import add_row, read_rows, write_rows
from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    GaussNewton,
    Hessian,
    HessianFree,
    Identity,
    LevenbergMarquardt,
    ResidualTolerance,
    recipe_of_2010,
)
from keras_hf.callbacks.progress import Shown
from keras_hf.callbacks.recorder import update_cost
from keras_hf.common.files import replacing
from keras_hf.common.vectors import num_rows
from keras_hf.solvers.search import Taken, walk_back

# What tables and figures call the methods.
LABELS = {
    "hf": "Hessian-free (keras_hf)",
    "hf-momentum": "Hessian-free with momentum (keras_hf)",
    "cg": "conjugate gradients (keras_hf)",
    "recipe": "Hessian-free of 2010",
    "standard": "standard Hessian-free",
    "lbfgs": "L-BFGS",
    "ncg": "nonlinear CG",
    "trust-region": "trust region",
    "least-squares": "SciPy's least_squares",
    "gd": "gradient descent",
    "momentum": "momentum, all cases",
    "sgd": "SGD",
    "adam": "Adam",
    "adam-glorot": "Adam, Glorot's weights",
    "adam+lbfgs": "Adam, then L-BFGS",
    "nag": "Nesterov momentum",
}
STEPS_PER_EXECUTION = 10  # The work between calls would otherwise double the time of a step of a small network.


class NesterovMomentum(keras.optimizers.SGD):
    """Nesterov's accelerated gradient with the momentum schedule of Sutskever et al. (2013), section 3.

    At update t the momentum is `min(1 - 1 / (2 * (t // 250 + 1)), max_momentum)`: it begins at 1/2, since the first
    gradients are so large that a momentum of 0.99 would carry all units into saturation.

    Args:
        learning_rate: Float.
        max_momentum: Float in [0, 1), reached after `125 / (1 - max_momentum)` updates.
        **options: What every optimizer of Keras may be told, such as `use_ema`.
    """

    def __init__(self, learning_rate, max_momentum=0.99, **options):
        super().__init__(learning_rate, momentum=max_momentum, nesterov=True, **options)

    def update_step(self, gradient, variable, learning_rate):
        ramp = 1 - 0.5 / (ops.cast(self.iterations // 250, variable.dtype) + 1)
        momentum = ops.minimum(ramp, self.momentum)
        velocity = self.momentums[self._get_variable_index(variable)]
        self.assign(velocity, momentum * velocity - learning_rate * gradient)
        self.assign_add(variable, momentum * velocity - learning_rate * gradient)


class Baseline(NamedTuple):
    """A first-order method with its settings.

    Attributes:
        optimizer: Callable that makes the Keras optimizer from a learning rate.
        learning_rates: Dict, the learning rate for the sizes "demo" and "full".
        batch_size: Integer, cases in an update; None for all.
        cosine_decay: Boolean, whether the learning rate falls to zero along a cosine over the time given.
        sparse: Boolean, whether it starts from the sparse weights, as Hessian-free does, or from Keras' default ones.
    """

    optimizer: Callable
    learning_rates: dict
    batch_size: int | None = 200
    cosine_decay: bool = False
    sparse: bool = True


# Learning rates for a loss summed over pixels and averaged over cases. Those of the demo are the best by training error
# of a grid in factors of three, on 1,000 curves of another seed and in about the demo's time; "full" is fixed beforehand.
BASELINES = {
    "gd": Baseline(keras.optimizers.SGD, {"demo": 3e-2, "full": 3e-2}, batch_size=None),
    "momentum": Baseline(partial(keras.optimizers.SGD, momentum=0.9), {"demo": 3e-2, "full": 1e-2}, batch_size=None),
    "sgd": Baseline(keras.optimizers.SGD, {"demo": 3e-2, "full": 3e-2}),
    "adam": Baseline(keras.optimizers.Adam, {"demo": 1e-2, "full": 1e-3}, cosine_decay=True),
    "nag": Baseline(NesterovMomentum, {"demo": 1e-2, "full": 1e-2}),
    "adam-glorot": Baseline(keras.optimizers.Adam, {"demo": 1e-2, "full": 1e-3}, cosine_decay=True, sparse=False),
}


def muon(learning_rate, network):
    """Makes Keras' Muon for a network: Adam for biases, convolutions and the last layer, as its authors advise.

    Without the decay of weights that it has in Keras by default: a penalty belongs to the loss, the same for all methods.

    Args:
        learning_rate: Float, in the scale of Adam's.
        network: Keras model, built.

    Returns:
        A `keras.optimizers.Muon`. That of Keras 3.12 fails on TensorFlow.
    """
    last = f"(^|/){network.layers[-1].name}/"
    return keras.optimizers.Muon(learning_rate, weight_decay=None, adam_weight_decay=None, exclude_layers=[last])


def fit_compiled(network, optimizer, loss, x, y, batch_size, recorder, cosine_decay=False, seed=0):
    """Trains with a first-order method, ten steps in one XLA program, until `recorder` ends it.

    Cases are gathered within it, since a step of a small network is over before Keras' loop has prepared the next one.

    Args:
        network: Keras model.
        optimizer: Keras optimizer.
        loss: Callable `(y_true, y_pred) -> (N,)`, the loss of each case; the network's penalties are added to its mean.
        x: Array `(N, ...)`, the training cases.
        y: Array `(N, ...)`, their targets.
        batch_size: Integer, cases in an update, drawn without replacement in each epoch; None for all.
        recorder: A `Recorder`.
        cosine_decay: Boolean, whether the learning rate falls to zero along a cosine over the recorder's time.
        seed: Integer, of the order of cases.
    """
    batch_size = min(batch_size or len(x), len(x))
    optimizer.build(network.trainable_variables)
    initial = float(optimizer.learning_rate)
    steps = _compiled_steps(network, optimizer, loss, tf.constant(x), tf.constant(y))
    recorder.begin([*network.variables, *optimizer.variables])
    # A run that goes on with an earlier one has an order of its own.
    batches = _batches_of_cases(len(x), batch_size, np.random.default_rng([seed, int(optimizer.iterations)]))
    stop = False
    while not stop:
        if cosine_decay:
            optimizer.learning_rate = initial * recorder.cosine
        steps(next(batches))
        updates = int(optimizer.iterations)
        stop = recorder.after_update(updates, {"num_cases": batch_size, "cost": updates * batch_size / len(x)})


def _compiled_steps(network, optimizer, loss, x, y):
    """Returns a function that makes the updates on batches of cases `(num_steps, batch_size)`, which are gathered in it."""
    weights = network.trainable_variables

    def step(cases):
        with tf.GradientTape() as tape:
            y_pred = network(tf.gather(x, cases), training=True)
            value = tf.reduce_mean(loss(tf.gather(y, cases), y_pred)) + sum(network.losses)
        optimizer.apply(tape.gradient(value, weights), weights)

    @tf.function(jit_compile=True)
    def steps(batches):
        for i in tf.range(STEPS_PER_EXECUTION):
            step(batches[i])

    return steps


def _batches_of_cases(num_cases, batch_size, rng):
    """Yields tensors `(num_steps, batch_size)` of cases: one permutation of all after the other."""
    size = STEPS_PER_EXECUTION * batch_size
    cases = np.empty(0, "int32")
    while True:
        while len(cases) < size:
            cases = np.concatenate([cases, rng.permutation(num_cases).astype("int32")])
        yield tf.constant(cases[:size].reshape(STEPS_PER_EXECUTION, batch_size))
        cases = cases[size:]


class LossAndGradient:
    """Loss on the whole training set, penalties included, and its gradient as functions of one flat vector, for scipy.

    Computed in the type of the weights, in pieces so that memory is bounded; added up and handed over in float64. Cost: one
    gradient.

    Args:
        network: Keras model, built. Each call leaves it with the weights called for.
        loss: Callable `(y_true, y_pred) -> (N,)`, the loss of each case.
        x: Array `(N, ...)`, the training cases, or a structure of arrays.
        y: Array `(N, ...)`, their targets, or a structure of arrays.
        piece_size: Integer, cases worked on at a time.

    Attributes:
        cost: Integer, the gradients of the training set so far; a product counts as two.
    """

    def __init__(self, network, loss, x, y, piece_size=5000):
        self.weights = network.trainable_variables
        num_cases = len(tf.nest.flatten(x)[0])
        self.pieces = [
            tf.nest.map_structure(lambda array, start=start: tf.constant(array[start : start + piece_size]), (x, y))
            for start in range(0, num_cases, piece_size)
        ]
        self.cost = 0
        variables = [weight.value for weight in self.weights]

        def derivative(tape, value):
            gradients = tape.gradient(value, variables, unconnected_gradients="zero")
            return tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], axis=0)

        def of_piece(x_piece, y_piece):
            with tf.GradientTape() as tape:
                y_pred = network(x_piece, training=True)
                # Each piece gets its share of the penalty.
                share = y_pred.shape[0] / num_cases
                value = tf.reduce_sum(loss(y_piece, y_pred)) / num_cases + share * sum(network.losses)
            return value, derivative(tape, value)

        def product_of_piece(x_piece, y_piece, direction):
            with tf.GradientTape() as tape:
                _, gradient = of_piece(x_piece, y_piece)
                slope = tf.reduce_sum(gradient * direction)
            return derivative(tape, slope)

        def assign(vector):
            parts = tf.split(vector, [math.prod(variable.shape) for variable in variables])
            for variable, part in zip(variables, parts, strict=True):
                variable.assign(tf.reshape(part, variable.shape))

        # One call, which takes a third of the time that the weights one by one take.
        self._assign = tf.function(assign)
        self._of_piece, self._product_of_piece = (
            tf.function(function, jit_compile=True) for function in (of_piece, product_of_piece)
        )

    def __call__(self, vector):
        """Returns the loss, a float, and the gradient, a float64 array `(n,)`, at `vector`, `(n,)`."""
        self.cost += 1
        self.assign(vector)
        loss, gradient = 0.0, np.zeros(len(vector))
        for piece in self.pieces:
            value, part = self._of_piece(*piece)
            loss += float(value)
            gradient += part.numpy()
        return loss, gradient

    def hessian_product(self, vector, direction):
        """Returns the Hessian at `vector`, `(n,)`, times `direction`, `(n,)`: a float64 array `(n,)`. Cost: about two gradients.

        By Pearlmutter's identity: the derivative of the gradient's inner product with the direction.
        """
        self.cost += 2
        self.assign(vector)
        direction = tf.constant(direction, self.weights[0].dtype)
        return sum(self._product_of_piece(*piece, direction).numpy().astype("float64") for piece in self.pieces)

    def vector(self):
        """Returns the network's weights as one float64 array `(n,)`."""
        return np.concatenate([ops.convert_to_numpy(weight).ravel() for weight in self.weights]).astype("float64")

    def assign(self, vector):
        """Gives the network the weights `vector`, `(n,)`."""
        self._assign(tf.constant(vector, self.weights[0].dtype))


class TimeIsUp(Exception):
    """Ends a method of scipy within an update."""


def fit_lbfgs(network, loss, x, y, recorder, max_corrections=10):
    """Trains by scipy's L-BFGS; see `fit_by_scipy`.

    It remembers `max_corrections` pairs of steps and gradient differences.
    """
    options = {"maxcor": max_corrections, "maxfun": 10**9, "ftol": 0.0}
    fit_by_scipy("L-BFGS-B", options, network, loss, x, y, recorder)


def fit_nonlinear_cg(network, loss, x, y, recorder):
    """Trains by scipy's nonlinear conjugate gradients, of Polak and Ribiere; see `fit_by_scipy`."""
    fit_by_scipy("CG", {}, network, loss, x, y, recorder)


def fit_trust_region(network, loss, x, y, recorder, initial_radius=1.0):
    """Trains by Steihaug's trust-region method as scipy has it; see `fit_by_scipy`.

    Each update minimises the quadratic model with the exact Hessian by conjugate gradients from zero, until they leave
    the region, meet negative curvature or have a residual below `min(1/2, sqrt(norm of g))` times the gradient: Nocedal
    & Wright (2006), algorithms 4.1 and 7.2. The first step is no longer than `initial_radius`.
    """
    options = {"initial_trust_radius": initial_radius}
    fit_by_scipy("trust-ncg", options, network, loss, x, y, recorder, uses_products=True)


def fit_by_scipy(method, options, network, loss, x, y, recorder, uses_products=False):
    """Trains by a method of scipy on the whole training set; see `minimize_by_scipy`.

    Args:
        method: String, as `scipy.optimize.minimize` takes it.
        options: Dict of the method's options.
        network: Keras model, built.
        loss: Callable `(y_true, y_pred) -> (N,)`, the loss of each case.
        x: Array `(N, ...)`, the training cases.
        y: Array `(N, ...)`, their targets.
        recorder: A `Recorder`.
        uses_products: Boolean, whether the method wants products with the Hessian.
    """
    recorder.begin(network.trainable_variables)
    function = LossAndGradient(network, loss, x, y)
    minimize_by_scipy(method, options, function, len(x), recorder, uses_products)


def minimize_by_scipy(method, options, function, num_cases, recorder, uses_products=False):
    """Trains by a method of scipy until `recorder`, which has begun, ends it, or no step is found.

    Where it finds no step, as line searches fail to at the precision of float32, it starts again without memory, and so
    does a run that goes on with an earlier one.

    Args:
        method: String, as `scipy.optimize.minimize` takes it.
        options: Dict of the method's options; limits and tolerances are set to never end it.
        function: A `LossAndGradient`, or what has its methods.
        num_cases: Integer, the training cases.
        recorder: A `Recorder`.
        uses_products: Boolean, whether the method wants products with the Hessian.
    """
    vector = function.vector()
    function(vector)
    if uses_products:
        function.hessian_product(vector, vector)
    updates, function.cost = int(recorder.rows[-1]["update"]), recorder.rows[-1].get("cost", 0)

    def logs():
        return {"num_cases": num_cases, "cost": function.cost}

    recorder.after_update(updates, logs())  # The compiled calls.

    def product(vector, direction):
        # An update may take thousands.
        if recorder.seconds >= recorder.max_seconds:
            raise TimeIsUp
        return function.hessian_product(vector, direction)

    def after_iteration(intermediate_result):
        nonlocal updates, vector
        updates += 1
        vector = intermediate_result.x.copy()  # Some methods go on in place.
        function.assign(vector)
        if recorder.after_update(updates, logs()):
            raise StopIteration

    arguments = {"jac": True, "hessp": product if uses_products else None, "method": method}
    options = {"maxiter": 10**9, "gtol": 0.0, **options}
    while not recorder.is_over:
        try:
            result = optimize.minimize(function, vector, callback=after_iteration, options=options, **arguments)
        except TimeIsUp:
            function.assign(vector)
            recorder.after_update(updates, logs())
            return
        vector = result.x
        function.assign(vector)
        if result.nit == 0:
            break
    recorder.finish(updates, logs())


def solver_but_for(changes, base):
    """Returns a `ConjugateGradient` that differs from another one in some arguments, or the solver that came instead.

    Args:
        changes: Dict of arguments, or a `Solver`.
        base: A `ConjugateGradient`.
    """
    # A part holds its settings under the names of its arguments.
    return ConjugateGradient(**{**vars(base), **changes}) if isinstance(changes, dict) else changes


def recipe(damping=45.0, solver=None, **changes):
    """Makes the optimizer and the damping rule of Martens (2010), whatever the package's defaults are.

    Args:
        damping: Float, at the start, in the scale of the loss.
        solver: Dict of arguments of `ConjugateGradient` that are to differ from the recipe's, or a solver instead of it.
        **changes: Arguments of `HessianFree`: what the recipe leaves open, as `curvature_batch_size`, or what is to
            differ from it.

    Returns:
        A `HessianFree` and a `LevenbergMarquardt`.
    """
    solver = solver_but_for(solver or {}, recipe_of_2010())
    arguments = {"curvature": GaussNewton(), "growing_batch": None, **changes}
    optimizer = HessianFree(damping, solver, **arguments)
    return optimizer, LevenbergMarquardt(low=0.25, high=0.75, factor=1.5)


class LastIterate(ConjugateGradient):
    """Conjugate gradients without backtracking: the last iterate is taken, and shortened as Armijo says."""

    def solve(self, model, damping, state):
        return super().solve(model, damping, state)._replace(search=shortened_last)


class WholeStep(ConjugateGradient):
    """Conjugate gradients without any search: the last iterate is the step, whatever the loss does, as long as it is a number."""

    def solve(self, model, damping, state):
        return super().solve(model, damping, state)._replace(search=whole_last)


def shortened_last(loss_at, candidates, loss, gradient):
    """A search that looks at the last candidate alone, and shortens it until the loss falls enough."""
    last = candidates[-1:]
    return _taken_as_last(walk_back(loss_at, last, loss, gradient), candidates)


def whole_last(loss_at, candidates, loss, gradient):
    """A search that takes the last candidate as it is; it is rejected only where the loss there is not finite."""
    del gradient
    at_last = loss_at(candidates[-1])
    is_finite = tf.math.is_finite(at_last)
    size = tf.where(is_finite, tf.ones_like(loss), tf.zeros_like(loss))
    taken = Taken(
        0, candidates[-1], at_last, size, tf.where(is_finite, at_last, loss), at_last[None], tf.constant(0), loss
    )
    return _taken_as_last(taken, candidates)


def _taken_as_last(taken, candidates):
    """What a search took that saw the last candidate alone, as one that saw all."""
    row = num_rows(candidates) - 1
    not_looked_at = tf.fill([row], tf.constant(math.nan, taken.losses.dtype))
    return taken._replace(row=row, losses=tf.concat([not_looked_at, taken.losses], 0))


def standard_hessian_free(damping=1.0, curvature=None, max_iterations=250, micro_batch_size=None, seed=None):
    """Makes the optimizer and the damping rule of standard Hessian-free optimization, from which Martens (2010) sets out.

    The exact Hessian over all cases plus a constant times the identity; conjugate gradients from zero, without a
    preconditioner, until the residual is below `min(1/2, sqrt(norm of g))` times the gradient; the last iterate is the
    step, whatever the loss does.

    Args:
        damping: Float, in the scale of the loss.
        curvature: `Hessian()` (default) or `FiniteDifferenceHessian()`.
        max_iterations: Integer, of CG.
        micro_batch_size: Integer, the cases worked on at a time; None for as many as memory holds.
        seed: Integer, of the order of cases.

    Returns:
        A `HessianFree` and a `ConstantDamping`.
    """
    optimizer = HessianFree(
        damping,
        WholeStep(Identity(), ResidualTolerance(), max_iterations, warm_start_decay=0.0),
        curvature or Hessian(),
        growing_batch=None,
        micro_batch_size=micro_batch_size,
        seed=seed,
    )
    return optimizer, ConstantDamping()


class Recorder(keras.callbacks.Callback):
    """Records the error of an autoencoder against time, shows it in a progress bar, and ends training when the time is up.

    The clock starts after the first call of the compiled training step, so that tracing and compiling aren't timed (nor
    the update, or ten of them, in this call), and stands still while errors are measured. Each row is written to a CSV
    file at once, so that a run that is cut short leaves its trace; and, where there is a `state_path`, what it takes to
    go on with the run, about once a minute. A recorder of the same paths then goes on with it, and times the first call,
    too: late in a run an update may take longer than compiling does. The bar goes over the seconds, or over the updates where the time has no end.

    Args:
        network: Keras model that maps `(N, d)` to `(N, d)`, the one that is trained.
        x_train: Array `(N, d)`, the cases of `train_error`.
        x_test: Array `(M, d)`, the cases of `test_error`.
        path: Path of the CSV file.
        max_seconds: Float, the time of training.
        max_updates: Integer, the updates after which training ends even if time is left.
        interval: Float, seconds of training between two rows; 0 gives a row for every update.
        log_names: Strings, training logs to put into each row, as they are at its update; among them may be
            `total_cg_iterations`, the sum of `cg_iterations`, and `cost`, the passes over the training set in gradients:
            `update_cost` of each update over the training cases.
        state_path: Path of an NPZ file of the run's state; None keeps none.

    Attributes:
        rows: List of dicts, one for each row of the file.
        is_over: Boolean, whether training is over.
    """

    STATE_INTERVAL = 60.0  # Seconds of training, at least, between two states.

    def __init__(
        self, network, x_train, x_test, path, max_seconds, max_updates, interval=0.0, log_names=(), state_path=None
    ):
        super().__init__()
        self.network = network
        self.x_train = x_train
        self.x_test = x_test
        self.path = path
        self.max_seconds = max_seconds
        self.max_updates = max_updates
        self.interval = interval
        self.log_names = log_names
        self.state_path = state_path
        self.rows = []
        self.is_over = False
        self._start, self._bar = None, None
        self._total_cg_iterations, self._cost = 0, 0.0

    def clock(self):
        """Returns the time in seconds, from any beginning."""
        return time.perf_counter()

    @property
    def seconds(self):
        """Seconds of training so far."""
        return 0.0 if self._start is None else self.clock() - self._start

    @property
    def cosine(self):
        """What a cosine that falls from one to zero over the time given has come down to."""
        return 0.5 * (1 + math.cos(math.pi * min(self.seconds / self.max_seconds, 1.0)))

    def on_train_begin(self, logs=None):
        self.begin([*self.model.variables, *self.model.optimizer.variables])

    def on_train_batch_end(self, batch, logs=None):
        updates = int(self.model.optimizer.iterations)
        self.model.stop_training = self.after_update(updates, {**logs, **self.totals(logs)})

    def totals(self, logs):
        """Returns a dict of what is added up over updates: CG iterations and what Hessian-free updates cost."""
        self._total_cg_iterations += int(logs.get("cg_iterations", 0))
        cost = update_cost(self.model.last_trace, int(logs["num_cases"]), self.model.optimizer.curvature_batch_size)
        self._cost += cost / len(self.x_train)
        return {"total_cg_iterations": self._total_cg_iterations, "cost": self._cost}

    def begin(self, variables):
        """Writes the first row, or goes on where an earlier run of the same paths was cut short.

        Args:
            variables: List of Keras variables that training changes; of an earlier run they get the values.
        """
        self._variables = variables
        # Whoever has removed the file wants another run.
        goes_on = self.state_path is not None and Path(self.state_path).exists() and Path(self.path).exists()
        if not goes_on:
            self._record(0, {"num_cases": 0, "total_cg_iterations": 0, "cost": 0})
            self._state_seconds = 0.0
        else:
            self._restore()

    def _restore(self):
        """Reads rows and state; rows that are younger than the state are dropped, for they come again."""
        with np.load(self.state_path) as state:
            num_rows = int(state["num_rows"])
            for number, variable in enumerate(self._variables):
                variable.assign(state[f"variable_{number}"])
        path = Path(self.path)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: 1 + num_rows]))
        self.rows = read_rows(path)
        last = self.rows[-1]
        self._state_seconds = last["seconds"]
        self._start = self.clock() - last["seconds"]
        self._total_cg_iterations, self._cost = last.get("total_cg_iterations", 0), last.get("cost", 0.0)

    def _keep_state(self):
        """Writes what `_restore` reads. An old file is whole until the new one is."""
        values = {f"variable_{number}": variable.numpy() for number, variable in enumerate(self._variables)}
        with replacing(self.state_path) as path:
            np.savez(path, num_rows=len(self.rows), **values)
        self._state_seconds = self.rows[-1]["seconds"]

    def after_update(self, updates, logs):
        """Looks at the clock, and writes a row if one is due.

        Args:
            updates: Integer, the updates so far.
            logs: Dict of the training logs.

        Returns:
            Boolean, whether training is over.
        """
        if self._start is None:
            self._start = self.clock()
        seconds = self.seconds
        self.is_over = seconds >= self.max_seconds or updates >= self.max_updates
        if self.is_over or (updates > self.rows[-1]["update"] and self.is_due(seconds)):
            self._record(updates, logs)
            if self.state_path and (self.is_over or seconds >= self._state_seconds + self.STATE_INTERVAL):
                self._keep_state()
            self._start += self.seconds - seconds
        return self.is_over

    def is_due(self, seconds):
        """Returns whether an update that ended after these seconds gets a row."""
        return seconds >= self.rows[-1]["seconds"] + self.interval

    def finish(self, updates, logs):
        """Writes a last row where training came to an end by itself, unless the last update has one."""
        if not self.is_over:
            self.is_over = True
            if updates > self.rows[-1]["update"]:
                self._record(updates, logs)

    def errors(self):
        """Returns a dict of the errors that a row holds."""
        return {
            "train_error": reconstruction_error(self.network, self.x_train),
            "test_error": reconstruction_error(self.network, self.x_test),
        }

    def _record(self, updates, logs):
        seconds, errors = self.seconds, self.errors()
        row = {
            "update": updates,
            **{name: logs.get(name, math.nan) for name in self.log_names},
            "seconds": round(seconds, 3),
            **errors,
        }
        if self.rows:
            add_row(self.path, row)
        else:
            write_rows(self.path, [row])
        self.rows.append(row)
        # Not before the clock runs: the bar would count what is compiled until then as the time of its first second.
        if self._start is not None:
            self._show(seconds, {"update": updates, **errors})

    def _show(self, seconds, numbers):
        """Brings the progress bar up to date."""
        by_time = math.isfinite(self.max_seconds)
        place, target = (seconds, self.max_seconds) if by_time else (numbers["update"], self.max_updates)
        if self._bar is None:
            unit = "second" if by_time else "update"
            target = math.ceil(target) if math.isfinite(target) else None
            self._bar = keras.utils.Progbar(target, stateful_metrics=[*numbers], unit_name=unit)
        shown = [(name, Shown(value)) for name, value in numbers.items()]
        self._bar.update(math.ceil(min(place, self._bar.target or math.inf)), shown, finalize=self.is_over)


def reconstruction_error(network, x, batch_size=5000):
    """Returns the squared error of reconstructions, summed over outputs and averaged over cases.

    Args:
        network: Keras model that maps `(N, d)` to `(N, d)`.
        x: Array `(N, d)`.
        batch_size: Integer, cases reconstructed at a time.

    Returns:
        Float, accumulated in float64.
    """
    parts = (x[start : start + batch_size] for start in range(0, len(x), batch_size))
    sums = (np.sum(np.square(ops.convert_to_numpy(network(part)) - part), dtype="float64") for part in parts)
    return float(sum(sums)) / len(x)
