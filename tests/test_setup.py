"""What is known and chosen of a compiled model before its updates: once for cases of the same kind, and for any number of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import compiled, model_data, set_up
from training import assert_same, fit, normal, renewed, set_weights, small_network, trainable

from keras_hf import DirectSolver, GaussNewton, HessianFree, Identity
from keras_hf.network import structure
from keras_hf.network.fixed_network import Data
from keras_hf.training import setup

X, Y = normal(20, 2, dtype="float32"), normal(20, 1, dtype="float32")


@pytest.fixture
def traces(monkeypatch):
    """The calls of `trace_structure`, in which the network is traced."""
    calls, original = [], setup.trace_structure
    monkeypatch.setattr(setup, "trace_structure", lambda *args: calls.append(1) or original(*args))
    return calls


def test_a_setup_is_made_once_for_cases_of_one_kind_and_anew_for_others_and_other_settings(traces):
    model = compiled(small_network())
    data = model_data(model, X, Y)
    first = model.setup_for(data)
    assert model.setup_for(data.take([3, 4])) is first is model.setup and len(traces) == 1
    with_weights = Data(data.x, data.y, tf.ones([20]))
    assert model.setup_for(with_weights) is not first
    set_up(model, curvature=GaussNewton())
    assert model.setup_for(with_weights).made_for != first.made_for and len(traces) == 3
    model.compile(loss="mse")
    assert model.setup is None


def test_fit_traces_the_structure_once_and_a_second_fit_on_fewer_cases_nothing(traces):
    model = trainable(preconditioner=Identity(), growing_batch=None)
    for x, y in ((X, Y), (X, Y), (X[:15], Y[:15])):
        fit(model, x, y)
    assert len(traces) == 1 and model.setup.most_cases == 20


def test_exact_steps_on_another_number_of_cases_trace_nothing(float64):
    model = trainable(optimizer=HessianFree(solver=DirectSolver()))
    for num_cases in (12, 15, 16, 9, 16):
        fit(model, X[:num_cases], Y[:num_cases])
    assert model.num_traces == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_cases", [12, 20], ids=["fewer cases than weights", "more"])
def test_exact_steps_whose_trace_is_not_told_the_number_of_cases_are_those_of_one_that_is(
    num_cases, float64, monkeypatch
):
    x, y = X[:num_cases].astype("float64"), Y[:num_cases].astype("float64")

    def trained():
        model = trainable(optimizer=HessianFree(solver=DirectSolver()))
        set_weights(model)
        fit(model, x, y, epochs=4)
        return model.get_weights()

    untold = trained()
    monkeypatch.setattr(setup.Setup, "takes_any_number", False)
    assert_same(untold, trained(), rtol=1e-6)


def test_rows_are_made_anew_beyond_a_limit_and_for_far_fewer_cases():
    model = trainable(optimizer=HessianFree(solver=DirectSolver()))  # of 17 weights
    data = model_data(model, X, Y)
    few, many = (setup.prepare(model, data, num_cases) for num_cases in (9, 20))
    assert few.most_supported == 16 and many.most_supported > 1e6
    assert [few.serves(number) for number in (1, 16, 17, None)] == [True, True, False, False]
    assert [many.serves(number) for number in (8, 9, 17, 10**6)] == [False, True, True, True]


def one_micro_batch():
    return trainable(preconditioner=Identity(), growing_batch=None)


@pytest.mark.slow
def test_what_is_traced_for_one_micro_batch_is_traced_anew_where_more_cases_may_come_than_one_micro_batch_takes(
    monkeypatch,
):
    monkeypatch.setattr(structure, "_MICRO_BATCH_MEMORY", 2**11)
    model = renewed(one_micro_batch)
    fit(model, X[:4], Y[:4])
    function, most = model.train_function, model.setup.most_supported
    assert 4 <= most < 20
    fit(model, X[:3], Y[:3])
    assert model.train_function is function
    fit(model, X, Y)
    assert model.train_function is not function


@pytest.mark.parametrize(
    ("stack", "gains"),
    [
        ([keras.layers.Dense(4, "tanh")], False),
        ([keras.layers.Reshape((2, 1)), keras.layers.LSTM(2)], True),
        ([keras.layers.Reshape((2, 1)), keras.layers.Conv1D(2, 2), keras.layers.Flatten()], True),
    ],
    ids=["Dense", "LSTM", "Conv1D"],
)
def test_graphs_are_optimised_where_there_are_loops_or_convolutions(stack, gains):
    model = compiled(small_network(1, *stack))
    assert model.setup_for(model_data(model, X, Y)).gains_by_optimized_graphs == gains


def test_passes_without_metrics_are_those_of_the_same_setup():
    model = compiled(small_network(), metrics=["mae"])
    without = model.setup_for(model_data(model, X, Y)).without_metrics()
    assert without.programs is model.setup.programs
    without.task.update_metrics(Data(X, Y, None), np.zeros_like(Y))
    assert float(model.get_metrics_result()["mae"]) == 0
