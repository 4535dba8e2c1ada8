"""HessianFree: the hyperparameters of the method and the state between updates, as a Keras optimizer."""

import math
import random
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_hf.common import checks
from keras_hf.common.checks import count, finite, integer, part
from keras_hf.common.vectors import num_weights, vector_dtype
from keras_hf.differentiation.curvature import Curvature, GaussNewton
from keras_hf.differentiation.structural_damping import StructuralDamping
from keras_hf.method.convergence import Convergence
from keras_hf.method.optimism import Optimism
from keras_hf.method.update import UpdateState
from keras_hf.problem.batching import GrowingBatch
from keras_hf.solvers.solver import Solver
from keras_hf.solvers.truncated_cg import ConjugateGradient

_PARTS = ("solver", "curvature", "growing_batch", "structural_damping")
# What is traced with an update, so that another value would be ignored.
_FIXED = (*_PARTS, "curvature_batch_size", "micro_batch_size")
# Arguments of the solver that users may pass here by mistake.
_SOLVER_ARGUMENTS = {
    "preconditioner": "preconditioner",
    "stopping": "stopping",
    "max_cg_iterations": "max_iterations",
    "warm_start_decay": "warm_start_decay",
}
# The default of `growing_batch`, which stands for that of the solver; `None` means all of the batch.
_GROWING = GrowingBatch()


@keras.saving.register_keras_serializable("keras_hf")
class HessianFree(keras.optimizers.Optimizer):
    """Hessian-free optimization, for `HFModel.compile`.

    Every update forms the quadratic model

        q(p) = g'p + p'(G + damping I)p / 2

    of the loss, whose curvature G is used only through products with vectors. A solver computes candidate steps from it, and the true loss decides
    which one is taken. The optimizer holds settings and state; `HFModel` performs the update, and a damping callback, by default
    `LevenbergMarquardt()`, adapts the damping to how well q predicted the loss. There is no learning rate.

    The defaults reach a given loss soonest on deep networks (docs/faster.md). The recipe of Martens (2010) is

        HessianFree(damping=45.0, solver=recipe_of_2010(), growing_batch=None)

    with `LevenbergMarquardt(low=0.25, high=0.75, factor=1.5)`.

    `damping` has the scale of the loss. Keras averages losses over the last axis where the literature sums: Martens' 45 for a loss summed over 784
    pixels is 45/784 for Keras' mean.

    Args:
        damping: Float >= 0, the coefficient of the identity at the start of training, in the scale of the loss. `None` (default): the first update
            sets it to a tenth of the curvature along the gradient, `g'Gg / g'g` (with `PreconditionedMomentum` a fiftieth, or a 500th: see
            there), so that the scale of the loss does not matter. `optimizer.damping` may be assigned at any time; once built it is a scalar
            variable, NaN until the first update has set it.
        solver: Computes steps from the quadratic model. `None` (default) leaves the choice to `HFModel`: `DirectSolver()` where digits are likely to
            count (a squared or robust loss, all cases in one batch, and a system that takes at most about a second to factorize),
            `PreconditionedMomentum()` for classifiers of 5,000 weights or more whose layers have Kronecker factors, else
            `ConjugateGradient()`. It is logged at INFO. docs/measured-solvers.md has the measurements.
        curvature: The matrix G: `GaussNewton()` (default), `Hessian()`, `EmpiricalFisher()` or `FiniteDifferenceHessian()`.
        growing_batch: `GrowingBatch`: an update uses a part of the batch, which grows. `None`: an update uses all of it. The default is the solver's:
            `GrowingBatch()` for `ConjugateGradient`, a slower one for `PreconditionedMomentum`, `None` for `DirectSolver`.
        curvature_batch_size: Integer >= 1, the number of cases that products are formed on: one chunk of the batch per update, in turn. `None` =
            all. Usually thousands: with too few, CG fits the curvature of the chunk and not that of the loss. Split among replicas.
        micro_batch_size: Integer >= 1, the number of cases processed at a time on each replica. It changes memory, not results (unless layers combine
            cases, as BatchNormalization does). Products are fastest if the chunk is one such micro-batch, whose linearization is then kept; further
            micro-batches are linearized again in every product. `None` = the chunk's size, or as many cases as keep that micro-batch within about 2
            GiB, estimated from what the network, loops included, writes per case. If lengths are known only at run time, as for sequences of shape
            `(None, 64)`, the longest of the batch counts for all, and tracing the first update takes longer, since several micro-batches must be
            possible; a number avoids that.
        seed: Integer in [0, 2^31 - 1], the seed of the order of cases and chunks. `None` draws one, which is saved, also in files of weights.
        weight_decay: Float >= 0: half of it times the sum of all squared weights, biases included, is added to the loss. "evidence":
            `EvidenceRegularization()` finds it, from 0 on, unless the callbacks of `fit` hold another one. `None` (default) = none. A number may be
            assigned to `optimizer.weight_decay` at any time; once built it is a scalar variable, which is saved. `evaluate` leaves it out.
        structural_damping: `StructuralDamping`, for recurrent networks: damps changes of hidden states too. `None` (default) = of the weights alone.
        use_ema: Whether to keep an exponential moving average of the weights over updates, as Keras' optimizers do (Polyak averaging). On minibatches
            that cannot grow, or grow slowly, the average is closer to the minimum than the last weights. At the end of `fit` it takes their place;
            `keras.callbacks.SwapEMAWeights` swaps it in for evaluation.
        ema_momentum: Float in [0, 1], the weight of the old average in the new one. At update t, counted from 0, it is at most `(1 + t) / (10 + t)`:
            of few updates the average then holds the last ones alone, where that of Keras' optimizers keeps the first.
        name: Name of the optimizer.

    Updates are traced for the parts and the sizes of batches, which are fixed: compile with another optimizer to change them.

    Raises:
        ValueError: If a number is out of its range, or an argument is a first-order one of Keras (`learning_rate`, `clipnorm`, ...).
        TypeError: If a part has the wrong type.
        AttributeError: If a fixed setting is assigned, or a weight decay where there is none.

    Example:

    >>> model = HFModel(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))
    >>> model.compile(optimizer=HessianFree(damping=0.1), loss="mse")

    References:
        Martens (2010), *Deep learning via Hessian-free optimization*; Martens & Sutskever (2012), *Training deep and recurrent networks with
        Hessian-free optimization*.
    """

    def __init__(
        self,
        damping=None,
        solver=None,
        curvature=None,
        growing_batch=_GROWING,
        curvature_batch_size=None,
        micro_batch_size=None,
        seed=None,
        structural_damping=None,
        weight_decay=None,
        use_ema=False,
        ema_momentum=0.99,
        name="hessian_free",
        **kwargs,
    ):
        for misplaced in kwargs.keys() & _SOLVER_ARGUMENTS.keys():
            raise ValueError(
                f"`{misplaced}` is an argument of the solver. Received: {misplaced}={kwargs[misplaced]!r}. "
                f"Use `HessianFree(solver=ConjugateGradient({_SOLVER_ARGUMENTS[misplaced]}=...))`."
            )
        if kwargs:
            raise ValueError(
                "`HessianFree` takes none of Keras' first-order arguments: its step comes from curvature and a line search. "
                f"Received: {', '.join(f'{key}={value!r}' for key, value in kwargs.items())}. "
                "Leave them out; to be more careful raise `damping`."
            )
        # The learning rate is fixed at 1: TensorBoard and other callbacks read it.
        super().__init__(
            learning_rate=1.0,
            use_ema=checks.flag("use_ema", use_ema),
            ema_momentum=finite("ema_momentum", ema_momentum, 0, 1),
            name=name,
        )
        self.finds_decay = isinstance(weight_decay, str) and weight_decay == "evidence"
        self._initial_decay = weight_decay
        if weight_decay is not None and not self.finds_decay:
            self._initial_decay = finite("weight_decay", weight_decay, minimum=0)
        self._initial_damping = None if damping is None else finite("damping", damping, minimum=0)
        self.curvature = part(
            "curvature", GaussNewton() if curvature is None else curvature, Curvature, "GaussNewton()"
        )
        solver_given, growing_batch_given = solver is not None, growing_batch is not _GROWING
        solver = part("solver", solver if solver_given else ConjugateGradient(), Solver, "ConjugateGradient()")
        # The solver that the state belongs to, and one without a state that is used in its place.
        self._solver, self._stateless_solver = solver, None
        if not growing_batch_given:
            growing_batch = solver.growing_batch()
        elif growing_batch is not None:
            part("growing_batch", growing_batch, GrowingBatch, "GrowingBatch()")
        if structural_damping is not None:
            part("structural_damping", structural_damping, StructuralDamping, "StructuralDamping()")
            if not self.curvature.takes_hidden_states:
                raise ValueError(
                    "`structural_damping` adds hidden states to the outputs that the curvature goes through. "
                    f"Received: curvature={self.curvature!r}. Use `GaussNewton()`, or leave `structural_damping` out."
                )
            if not self.solver.damps_hidden_states:
                raise ValueError(
                    f"`{type(self.solver).__name__}` does not damp hidden states. Received: structural_damping={structural_damping!r}. "
                    "Leave it out, or use `ConjugateGradient()`."
                )
        self.structural_damping = structural_damping
        # Whatever is asked for besides the defaults excludes solvers that use all cases or factorize the Gauss-Newton matrix.
        has_defaults = type(self.curvature) is GaussNewton and self.curvature.linearization is None
        has_defaults &= not growing_batch_given or growing_batch is None
        has_defaults &= curvature_batch_size is None and structural_damping is None
        # Whether `HFModel` chooses the solver: one with a state before this optimizer is built, one without in every `fit`.
        self.chooses_solver = has_defaults and not solver_given
        if self.solver.uses_all_cases:
            checks.all_cases(self.solver, growing_batch, curvature_batch_size)
            if type(self.curvature) is not GaussNewton:
                raise ValueError(
                    f"`{type(self.solver).__name__}` factorizes the Gauss-Newton matrix. Received: curvature={self.curvature!r}. Leave it out, or "
                    "use `ConjugateGradient()`."
                )
        self.growing_batch = growing_batch
        self.curvature_batch_size = count("curvature_batch_size", curvature_batch_size, optional=True)
        self.micro_batch_size = count("micro_batch_size", micro_batch_size, optional=True)
        # Drawn as Keras draws default seeds, so that keras.utils.set_random_seed fixes it.
        self._initial_seed = random.randint(0, 2**31 - 1) if seed is None else integer("seed", seed, 0, 2**31 - 1)
        self._seed = self._decay = None
        # An `UpdateState` of variables.
        self._state = None

    def __setattr__(self, name, value):
        if name in _FIXED and hasattr(self, name):
            raise AttributeError(
                f"`{name}` is fixed when the optimizer is made: updates are traced for it. Received: {name}={value!r}. Compile with another "
                f"`HessianFree({name}=...)`; the model keeps its weights."
            )
        super().__setattr__(name, value)

    @property
    def solver(self):
        """The solver in use."""
        return self._stateless_solver or self._solver

    def solve_by(self, solver):
        """Takes a solver without a state in place of the one that the state belongs to, or `None` to go back to that one."""
        self._stateless_solver = solver

    def average_momentum(self):
        """Returns the weight of the old averages of the weights in the new ones, a scalar tensor; see `ema_momentum`."""
        num_updates = tf.cast(self.iterations.value, tf.float64)
        return tf.minimum(tf.constant(self.ema_momentum, tf.float64), (1 + num_updates) / (10 + num_updates))

    @property
    def damping(self):
        """The damping: a scalar `keras.Variable` once built, the initial value before.

        If the first update is to derive it, it is `None` before the optimizer is built, then NaN until that update.
        """
        return self._initial_damping if self._state is None else self._state.damping

    @damping.setter
    def damping(self, value):
        if self._state is None:
            self._initial_damping = finite("damping", value, minimum=0)
        else:
            self._state.damping.assign(value)

    @property
    def curvature_scale(self):
        """The scale of the curvature: a scalar `keras.Variable`, 0 until the first update computes it; `None` before the optimizer is built."""
        return None if self._state is None else self._state.scale

    @property
    def weight_decay(self):
        """The weight decay: a scalar `keras.Variable` once built, the initial value before; `None` without one."""
        return self._initial_decay if self._decay is None else self._decay

    @weight_decay.setter
    def weight_decay(self, value):
        if not hasattr(self, "_initial_decay"):
            # By Keras' constructor, its own default.
            return
        if self._decay is not None:
            self._decay.assign(value)
        elif self._initial_decay is None or self.finds_decay:
            raise AttributeError(
                f"`weight_decay` can be assigned to an optimizer that was made with a number. Received: weight_decay={value!r} where it was made "
                f"with {self._initial_decay!r}. Compile with `HessianFree(weight_decay=...)`; the model keeps its weights."
            )
        else:
            self._initial_decay = finite("weight_decay", value, minimum=0)

    def find_decay(self):
        """Has the weight decay found by evidence, from now on."""
        self.finds_decay, self._initial_decay = True, "evidence"
        if self.built and self._decay is None:
            self._add_decay()

    def _add_decay(self):
        decay = 0.0 if self.finds_decay else self._initial_decay
        self._decay = self._variables_of("weight_decay", tf.constant(decay, self._state.damping.dtype))

    @property
    def learning_rate(self):
        """Always 1, for callbacks that read it. Assigning another value warns and has no effect."""
        return keras.optimizers.Optimizer.learning_rate.fget(self)

    @learning_rate.setter
    def learning_rate(self, value):
        warnings.warn(
            f"`HessianFree` has no learning rate: it reads as 1. Received: learning_rate={value!r}, which has no effect. Assign "
            "`optimizer.damping` to make steps shorter or longer; `LevenbergMarquardt()` does.",
            stacklevel=2,
        )

    @property
    def seed(self):
        """The seed of the order of cases and chunks: a scalar `keras.Variable` once built, an integer before.

        It is a variable so that files of weights hold it too.
        """
        return self._initial_seed if self._seed is None else self._seed

    def build(self, variables, layers=(), solver=None):
        """Creates the state: the damping, the seed, and the states of solver, curvature and growing batch.

        Args:
            variables: List of `keras.Variable`, the trainable weights.
            layers: List of `keras.Layer`, all layers of the network; `HFModel`, which builds the optimizer in place of Keras, hands them over.
            solver: The solver to take where `chooses_solver`; `None` = the default.
        """
        if self.built:
            return
        super().build(variables)
        if solver is not None and self.chooses_solver:
            self._solver = solver
            super().__setattr__("growing_batch", self.growing_batch and solver.growing_batch())
        values, layers = [variable.value for variable in variables], list(layers)
        dtype = vector_dtype(values)
        # Not by keras.initializers.Constant, which rounds numbers to float32.
        damping = math.nan if self._initial_damping is None else self._initial_damping
        number = lambda value: tf.constant(value, dtype)  # noqa: E731
        initial = UpdateState(
            damping=number(damping),
            scale=number(0.0),
            convergence=Convergence.unknown(dtype),
            optimism=Optimism.unknown(),
            last_step=tf.zeros([num_weights(values)], dtype),
            solver=self._solver.initial_state(values, layers),
            curvature=self.curvature.initial_state(values, layers),
            growing_batch=self.growing_batch.initial_state(values, layers) if self.growing_batch else {},
            statistics_cases=number(0.0),
        )
        self._state = self._variables_of("", initial)
        self._seed = self._variables_of("seed", tf.constant(self._initial_seed, tf.int32))
        if self._initial_decay is not None:
            # Files of models without one stay as they are.
            self._add_decay()

    def _variables_of(self, name, nest):
        """Creates a variable for every tensor of a nest, named by its position in the nest."""
        if isinstance(nest, dict):
            return {key: self._variables_of(f"{name}_{key}".lstrip("_"), value) for key, value in nest.items()}
        if isinstance(nest, tuple):
            return type(nest)(**self._variables_of(name, nest._asdict()))
        return self.add_variable(
            nest.shape,
            initializer=lambda shape, dtype: tf.identity(nest),
            dtype=nest.dtype.name,
            aggregation="only_first_replica",
            name=name,
        )

    def state(self):
        """Returns the state of the optimizer, an `update.UpdateState` of tensors."""
        return _values(self._state)

    def assign_state(self, state):
        """Sets the state of the optimizer from an `update.UpdateState` of tensors."""
        _assign(self._state, state)

    def load_own_variables(self, store):
        """Sets the state from a file; Keras calls it."""
        names = [variable.name for variable in self.variables]
        if len(store.keys()) == len(names) - 1:
            place = names.index("convergence_losses")
            values = [store[str(i)] for i in range(len(names) - 1)]
            # Files of versions up to 0.3 lack this variable, and have a scalar in its place. Others may lack the weight decay: Keras warns of that.
            if not np.shape(values[place]):
                values.insert(place, Convergence.unknown(tf.float64).losses)
                store = {str(i): value for i, value in enumerate(values)}
        super().load_own_variables(store)

    def apply(self, grads, trainable_variables=None):
        """Raises an error: an update needs products with the curvature, not only gradients.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`HessianFree` trains a model through `keras_hf.HFModel`, which gives it products with the curvature, not gradients alone. "
            "Wrap the model: `HFModel(model).compile(optimizer=HessianFree(...), ...)`."
        )

    def get_config(self):
        """Returns the constructor's arguments as a dict."""
        config = {
            "damping": self._initial_damping,
            "curvature_batch_size": self.curvature_batch_size,
            "micro_batch_size": self.micro_batch_size,
            "weight_decay": self._initial_decay,
            "seed": self._initial_seed if self._seed is None else int(self._seed.numpy()),
            "use_ema": self.use_ema,
            "ema_momentum": self.ema_momentum,
            "name": self.name,
        }
        parts = {name: getattr(self, name) for name in _PARTS}
        if self.chooses_solver:
            # It will be chosen again, from the same network and loss; the growing batch with it, unless there is none.
            parts["solver"] = None
            if self.growing_batch is not None:
                del parts["growing_batch"]
        return {
            **config,
            **{name: part and keras.saving.serialize_keras_object(part) for name, part in parts.items()},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates the optimizer from the result of `get_config`."""
        parts = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects)
            for name in _PARTS
            if config.get(name) is not None
        }
        # Files of versions up to 0.2 hold the default where none was asked for.
        growing_batch = parts.get("growing_batch")
        if "solver" not in parts and growing_batch and growing_batch.get_config() == _GROWING.get_config():
            parts["growing_batch"] = _GROWING
        return cls(**{**config, **parts})


def _values(nest):
    """Returns the values of a nest of variables, as plain dicts and named tuples: Keras wraps dicts of variables in a class of its own."""
    if isinstance(nest, dict):
        return {name: _values(value) for name, value in nest.items()}
    if isinstance(nest, tuple):
        return type(nest)(*map(_values, nest))
    return tf.convert_to_tensor(nest.value)


def _assign(nest, values):
    """Assigns a nest of tensors to a nest of variables."""
    if isinstance(nest, dict):
        for name, variable in nest.items():
            _assign(variable, values[name])
    elif isinstance(nest, tuple):
        for variable, value in zip(nest, values, strict=True):
            _assign(variable, value)
    else:
        nest.value.assign(values)
