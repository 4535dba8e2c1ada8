"""What structural damping promises: the damped product is that of a dense matrix, and nothing else of an update changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import compiled, dense_matrix, hessian_free, model_data, with_objective
from test_hidden_states import LENGTH, MASK, NUM_CASES, network, steps

from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    DoubleBackward,
    EmpiricalFisher,
    ForwardAccumulation,
    GaussNewton,
    Hessian,
    HessianFree,
    HFModel,
    Identity,
    LevenbergMarquardt,
    Nystrom,
    PreconditionedMomentum,
    StructuralDamping,
)
from keras_hf.solvers.solver import LocalModel

WEIGHT, DAMPING = 0.7, 0.3


def problem(*made, weight=WEIGHT, masked=False, curvature=None, **arguments):
    """A compiled network with these layers and a Dense one, and its data."""
    net = network(*([layers.Masking()] if masked else []), *made, layers.Dense(2))
    rng = np.random.default_rng(3)
    for variable in net.trainable_weights:
        variable.assign(rng.normal(scale=0.7, size=variable.shape))
    damping = None if weight is None else StructuralDamping(weight)
    optimizer = hessian_free(
        preconditioner=Identity(),
        growing_batch=None,
        seed=0,
        structural_damping=damping,
        curvature=curvature,
        **arguments,
    )
    model = compiled(net, optimizer=optimizer)
    x = rng.normal(size=(NUM_CASES, LENGTH, 2))
    if masked:
        x[~MASK] = 0
    y = rng.normal(size=net(x).shape)
    return model, model_data(model, x, y)


def local_model(objective, curvature=None):
    return LocalModel(
        objective,
        lambda: objective.product((curvature or GaussNewton()).fitted_to(objective._structure)),
        objective.loss_and_gradient().gradient,
    )


def matrices(model, data, curvature=None, damping=DAMPING, **pieces):
    """The damped matrix, and that of the undamped product."""

    def compute(objective):
        local = local_model(objective, curvature)
        damped = local.damped(tf.constant(damping, tf.float64))
        return [dense_matrix(product, objective.num_weights) for product in (damped, local.linearize())]

    return [matrix.numpy() for matrix in with_objective(model, data, compute, **pieces)]


def hidden_matrix(model, data, mask=None):
    """G_S of a network with one recurrent layer, from a loop over its steps in Python."""
    (layer,) = (layer for layer in model.network.layers if isinstance(layer, layers.RNN))
    variables = [variable.value for variable in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        states = steps(layer.cell, data.x, mask, backwards=layer.go_backwards)
        counted = [
            tf.reshape(
                tf.boolean_mask(
                    state,
                    np.ones(state.shape[:2], bool) if mask is None else mask[:, :: -1 if layer.go_backwards else 1],
                ),
                [-1],
            )
            for state in states
        ]
        flat = tf.concat(counted, 0)
    parts = tape.jacobian(flat, variables, experimental_use_pfor=False, unconnected_gradients="zero")
    j = np.concatenate([part.numpy().reshape(len(flat), -1) for part in parts], 1)
    return j.T @ j / NUM_CASES


def assert_right(model, data, mask=None, curvature=None):
    damped, undamped = matrices(model, data, curvature)
    identity = np.eye(len(damped))
    expected = undamped + DAMPING * (identity + WEIGHT * hidden_matrix(model, data, mask))
    np.testing.assert_allclose(damped, expected, atol=1e-12)


LAYERS = {
    "SimpleRNN": lambda: layers.SimpleRNN(3),
    "unrolled sequences": lambda: layers.SimpleRNN(3, unroll=True, return_sequences=True),
    "GRU backwards": lambda: layers.GRU(2, go_backwards=True, unroll=True),
    "stacked cells": lambda: layers.RNN([layers.SimpleRNNCell(2), layers.LSTMCell(2)], unroll=True),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "stacked cells" else []) for name in LAYERS]
)
def test_the_damped_product_equals_a_dense_matrix(name):
    model, data = problem(LAYERS[name]())
    assert_right(model, data)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("backwards", [False, True])
def test_steps_under_a_mask_do_not_count(backwards):
    model, data = problem(layers.SimpleRNN(3, go_backwards=backwards), masked=True)
    assert_right(model, data, MASK)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "linearization",
    [
        pytest.param(DoubleBackward(jit_compile=True), id="double, XLA"),
        pytest.param(ForwardAccumulation(), id="forward"),
        pytest.param(ForwardAccumulation(jit_compile=True), id="forward, XLA", marks=pytest.mark.slow),
    ],
)
def test_other_linearizations_give_it(linearization):
    model, data = problem(layers.SimpleRNN(3, unroll=True))
    assert_right(model, data, curvature=GaussNewton(linearization))


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_loops_under_xla_give_it():
    model, data = problem(layers.SimpleRNN(3))
    assert_right(model, data, curvature=GaussNewton(DoubleBackward(jit_compile=True)))


@pytest.mark.usefixtures("float64")
def test_the_empirical_fisher_matrix_takes_it():
    model, data = problem(layers.SimpleRNN(3), curvature=EmpiricalFisher())
    assert_right(model, data, curvature=EmpiricalFisher())


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_it_is_that_of_any_pieces():
    model, data = problem(layers.SimpleRNN(3, unroll=True))
    whole, _ = matrices(model, data)
    np.testing.assert_allclose(matrices(model, data, micro_batch_size=2)[0], whole, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_on_a_chunk_it_is_the_mean_over_the_chunk():
    model, data = problem(layers.SimpleRNN(3, unroll=True))
    damped, undamped = matrices(model, data, curvature_batch_size=2)
    found = ((damped - undamped) / DAMPING - np.eye(len(damped))) / WEIGHT
    by_case = [hidden_matrix(model, data._replace(x=data.x[i : i + 1])) * NUM_CASES for i in range(NUM_CASES)]
    # Which two cases, the seed says.
    pairs = [(by_case[i] + by_case[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(np.abs(found - pair).max() for pair in pairs) < 1e-12


@pytest.mark.usefixtures("float64")
def test_without_damping_or_part_there_are_no_hidden_states_in_the_product():
    model, data = problem(layers.SimpleRNN(3))
    plain, _ = problem(layers.SimpleRNN(3), weight=None)
    plain.network.set_weights(model.network.get_weights())
    damped, undamped = matrices(plain, data)
    np.testing.assert_array_equal(damped, undamped + DAMPING * np.eye(len(damped)))
    for matrix in matrices(model, data, damping=0.0):
        np.testing.assert_array_equal(matrix, undamped)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_preconditioners_are_made_with_it_and_solvers_solve_with_it():
    model, data = problem(layers.SimpleRNN(2, unroll=True))
    damping = tf.constant(DAMPING, tf.float64)
    # As many directions as weights: the preconditioner is the damping times the inverse.
    part = Nystrom(rank=1000, interval=1)
    solver = ConjugateGradient(part, warm_start_decay=0.0)

    def compute(objective):
        local = local_model(objective)
        inverse, _ = part.inverse(objective, lambda: local.linearize_with_hidden_states(damping), damping, {})
        path = solver.solve(local, damping, solver.initial_state(objective.variables, []))
        damped = dense_matrix(local.damped(damping), objective.num_weights)
        return damped, dense_matrix(inverse, objective.num_weights), local.gradient, path.candidates[-1]

    damped, inverse, gradient, step = with_objective(model, data, compute)
    np.testing.assert_allclose(inverse @ damped, DAMPING * np.eye(len(damped)), atol=1e-6)
    np.testing.assert_allclose(step, np.linalg.solve(damped, -gradient), atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_training_lowers_the_loss():
    model, data = problem(layers.SimpleRNN(6, unroll=True))
    history = model.fit(
        data.x, data.y, batch_size=NUM_CASES, epochs=10, callbacks=[LevenbergMarquardt()], verbose=0
    ).history
    assert history["loss"][-1] < 0.01 * history["loss"][0]


@pytest.mark.slow
def test_states_kept_from_batch_to_batch_are_those_of_the_start_in_every_product():
    net = keras.Sequential(
        [keras.Input(batch_shape=(NUM_CASES, LENGTH, 2)), layers.GRU(3, stateful=True), layers.Dense(1)]
    )
    model = HFModel(net)
    model.compile(
        hessian_free(preconditioner=Identity(), growing_batch=None, seed=0, structural_damping=StructuralDamping()),
        "mse",
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(NUM_CASES, LENGTH, 2)), rng.normal(size=(NUM_CASES, 1))
    history = model.fit(x, y, batch_size=NUM_CASES, epochs=6, callbacks=[LevenbergMarquardt()], verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


# Settings.


def test_configuration_survives_saving():
    optimizer = HessianFree(structural_damping=StructuralDamping(weight=0.25))
    restored = HessianFree.from_config(optimizer.get_config())
    assert restored.structural_damping.get_config() == {"weight": 0.25}
    assert HessianFree.from_config(HessianFree().get_config()).structural_damping is None
    # A file from before it was there.
    config = HessianFree().get_config()
    del config["structural_damping"]
    assert HessianFree.from_config(config).structural_damping is None


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), True, "1"])
def test_weights_that_are_none_are_refused(weight):
    with pytest.raises(ValueError, match="`weight` must be a finite number > 0. Received"):
        StructuralDamping(weight)


def test_what_it_cannot_be_combined_with_is_refused():
    part = StructuralDamping()
    with pytest.raises(TypeError, match="`structural_damping` must be a `StructuralDamping` object"):
        HessianFree(structural_damping=0.1)
    for solver in (DirectSolver(), PreconditionedMomentum()):
        with pytest.raises(
            ValueError, match=f"`{type(solver).__name__}` does not damp hidden states.*ConjugateGradient"
        ):
            HessianFree(solver=solver, structural_damping=part)
    with pytest.raises(ValueError, match="hidden states to the outputs that the curvature goes through.*GaussNewton"):
        HessianFree(curvature=Hessian(), structural_damping=part)
    assert not HessianFree(structural_damping=part).chooses_solver


def test_a_network_without_hidden_states_is_refused():
    model, data = problem(layers.Flatten())
    with pytest.raises(ValueError, match="Received: a network without a layer of `keras.layers.RNN`"):
        model.fit(data.x, data.y, callbacks=[LevenbergMarquardt()], verbose=0)
