"""HessianFree: the hyperparameters of the method and the state that lives between updates, as a Keras optimizer."""

import math
import random
import warnings

import keras
import tensorflow as tf

from keras_hf.common import checks
from keras_hf.common.checks import count, finite, integer, part
from keras_hf.common.vectors import vector_dtype
from keras_hf.convergence import Convergence
from keras_hf.problem.batching import GrowingBatch
from keras_hf.problem.curvature import Curvature, GaussNewton
from keras_hf.solvers.solver import Solver
from keras_hf.solvers.truncated_cg import ConjugateGradient
from keras_hf.update import UpdateState

_PARTS = ("solver", "curvature", "growing_batch")
# Arguments of the solver, which users look for here.
_SOLVER_ARGUMENTS = {
    "preconditioner": "preconditioner",
    "stopping": "stopping",
    "max_cg_iterations": "max_iterations",
    "warm_start_decay": "warm_start_decay",
}
# The default; `None` is a choice of its own here.
_GROWING = GrowingBatch()


@keras.saving.register_keras_serializable("keras_hf")
class HessianFree(keras.optimizers.Optimizer):
    """Hessian-free optimization, for `HFModel.compile`.

    Every update takes the quadratic model

        q(p) = g'p + p'(G + damping I)p / 2

    of the loss, whose curvature G is seen only through products with vectors; a solver makes candidate steps of it, and the true loss picks the one
    that the weights move by. The optimizer holds settings and state; `HFModel` makes the update, and a damping callback such as `LevenbergMarquardt`
    adapts the damping to how well q predicted the loss. There is no learning rate.

    The defaults are those that reach a given loss soonest on deep networks (docs/faster.md). The recipe of Martens (2010) is

        HessianFree(damping=45.0, solver=recipe_of_2010(), growing_batch=None)

    with `LevenbergMarquardt(low=0.25, high=0.75, factor=1.5)`.

    A number for `damping` is in the scale of the loss. Keras means losses over the last axis where the literature sums: Martens' 45 on a loss summed
    over 784 pixels is 45/784 on Keras' mean.

    Args:
        damping: Float >= 0, the coefficient of the identity at the start of training, in the scale of the loss. `None` (default): the first update
            finds it, as a tenth of the curvature along the gradient, `g'Gg / g'g`; the scale of the loss does not matter then. Once built,
            `optimizer.damping` is a scalar variable that any callback may assign; it is NaN until the first update has found it.
        solver: How steps come from the quadratic model: `ConjugateGradient()` (default), with its preconditioner, stopping rule and limit.
        curvature: The matrix G: `GaussNewton()` (default), `Hessian()`, `EmpiricalFisher()` or `FiniteDifferenceHessian()`.
        growing_batch: `GrowingBatch` (default), updates on a part of the batch that grows, or `None`, updates on all of it.
        curvature_batch_size: Integer >= 1, the cases of the batch that products are formed on, one chunk of the batch after the other; `None` = all.
            Thousands, as a rule: curvature of too few cases is fitted by CG and not by the loss. Split among replicas.
        micro_batch_size: Integer >= 1, the cases that are worked on at a time on each replica. Memory, not results, depends on it (unless layers look
            across cases, as BatchNormalization does). Products are fastest where the chunk is one such piece, whose linearization is then kept;
            further pieces are linearized anew in every product. `None` = the chunk's size, or as many as keep that piece within about 2 GiB,
            estimated from what the network, loops included, writes per case. Where lengths are known at run time only, as of `(None, 64)` sequences,
            the longest of the batch counts for all, and the first update is traced longer, for several pieces; a number spares that.
        seed: Integer in [0, 2^31 - 1], of the order of cases and chunks. `None` draws one, which is saved, in files of weights, too.
        name: Name of the optimizer.

    Raises:
        ValueError: If a number is out of its range, or a first-order argument of Keras came (`learning_rate`, `clipnorm`, ...).
        TypeError: If a part is no object of its kind.

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
        # Fixed at 1: TensorBoard and other callbacks look at it.
        super().__init__(learning_rate=1.0, name=name)
        self._initial_damping = None if damping is None else finite("damping", damping, minimum=0)
        self.curvature = part(
            "curvature", GaussNewton() if curvature is None else curvature, Curvature, "GaussNewton()"
        )
        self.solver = part("solver", ConjugateGradient() if solver is None else solver, Solver, "ConjugateGradient()")
        if growing_batch is not None:
            part("growing_batch", growing_batch, GrowingBatch, "GrowingBatch()")
        if self.solver.uses_all_cases:
            growing_batch = None if growing_batch is _GROWING else growing_batch
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
        # All layers of the network, which `HFModel` tells: Keras builds optimizers, some before there are layers, from variables alone.
        self.find_layers = list
        self._seed = None
        # `UpdateState` of variables.
        self._state = None

    @property
    def damping(self):
        """The damping: a scalar `keras.Variable` once built, the initial value before.

        NaN, or `None` before, where the first update is to find it.
        """
        return self._initial_damping if self._state is None else self._state.damping

    @property
    def curvature_scale(self):
        """The scale of the curvature, which the first update finds: a scalar `keras.Variable`, 0 before; `None` before it is built."""
        return None if self._state is None else self._state.scale

    @property
    def learning_rate(self):
        """1, for callbacks that look at it. Assigning another warns, and changes nothing."""
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

        A variable, so that files of weights bring it back, too.
        """
        return self._initial_seed if self._seed is None else self._seed

    def build(self, variables):
        """Makes the state: the damping, the seed, and what solver, curvature and growing batch remember.

        Args:
            variables: List of `keras.Variable`, the trainable weights.
        """
        if self.built:
            return
        super().build(variables)
        values, layers = [variable.value for variable in variables], self.find_layers()
        dtype = vector_dtype(values)
        # Not through keras.initializers.Constant, which takes numbers through float32.
        damping = math.nan if self._initial_damping is None else self._initial_damping
        number = lambda value: tf.constant(value, dtype)  # noqa: E731
        initial = UpdateState(
            damping=number(damping),
            scale=number(0.0),
            convergence=Convergence(number(0.0), number(0.0), number(0.0)),
            solver=self.solver.initial_state(values, layers),
            curvature=self.curvature.initial_state(values, layers),
            growing_batch=self.growing_batch.initial_state(values, layers) if self.growing_batch else {},
            statistics_cases=number(0.0),
        )
        self._state = self._variables_of("", initial)
        self._seed = self._variables_of("seed", tf.constant(self._initial_seed, tf.int32))

    def _variables_of(self, name, nest):
        """Makes a variable of every tensor of a nest, named by its place in it."""
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
        """Returns what an update goes on from, an `update.UpdateState` of tensors."""
        return _values(self._state)

    def assign_state(self, state):
        """Sets what an update goes on from, an `update.UpdateState` of tensors."""
        _assign(self._state, state)

    def apply(self, grads, trainable_variables=None):
        """Refuses: an update needs products with the curvature, which a list of gradients does not give.

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
            "seed": self._initial_seed if self._seed is None else int(self._seed.numpy()),
            "name": self.name,
        }
        parts = {name: getattr(self, name) for name in _PARTS}
        return {
            **config,
            **{name: part and keras.saving.serialize_keras_object(part) for name, part in parts.items()},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the optimizer from what `get_config` returned."""
        parts = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects)
            for name in _PARTS
            if config.get(name) is not None
        }
        return cls(**{**config, **parts})


def _values(nest):
    """The values of a nest of variables, as plain dicts and named tuples: Keras keeps dicts of variables as its own kind."""
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
