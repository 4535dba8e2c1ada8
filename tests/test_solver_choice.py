"""Which solver `HessianFree()` takes: the exact one for small regressions in float64, momentum for classifiers, else conjugate gradients."""

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
    PreconditionedMomentum,
    compiled_model,
)
from keras_hf.pinn import PINN
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


def test_the_system_of_equations_may_be_larger(float64):
    hidden = [keras.layers.Dense(units, "tanh") for units in (30, 30, 30)]
    network = keras.Sequential([keras.Input((3,)), *hidden, keras.layers.Dense(1)])  # 2,011 weights
    pinn = PINN(network, {"data": lambda u, points: u(points)})
    x, y, weights = pinn.cases({"data": np.zeros((1, 3))})
    for trained, data, pays in ((pinn, Data(x, y, weights), True), (network, Data(x["points"], y, weights), False)):
        model = HFModel(trained)
        model.compile(HessianFree(seed=0), "mse")
        assert compiled_model.exact_solver_pays(model, data, 3000) is pays
        assert not compiled_model.exact_solver_pays(model, data, 30_000)


def test_a_small_optimizer_state_is_that_of_conjugate_gradients(float64):
    """So that the choice may change from one `fit` to the next."""
    model = compiled()
    train(model)
    assert set(model.optimizer.state().solver) == {"warm_start", "preconditioner", "stopping"}


# For a network of 5,560 weights.
IMAGES, DIGITS = np.random.default_rng(0).random((600, 1, 100)).astype("float32"), np.arange(600) % 10


def classifier(loss="sparse_categorical_crossentropy", optimizer=None, layers=(), units=50):
    widths = [keras.layers.Dense(units, "tanh"), *layers, keras.layers.Dense(10, "softmax")]
    model = HFModel(keras.Sequential([keras.Input((1, 100)), keras.layers.Flatten(), *widths]))
    model.compile(optimizer=HessianFree(seed=0) if optimizer is None else optimizer, loss=loss)
    return model


def test_a_classifier_takes_momentum_and_its_growing_batch():
    optimizer = classifier().optimizer
    assert isinstance(optimizer.solver, PreconditionedMomentum)
    assert optimizer.growing_batch.get_config() == PreconditionedMomentum().growing_batch().get_config()
    assert set(optimizer.state().solver) == {"previous", "preconditioner"}


def test_losses_are_known_as_strings_and_as_objects():
    for loss in ("categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy(from_logits=True)):
        assert isinstance(classifier(loss).optimizer.solver, PreconditionedMomentum)


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": "mse"},
        {"units": 40},
        {"layers": [keras.layers.Reshape((50, 1)), keras.layers.SimpleRNN(50)]},
        {
            "layers": [
                keras.layers.Reshape((1, 50)),
                keras.layers.EinsumDense("btd,de->bte", (1, 50)),
                keras.layers.Flatten(),
            ]
        },
        {"optimizer": lambda: HessianFree(growing_batch=GrowingBatch(initial_size=10))},
        {"optimizer": lambda: HessianFree(curvature=EmpiricalFisher())},
        {"optimizer": lambda: HessianFree(solver=ConjugateGradient())},
    ],
    ids=["loss", "few weights", "recurrent", "einsum", "growing batch", "curvature", "solver"],
)
def test_other_networks_and_settings_take_conjugate_gradients(arguments):
    made = {name: value() if callable(value) else value for name, value in arguments.items()}
    assert isinstance(classifier(**made).optimizer.solver, ConjugateGradient)


def test_no_growing_batch_stays_none():
    assert classifier(optimizer=HessianFree(growing_batch=None)).optimizer.growing_batch is None


def test_a_network_that_is_built_by_its_first_batch_takes_momentum_then():
    network = keras.Sequential(
        [keras.layers.Flatten(), keras.layers.Dense(50, "tanh"), keras.layers.Dense(10, "softmax")]
    )
    model = HFModel(network)
    model.compile(optimizer=HessianFree(seed=0), loss="sparse_categorical_crossentropy")
    assert isinstance(model.optimizer.solver, ConjugateGradient)
    history = train(model, IMAGES, DIGITS)
    assert isinstance(model.solver, PreconditionedMomentum)
    assert "alpha" in history


@pytest.mark.slow
def test_a_saved_classifier_goes_on_with_momentum(tmp_path):
    model = classifier()
    train(model, IMAGES, DIGITS, epochs=3)
    model.save(tmp_path / "run.keras")
    restored = keras.models.load_model(tmp_path / "run.keras")
    assert restored.optimizer.get_config()["solver"] is None
    assert isinstance(restored.optimizer.solver, PreconditionedMomentum)
    assert train(restored, IMAGES, DIGITS, epochs=2)["loss"] == train(model, IMAGES, DIGITS, epochs=2)["loss"]
