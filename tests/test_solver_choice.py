"""Which solver `HessianFree(solver=None)` takes: the exact one for small regressions in float64, conjugate gradients elsewhere."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    EmpiricalFisher,
    GrowingBatch,
    HessianFree,
    HFModel,
    LevenbergMarquardt,
    compiled_model,
)
from keras_hf.problem.fixed_network import Data

X = np.linspace(-1, 1, 600)[:, None]
Y = np.sin(3 * X)


def compiled(loss="mse", optimizer=None, layers=()):
    output = keras.layers.Dense(1, "sigmoid" if loss == "binary_crossentropy" else None)
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(4, "tanh"), *layers, output])
    model = HFModel(network)
    model.compile(optimizer=HessianFree(seed=0) if optimizer is None else optimizer, loss=loss)
    return model


def train(model, x=X, y=Y, **kwargs):
    return model.fit(x, y, callbacks=[LevenbergMarquardt()], verbose=0, **kwargs).history


@pytest.mark.slow
def test_a_small_regression_in_float64_is_solved_exactly_and_goes_on_so(float64, tmp_path):
    model = compiled()
    first = train(model, epochs=2)
    assert isinstance(model.solver, DirectSolver)
    assert "arc_step" in first and first["num_cases"] == [600, 600]
    function = model.train_function
    again = train(model)
    assert model.train_function is function  # nothing is traced anew
    assert again["loss"][0] < first["loss"][1]
    model.save(tmp_path / "run.keras")
    restored = keras.models.load_model(tmp_path / "run.keras")
    assert restored.optimizer.get_config()["solver"] is None
    assert train(restored)["loss"] == train(model)["loss"]


@pytest.mark.slow
def test_a_fit_on_several_batches_takes_conjugate_gradients_and_the_next_on_one_the_exact_solver(float64):
    model = compiled()
    assert "cg_iterations" in train(model, batch_size=300)
    assert "arc_step" in train(model)
    dataset = tf.data.Dataset.from_tensors((X, Y))
    assert "cg_iterations" in model.fit(dataset, callbacks=[LevenbergMarquardt()], verbose=0).history


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": "binary_crossentropy"},
        {"layers": [keras.layers.Dropout(0.5)]},
        {"optimizer": lambda: HessianFree(growing_batch=GrowingBatch(initial_size=10))},
        {"optimizer": lambda: HessianFree(curvature=EmpiricalFisher())},
        {"optimizer": lambda: HessianFree(curvature_batch_size=10)},
        {"optimizer": lambda: HessianFree(solver=ConjugateGradient())},
    ],
    ids=["classifier", "dropout", "growing batch", "curvature", "chunk", "solver"],
)
def test_elsewhere_conjugate_gradients_are_taken(float64, arguments):
    made = {name: value() if callable(value) else value for name, value in arguments.items()}
    model = compiled(**made)
    model._choose_solver((X[:1], (Y[:1] > 0).astype("float64"), None), 600)
    assert isinstance(model.solver, ConjugateGradient)


def test_in_float32_conjugate_gradients_are_taken():
    model = compiled()
    model._choose_solver((X[:1].astype("float32"), Y[:1].astype("float32"), None), 600)
    assert isinstance(model.solver, ConjugateGradient)


def test_the_system_must_be_small(float64):
    model, data = compiled(), Data(tf.constant(X[:1]), tf.constant(Y[:1]), None)
    assert compiled_model.exact_solver_pays(model, data, 10**6)  # 13 weights
    assert not compiled_model.exact_solver_pays(model, data, 10**8)


def test_a_small_optimizer_state_is_that_of_conjugate_gradients(float64):
    """So that the choice may change from one `fit` to the next."""
    model = compiled()
    train(model)
    assert set(model.optimizer.state().solver) == {"warm_start", "preconditioner", "stopping"}
