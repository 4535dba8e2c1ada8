"""HessianFree: the hyperparameters of the method and the state that lives between updates, as a Keras optimizer."""

import math
import random
import warnings

import keras
import tensorflow as tf

from keras_hf.batching import GrowingBatch
from keras_hf.checks import count, finite, integer, part
from keras_hf.convergence import Convergence
from keras_hf.curvature import Curvature, GaussNewton
from keras_hf.kronecker import KroneckerFactored
from keras_hf.objective import num_weights, vector_dtype
from keras_hf.preconditioners import Preconditioner
from keras_hf.stopping import RelativeProgress, StoppingRule

_PARTS = ("curvature", "preconditioner", "stopping", "growing_batch")
# The default; `None` is a choice of its own here.
_GROWING = GrowingBatch()


@keras.saving.register_keras_serializable("keras_hf")
class HessianFree(keras.optimizers.Optimizer):
    """Hessian-free optimization, for `HFModel.compile`.

    Every update minimises the quadratic model

        q(p) = g'p + p'(G + damping I)p / 2

    by preconditioned conjugate gradients that see the curvature G only through products with vectors, and moves the weights by the iterate that the
    true loss likes best. The optimizer holds settings and state; `HFModel` makes the update, and a damping callback such as `LevenbergMarquardt`
    adapts the damping to how well q predicted the loss. There is no learning rate.

    The defaults are those that reach a given loss soonest on deep networks (docs/faster.md). The recipe of Martens (2010) is

        HessianFree(
            damping=45.0,
            preconditioner=EmpiricalFisherDiagonal(exponent=0.75),
            stopping=RelativeProgress(tolerance=5e-4),
            max_cg_iterations=250,
            warm_start_decay=0.95,
            growing_batch=None,
        )

    with `LevenbergMarquardt(low=0.25, high=0.75, factor=1.5)`.

    A number for `damping` is in the scale of the loss. Keras means losses over the last axis where the literature sums: Martens' 45 on a loss summed
    over 784 pixels is 45/784 on Keras' mean.

    Args:
        damping: Float >= 0, the coefficient of the identity at the start of training, in the scale of the loss. `None` (default): the first update
            finds it, as 0.003 of the curvature along the gradient, `g'Gg / g'g`; the scale of the loss does not matter then. Once built,
            `optimizer.damping` is a scalar variable that any callback may assign; it is NaN until the first update has found it.
        curvature: The matrix G: `GaussNewton()` (default), `Hessian()`, `EmpiricalFisher()` or `FiniteDifferenceHessian()`.
        preconditioner: `KroneckerFactored(interval=5)` (default), `EmpiricalFisherDiagonal()`, `Nystrom()` or `Identity()`.
        stopping: When CG may stop: `RelativeProgress(tolerance=1e-2)` (default) or `ResidualTolerance()`.
        max_cg_iterations: Integer >= 1, the limit of CG. It bounds the cost of an update, and how far CG may fit the curvature of a chunk.
        warm_start_decay: Float in [0, 1]. CG starts at this share of its last iterate of the previous update; 0 = from zero. The longer CG runs, the
            more of it is worth keeping: 0.95 for hundreds of iterations; after 25, the same share overshoots.
        growing_batch: `GrowingBatch` (default), updates on a part of the batch that grows, or `None`, updates on all of it.
        curvature_batch_size: Integer >= 1, the cases of the batch that products are formed on, one chunk of the batch after the other; `None` = all.
            Thousands, as a rule: curvature of too few cases is fitted by CG and not by the loss. Split among replicas.
        micro_batch_size: Integer >= 1, the cases that are worked on at a time on each replica. Memory, not results, depends on it (unless layers look
            across cases, as BatchNormalization does). Products are fastest where the chunk is one such piece, whose linearization is then kept;
            further pieces are linearized anew in every product. `None` = the chunk's size, or as many as keep that piece within about 2 GiB.
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
        curvature=None,
        preconditioner=None,
        stopping=None,
        max_cg_iterations=25,
        warm_start_decay=0.7,
        growing_batch=_GROWING,
        curvature_batch_size=None,
        micro_batch_size=None,
        seed=None,
        name="hessian_free",
        **kwargs,
    ):
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
        preconditioner = KroneckerFactored(interval=5) if preconditioner is None else preconditioner
        self.preconditioner = part("preconditioner", preconditioner, Preconditioner, "KroneckerFactored()")
        stopping = RelativeProgress(tolerance=1e-2) if stopping is None else stopping
        self.stopping = part("stopping", stopping, StoppingRule, "RelativeProgress()")
        if growing_batch is not None:
            part("growing_batch", growing_batch, GrowingBatch, "GrowingBatch()")
        self.growing_batch = growing_batch
        self.max_cg_iterations = count("max_cg_iterations", max_cg_iterations)
        self.warm_start_decay = finite("warm_start_decay", warm_start_decay, 0, 1)
        self.curvature_batch_size = count("curvature_batch_size", curvature_batch_size, optional=True)
        self.micro_batch_size = count("micro_batch_size", micro_batch_size, optional=True)
        # Drawn as Keras draws default seeds, so that keras.utils.set_random_seed fixes it.
        self._initial_seed = random.randint(0, 2**31 - 1) if seed is None else integer("seed", seed, 0, 2**31 - 1)
        # All layers of the network, which `HFModel` tells: Keras builds optimizers, some before there are layers, from variables alone.
        self.find_layers = list
        self._damping = None
        # The scale of the curvature, which the first update finds; 0 before.
        self.curvature_scale = None
        # What is remembered of updates at rounding: see `convergence.Convergence`.
        self.convergence = None
        self._seed = None
        self.warm_start = None
        self._part_states = {}

    @property
    def damping(self):
        """The damping: a scalar `keras.Variable` once built, the initial value before.

        NaN, or `None` before, where the first update is to find it.
        """
        return self._initial_damping if self._damping is None else self._damping

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
        """Makes the state: the damping, the seed, the warm start `(n,)` and what parts remember.

        Args:
            variables: List of `keras.Variable`, the trainable weights.
        """
        if self.built:
            return
        super().build(variables)
        values = [variable.value for variable in variables]
        dtype = vector_dtype(values)
        damping = math.nan if self._initial_damping is None else self._initial_damping
        self._damping = self.add_variable(
            (),
            # Not keras.initializers.Constant, which takes the number through float32.
            initializer=lambda shape, dtype: tf.constant(damping, dtype, shape),
            dtype=dtype.name,
            aggregation="only_first_replica",
            name="damping",
        )
        self.curvature_scale, self.convergence = (
            self.add_variable(shape, initializer="zeros", dtype=dtype.name, aggregation="only_first_replica", name=name)
            for name, shape in (("curvature_scale", ()), ("convergence", (len(Convergence._fields),)))
        )
        self._seed = self.add_variable(
            (),
            initializer=lambda shape, dtype: tf.constant(self._initial_seed, dtype, shape),
            dtype="int32",
            aggregation="only_first_replica",
            name="seed",
        )
        self.warm_start = self.add_variable(
            (num_weights(values),), dtype=dtype.name, aggregation="only_first_replica", name="warm_start"
        )
        for part_name in _PARTS:
            owner = getattr(self, part_name)
            initial = owner.initial_state(values, self.find_layers()) if owner is not None else {}
            self._part_states[part_name] = {
                name: self.add_variable(
                    value.shape,
                    initializer=lambda shape, dtype, value=value: tf.identity(value),
                    dtype=value.dtype.name,
                    aggregation="only_first_replica",
                    name=f"{part_name}_{name}",
                )
                for name, value in initial.items()
            }

    def part_state(self, name):
        """Returns what the part that is the argument `name` remembers: a dict of tensors."""
        return {key: tf.convert_to_tensor(variable.value) for key, variable in self._part_states[name].items()}

    def assign_part_state(self, name, state):
        """Sets what the part that is the argument `name` remembers: a dict of tensors."""
        for key, variable in self._part_states[name].items():
            variable.value.assign(state[key])

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
            "max_cg_iterations": self.max_cg_iterations,
            "warm_start_decay": self.warm_start_decay,
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
