"""What parts that remember promise: the optimizer keeps their state, saves it, and an update hands it on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_hf import ConjugateGradient, ConstantDamping, GrowingBatch, HessianFree, HFModel, KroneckerFactored
from keras_hf.common.part import Part
from keras_hf.solvers.preconditioners import Preconditioner


@keras.saving.register_keras_serializable("tests")
class Averaging(Preconditioner):
    """The running mean of the gradient's absolute values, to the half."""

    def __init__(self, decay=0.5):
        self.decay = decay

    def initial_state(self, variables, layers):
        size = sum(variable.shape.num_elements() for variable in variables)
        return {
            "mean": tf.ones([size], tf.float64),
            "updates": tf.constant(0),
            "layers": tf.constant(len(layers), tf.int64),
            "started": tf.constant(False),
        }

    def inverse(self, objective, linearize, damping, state):
        gradient = objective.loss_and_gradient().gradient
        mean = self.decay * state["mean"] + (1 - self.decay) * tf.cast(tf.abs(gradient), tf.float64)
        scale = tf.cast(tf.sqrt(mean), gradient.dtype) + damping
        new = {"mean": mean, "updates": state["updates"] + 1, "started": tf.constant(True)}
        return lambda residual: residual / scale, {**state, **new}

    def get_config(self):
        return {"decay": self.decay}


def compiled(preconditioner=None, **arguments):
    model = HFModel(keras.Sequential([keras.Input((2,)), layers.Dense(2, "tanh"), layers.Dense(1)]))
    preconditioner = Averaging() if preconditioner is None else preconditioner
    model.compile(
        HessianFree(
            0.1, solver=ConjugateGradient(preconditioner=preconditioner, max_iterations=5), seed=0, **arguments
        ),
        "mse",
    )
    return model


def cases(num_cases=20):
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_cases, 2)), rng.normal(size=(num_cases, 1))


def fit(model, x, y, **arguments):
    return model.fit(x, y, shuffle=False, verbose=0, callbacks=[ConstantDamping()], **arguments).history


def memory(optimizer):
    """What the preconditioner remembers: a dict of tensors."""
    return optimizer.state().solver["preconditioner"]


def remember(optimizer, **changes):
    """Changes what the preconditioner remembers."""
    state = optimizer.state()
    changed = {**state.solver, "preconditioner": {**state.solver["preconditioner"], **changes}}
    optimizer.assign_state(state._replace(solver=changed))


def state_of(model):
    return {key: value.numpy() for key, value in memory(model.optimizer).items()}


def assert_same(one, other):
    assert set(one) == set(other)
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_a_part_remembers_nothing_unless_it_says_so():
    assert Part().initial_state([], []) == {}


def test_a_built_optimizer_holds_the_initial_state_of_every_part():
    model = compiled(growing_batch=GrowingBatch(7))
    # Two layers and their input, 9 weights.
    state = state_of(model)
    assert_same(
        state,
        {
            "mean": np.ones(9),
            "updates": np.int32(0),
            "layers": np.int64(state["layers"]),
            "started": np.bool_(False),
        },
    )
    assert state["layers"] >= 2
    assert {key: int(value) for key, value in model.optimizer.state().growing_batch.items()} == {
        "size": 7,
        "start": 0,
        "misses": 0,
    }
    assert model.optimizer.state().curvature == model.optimizer.state().solver["stopping"] == {}
    names = [variable.name for variable in model.optimizer.variables]
    assert {"solver_preconditioner_mean", "solver_preconditioner_updates", "growing_batch_size"} <= set(names)


def test_a_state_assigned_is_the_state_read():
    optimizer = compiled().optimizer
    new = {
        "mean": tf.range(9, dtype=tf.float64) / 7,
        "updates": tf.constant(3),
        "layers": tf.constant(2**40, tf.int64),
        "started": tf.constant(True),
    }
    remember(optimizer, **new)
    found = {key: value.numpy() for key, value in memory(optimizer).items()}
    assert_same(found, {key: value.numpy() for key, value in new.items()})


def test_saved_variables_hold_the_states_of_parts():
    saved, again = (compiled(growing_batch=GrowingBatch(7)).optimizer for _ in range(2))
    remember(saved, updates=tf.constant(3))
    state = saved.state()
    saved.assign_state(state._replace(growing_batch={**state.growing_batch, "start": tf.constant(11)}))
    store = {}
    saved.save_own_variables(store)
    again.load_own_variables(store)
    assert int(memory(again)["updates"]) == 3
    assert int(again.state().growing_batch["start"]) == 11


@pytest.mark.slow
def test_every_update_hands_the_state_to_the_next_and_a_saved_model_goes_on(tmp_path):
    x, y = cases()
    model = compiled()
    initial, mean = state_of(model), np.ones(9)
    for number in (1, 2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradient = np.concatenate([np.ravel(g) for g in tape.gradient(loss, model.trainable_weights)])
        fit(model, x, y)
        mean = 0.5 * mean + 0.5 * abs(gradient)
        state = state_of(model)
        np.testing.assert_allclose(state["mean"], mean, rtol=1e-5)
        assert state["updates"] == number and state["started"] and state["layers"] == initial["layers"]
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert_same(state_of(again), state)
    assert fit(again, x, y) == fit(model, x, y)
    assert_same(state_of(again), state_of(model))
    assert state_of(again)["updates"] == 3


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_not_handed_on():
    x, y = cases()
    model = compiled()
    fit(model, x, y)
    before = state_of(model)
    x[3] = np.nan
    with pytest.warns(UserWarning, match="1 of the 20 cases"):
        assert fit(model, x, y)["step_size"] == [0]
    assert_same(state_of(model), before)
    assert fit(model, *cases())["step_size"][0] > 0
    assert state_of(model)["updates"] == before["updates"] + 1


def test_a_rejected_step_hands_its_state_on():
    def only_at_the_start(y, y_pred):
        return tf.where(y_pred == 0, (y - y_pred) ** 2, np.nan)

    model = HFModel(keras.Sequential([keras.Input((2,)), layers.Dense(1, kernel_initializer="zeros")]))
    model.compile(HessianFree(solver=ConjugateGradient(preconditioner=Averaging()), seed=0), only_at_the_start)
    before = state_of(model)
    assert fit(model, *cases())["step_size"] == [0]
    after = state_of(model)
    assert after["updates"] == 1 and (after["mean"] != before["mean"]).all()


@pytest.mark.slow
def test_a_step_that_raises_leaves_the_state():
    class Raising(Averaging):
        def inverse(self, objective, linearize, damping, state):
            precondition, new = super().inverse(objective, linearize, damping, state)

            def fail():
                raise MemoryError("no memory left")

            def raising(residual):
                with tf.control_dependencies([tf.py_function(fail, [], [])]):
                    return precondition(residual)

            return raising, new

    model = compiled(Raising())
    before = state_of(model)
    with pytest.raises(Exception, match="no memory left"):
        fit(model, *cases())
    assert_same(state_of(model), before)


@pytest.mark.slow
def test_kept_factors_outlive_cases_that_are_no_numbers():
    x, y = cases()
    model = compiled(KroneckerFactored(interval=3))
    broken = x.copy()
    broken[3] = np.nan
    # The update that makes the factors, then one that uses those that are kept.
    with pytest.warns(UserWarning, match="1 of the 20 cases"):
        assert fit(model, broken, y)["step_size"] == [0]
    assert all(np.isfinite(value).all() for value in state_of(model).values())
    assert fit(model, x, y)["step_size"][0] > 0
