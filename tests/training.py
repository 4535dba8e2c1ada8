"""Small models that tests train, how they train them, and what they compare afterwards."""

import keras
import numpy as np
from keras import layers
from problems import hessian_free

from keras_hf import HFModel, LevenbergMarquardt
from keras_hf.training.advice import Advice


@keras.saving.register_keras_serializable("tests")
class CountingModel(HFModel):
    """Counts how often its training step is traced."""

    num_traces = 0

    def train_step(self, data):
        self.num_traces += 1
        return super().train_step(data)


def normal(*shape, seed=0, dtype="float64"):
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def small_network(num_outputs=1, *first, num_inputs=2, units=4):
    """A network 2-4-1, say, after other layers."""
    rest = layers.Dense(units, "tanh"), layers.Dense(num_outputs)
    return keras.Sequential([keras.Input((num_inputs,)), *first, *rest])


def trainable(network=None, loss="mse", optimizer=None, compile_arguments=None, **arguments):
    """A `CountingModel`, compiled with a `hessian_free(**arguments)` that is the same in every run."""
    model = CountingModel(small_network() if network is None else network)
    optimizer = optimizer or hessian_free(**{"damping": 0.1, "seed": 0, **arguments})
    model.compile(optimizer, loss, **(compile_arguments or {}))
    return model


def fit(model, *data, **arguments):
    """Trains on the data in their order, silently and by `LevenbergMarquardt`, unless the arguments of `fit` say otherwise; returns the history."""
    return model.fit(
        *data, **{"shuffle": False, "verbose": 0, "callbacks": [LevenbergMarquardt()], **arguments}
    ).history


def all_values(model):
    """Arrays of all that training changes: weights, states, and what the optimizer remembers."""
    return [np.asarray(variable) for variable in [*model.variables, *model.optimizer.variables]]


def set_weights(model, seed=5, scale=0.5):
    """Gives a model weights that depend on their place alone."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(scale=scale, size=weight.shape) for weight in model.weights])


def assert_same(one, other, rtol=1e-7, atol=1e-9, keys=None):
    """That two lists of arrays, or the values of two dicts at the same keys, agree; with tolerances of 0 bit by bit."""
    if isinstance(one, dict):
        keys = one.keys() if keys is None else keys
        assert keys == other.keys() or set(keys) <= one.keys() & other.keys()
        pairs = {key: (one[key], other[key]) for key in keys}
    else:
        pairs = dict(enumerate(zip(one, other, strict=True)))
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=str(name))


def assert_equal(one, other):
    """That two lists of arrays are the same bit by bit."""
    assert_same(one, other, rtol=0, atol=0)


class Clock:
    """Stands for the module `time` in another module: seconds pass where a test adds to `now`, and `step` of them at every reading."""

    def __init__(self, step=0.0):
        self.now, self.step = 0.0, step

    def perf_counter(self):
        self.now += self.step
        return self.now

    time = perf_counter


_MADE = {}


def renewed(make, *arguments):
    """The model that `make(*arguments)` gives, as it was before training: tests that differ in data or weights alone trace it once.

    Args:
        make: Function of a module, which makes a compiled model that is built.
        *arguments: Of it, hashable.
    """
    key = make, arguments, keras.config.floatx()
    if key not in _MADE:
        model = make(*arguments)
        model._build_optimizer()
        _MADE[key] = model, all_values(model)
    model, values = _MADE[key]
    for variable, value in zip([*model.variables, *model.optimizer.variables], values, strict=True):
        variable.assign(value)
    if model.train_function is not None:
        model.train_function.is_first_update = True
    # What it has said once it says again, and Keras' `BackupAndRestore` would have every later `fit` begin at the epoch that it has brought back.
    model._advice, model._initial_epoch = Advice(), None
    return model
