"""Which solver `HessianFree()` takes: the exact one for small regressions in float64, momentum for classifiers, else conjugate gradients."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import fit

from keras_hf import (
    Cauchy,
    ConjugateGradient,
    DirectSolver,
    EmpiricalFisher,
    GrowingBatch,
    HessianFree,
    HFModel,
    PreconditionedMomentum,
)
from keras_hf.network.fixed_network import Data
from keras_hf.pinn import PINN
from keras_hf.training.solver_choice import exact_solver_pays

X = np.linspace(-1, 1, 600)[:, None]
Y = np.sin(3 * X)


def compiled(loss="mse", layers=(), **settings):
    output = keras.layers.Dense(1, "sigmoid" if loss == "binary_crossentropy" else None)
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(4, "tanh"), *layers, output])
    model = HFModel(network)
    model.compile(optimizer=HessianFree(seed=0, **settings), loss=loss)
    return model


@pytest.mark.slow
def test_a_small_regression_in_float64_on_one_batch_is_solved_exactly_and_goes_on_so(float64, tmp_path):
    model = compiled()
    # Several batches: conjugate gradients.
    assert "cg_iterations" in fit(model, X, Y, batch_size=300)
    first = fit(model, X, Y, epochs=2)
    assert isinstance(model.solver, DirectSolver)
    assert "arc_step" in first and first["num_cases"] == [600, 600]
    function = model.train_function
    again = fit(model, X, Y)
    assert model.train_function is function  # nothing is traced anew
    assert again["loss"][0] < first["loss"][1]
    model.save(tmp_path / "run.keras")
    restored = keras.models.load_model(tmp_path / "run.keras")
    assert restored.optimizer.get_config()["solver"] is None
    assert fit(restored, X, Y)["loss"] == fit(model, X, Y)["loss"]
    # Of a dataset nobody knows how many batches it has.
    assert "cg_iterations" in fit(model, tf.data.Dataset.from_tensors((X, Y)))


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.Huber(0.1), "huber", keras.losses.LogCosh(), "log_cosh", Cauchy(0.1), "msle",
        [keras.losses.MeanSquaredLogarithmicError()],
    ],
    # `str` would name addresses, which differ between pytest's processes.
    ids=["Huber", "huber", "LogCosh", "log_cosh", "Cauchy", "msle", "list"],
)  # fmt: skip
def test_robust_losses_on_one_batch_are_solved_exactly(float64, loss):
    model = compiled(loss)
    model.choose_solver(Data(X[:1], Y[:1], None), 600)
    assert isinstance(model.solver, DirectSolver)


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": "binary_crossentropy"},
        {"layers": [keras.layers.Dropout(0.5)]},
        {"growing_batch": GrowingBatch(initial_size=10)},
        {"curvature": EmpiricalFisher()},
        {"curvature_batch_size": 10},
        {"solver": ConjugateGradient()},
    ],
    ids=" ".join,
)
def test_elsewhere_conjugate_gradients_are_taken(float64, arguments):
    model = compiled(**arguments)
    model.choose_solver(Data(X[:1], (Y[:1] > 0).astype("float64"), None), 600)
    assert isinstance(model.solver, ConjugateGradient)


def test_a_small_regression_takes_the_exact_solver_in_float64_and_a_state_of_conjugate_gradients(float64):
    """So that the choice may change from one `fit` to the next."""
    model = compiled()
    model.choose_solver(Data(X[:1], Y[:1], None), 600)
    assert isinstance(model.solver, DirectSolver)
    assert set(model.optimizer.state().solver) == {"warm_start", "preconditioner", "stopping"}


def test_a_small_system_in_float32_is_solved_exactly_too_without_advice(recwarn):
    model = compiled()
    model.choose_solver(Data(X[:1].astype("float32"), Y[:1].astype("float32"), None), 600)
    assert isinstance(model.solver, DirectSolver) and not recwarn.list


def test_the_system_must_be_small(float64):
    model, data = compiled(), Data(tf.constant(X[:1]), tf.constant(Y[:1]), None)
    assert exact_solver_pays(model, data, 10**6)  # 13 weights
    assert not exact_solver_pays(model, data, 10**8)


def test_the_system_of_equations_may_be_larger(float64):
    hidden = [keras.layers.Dense(units, "tanh") for units in (30, 30, 30)]
    network = keras.Sequential([keras.Input((3,)), *hidden, keras.layers.Dense(1)])  # 2,011 weights
    pinn = PINN(network, {"data": lambda u, points: u(points)})
    x, y, weights = pinn.cases({"data": np.zeros((1, 3))})
    for trained, data, pays in ((pinn, Data(x, y, weights), True), (network, Data(x["points"], y, weights), False)):
        model = HFModel(trained)
        model.compile(HessianFree(seed=0), "mse")
        assert exact_solver_pays(model, data, 3000) is pays
        assert not exact_solver_pays(model, data, 30_000)


# For a network of 5,560 weights.
IMAGES, DIGITS = np.random.default_rng(0).random((600, 1, 100)).astype("float32"), np.arange(600) % 10


def classifier(loss="sparse_categorical_crossentropy", layers=(), units=50, is_built=True, **settings):
    first = [keras.Input((1, 100))] if is_built else []
    widths = [keras.layers.Dense(units, "tanh"), *layers, keras.layers.Dense(10, "softmax")]
    model = HFModel(keras.Sequential([*first, keras.layers.Flatten(), *widths]))
    model.compile(optimizer=HessianFree(seed=0, **settings), loss=loss)
    return model


def test_a_classifier_takes_momentum_and_its_growing_batch():
    optimizer = classifier().optimizer
    assert isinstance(optimizer.solver, PreconditionedMomentum)
    assert optimizer.growing_batch.get_config() == PreconditionedMomentum().growing_batch().get_config()
    assert set(optimizer.state().solver) == {"preconditioner"}


def test_with_positions_momentum_starts_from_few_cases_and_a_smaller_damping():
    for layers, size in (
        ([], 500),
        ([keras.layers.Rescaling(100.0), keras.layers.Embedding(100, 3), keras.layers.Flatten()], 500),
        ([keras.layers.Reshape((50, 1)), keras.layers.Conv1D(3, 3), keras.layers.Flatten()], 64),
    ):
        optimizer = classifier(layers=layers).optimizer
        solver = optimizer.solver
        assert (solver.starts_small, optimizer.growing_batch.initial_size) == (size == 64, size)
        assert solver.first_share_of_part == (0.002 if size == 64 else solver.first_share)


def test_losses_are_known_as_strings_and_as_objects():
    for loss in ("categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy(from_logits=True)):
        assert isinstance(classifier(loss).optimizer.solver, PreconditionedMomentum)


def test_a_binary_cross_entropy_is_that_of_classes_where_a_case_has_one_output():
    for shape, solver in (
        ((1,), PreconditionedMomentum),
        ((), PreconditionedMomentum),
        ((2,), ConjugateGradient),  # An autoencoder, or labels that are not exclusive.
        ((5, 1), ConjugateGradient),  # A mask.
    ):
        outputs = [keras.layers.Dense(math.prod(shape), "sigmoid"), keras.layers.Reshape(shape)]
        model = HFModel(keras.Sequential([keras.Input((100,)), keras.layers.Dense(60, "tanh"), *outputs]))
        model.compile(loss=keras.losses.BinaryCrossentropy())
        assert isinstance(model.solver, solver), shape


@pytest.mark.parametrize(
    "layers",
    [
        [keras.layers.Reshape((50, 1)), keras.layers.SimpleRNN(50)],
        [keras.layers.Reshape((1, 50)), keras.layers.EinsumDense("btd,de->bte", (1, 50)), keras.layers.Flatten()],
    ],
    ids=["recurrent", "einsum"],
)
def test_layers_with_kronecker_factors_take_momentum(layers):
    assert isinstance(classifier(layers=layers).optimizer.solver, PreconditionedMomentum)


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": "mse"},
        {"units": 40},
        {"layers": [keras.layers.Reshape((50, 1)), keras.layers.SimpleRNN(50, unroll=True)]},
        {"growing_batch": GrowingBatch(initial_size=10)},
        {"curvature": EmpiricalFisher()},
        {"solver": ConjugateGradient()},
    ],
    ids=["loss", "few weights", "unrolled", "growing batch", "curvature", "solver"],
)
def test_other_networks_and_settings_take_conjugate_gradients(arguments):
    assert isinstance(classifier(**arguments).optimizer.solver, ConjugateGradient)


def test_a_growing_batch_that_is_asked_for_is_taken_whatever_its_numbers_and_one_in_an_old_file_is_the_default():
    asked_for = classifier(growing_batch=GrowingBatch()).optimizer
    assert isinstance(asked_for.solver, ConjugateGradient) and not asked_for.chooses_solver
    default = classifier().optimizer.get_config()
    assert "growing_batch" not in default
    # As versions up to 0.2 wrote it.
    old = {**default, "growing_batch": keras.saving.serialize_keras_object(GrowingBatch())}
    assert HessianFree.from_config(old).chooses_solver and HessianFree.from_config(default).chooses_solver


def test_no_growing_batch_stays_none():
    assert classifier(growing_batch=None).optimizer.growing_batch is None


@pytest.mark.slow
def test_a_network_that_is_built_by_its_first_batch_takes_momentum_then_and_goes_on_so_when_saved(tmp_path):
    model = classifier(is_built=False)
    assert isinstance(model.optimizer.solver, ConjugateGradient)
    assert "alpha" in fit(model, IMAGES, DIGITS, epochs=2)
    assert isinstance(model.solver, PreconditionedMomentum)
    model.save(tmp_path / "run.keras")
    restored = keras.models.load_model(tmp_path / "run.keras")
    assert restored.optimizer.get_config()["solver"] is None
    assert isinstance(restored.optimizer.solver, PreconditionedMomentum)
    assert fit(restored, IMAGES, DIGITS, epochs=2)["loss"] == fit(model, IMAGES, DIGITS, epochs=2)["loss"]


def test_a_network_that_is_built_by_a_batch_takes_momentum_then():
    model = classifier(is_built=False)
    model._maybe_symbolic_build(data_batch=(IMAGES, DIGITS, None))
    assert isinstance(model.solver, PreconditionedMomentum)
