"""What structural damping promises: the damped product is that of a dense matrix, and nothing else of an update changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import (
    case_gradients,
    compiled,
    dense_matrix,
    flat,
    hessian_free,
    jacobian,
    model_data,
    values_of,
    with_objective,
)
from test_hidden_states import LENGTH, MASK, NUM_CASES, network, steps
from training import fit, normal, trainable

from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    EmpiricalFisher,
    ForwardAccumulation,
    GaussNewton,
    Hessian,
    HessianFree,
    Identity,
    Nystrom,
    PreconditionedMomentum,
    StructuralDamping,
)
from keras_hf.solvers.solver import LocalModel

pytestmark = pytest.mark.usefixtures("float64")

WEIGHT, DAMPING = 0.7, 0.3


def problem(*made, weight=WEIGHT, curvature=None):
    """A compiled network with these layers and a Dense one, and its data."""
    net = network(*made, layers.Dense(2))
    rng = np.random.default_rng(3)
    net.set_weights([rng.normal(scale=0.7, size=value.shape) for value in net.get_weights()])
    model = compiled(net, optimizer=damped_optimizer(weight and StructuralDamping(weight), curvature=curvature))
    x = rng.normal(size=(NUM_CASES, LENGTH, 2))
    if isinstance(made[0], layers.Masking):
        x[~MASK] = 0
    return model, model_data(model, x, rng.normal(size=net(x).shape))


def damped_optimizer(part, **arguments):
    return hessian_free(preconditioner=Identity(), growing_batch=None, seed=0, structural_damping=part, **arguments)


def local_model(objective, curvature=None):
    return LocalModel(
        objective,
        lambda: objective.product((curvature or GaussNewton()).fitted_to(objective._structure)),
        objective.loss_and_gradient().gradient,
    )


def matrices(model, data, *products, curvature=None, **micro_batches):
    """The matrices of products: of the damped one for each damping that is given, of the undamped one for `None`."""

    def compute(objective):
        local = local_model(objective, curvature)
        found = [
            local.linearize() if damping is None else local.damped(tf.constant(damping, tf.float64))
            for damping in products
        ]
        return [dense_matrix(product, objective.num_weights) for product in found]

    return [matrix.numpy() for matrix in with_objective(model, data, compute, **micro_batches)]


def hidden_matrix(model, x, mask=None):
    """G_S of a network with one recurrent layer, from a loop over its steps in Python."""
    (layer,) = (layer for layer in model.network.layers if isinstance(layer, layers.RNN))
    counted = np.ones(x.shape[:2], bool) if mask is None else mask[:, :: -1 if layer.go_backwards else 1]

    def states():
        return flat([tf.boolean_mask(state, counted) for state in steps(layer, x, mask)])

    j = jacobian(states, values_of(layer))
    j = np.pad(j, [(0, 0), (0, model.count_params() - j.shape[1])])
    return j.T @ j / len(x)


def assert_right(model, data, mask=None, curvature=None, **micro_batches):
    """That the damped product is `G + damping (I + weight G_S)`, with G of the mean squared error, or the empirical Fisher matrix."""
    damped = matrices(model, data, DAMPING, curvature=curvature, **micro_batches)[0]
    if isinstance(curvature, EmpiricalFisher):
        gradients = case_gradients(model, data)
        undamped = gradients.T @ gradients / NUM_CASES
    else:
        j = jacobian(lambda: flat([model(data.x)]), values_of(model))
        undamped = 2 / len(j) * j.T @ j
    expected = undamped + DAMPING * (np.eye(len(damped)) + WEIGHT * hidden_matrix(model, data.x, mask))
    np.testing.assert_allclose(damped, expected, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: layers.SimpleRNN(3), id="SimpleRNN"),
        pytest.param(
            lambda: layers.SimpleRNN(3, unroll=True, return_sequences=True, go_backwards=True),
            id="unrolled sequences backwards",
        ),
        pytest.param(
            lambda: layers.RNN([layers.GRUCell(2), layers.LSTMCell(2)], unroll=True),
            id="stacked cells",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_damped_product_equals_a_dense_matrix(make):
    assert_right(*problem(make()))


@pytest.mark.slow
def test_steps_under_a_mask_do_not_count():
    assert_right(*problem(layers.Masking(), layers.SimpleRNN(3, go_backwards=True)), MASK)


def test_forward_accumulation_gives_it():
    model, data = problem(layers.SimpleRNN(3, unroll=True))
    assert_right(model, data, curvature=GaussNewton(ForwardAccumulation()))


def test_the_empirical_fisher_matrix_takes_it():
    model, data = problem(layers.SimpleRNN(3, unroll=True), curvature=EmpiricalFisher())
    assert_right(model, data, curvature=EmpiricalFisher())


@pytest.mark.slow
def test_it_is_that_of_any_micro_batches():
    model, data = problem(layers.SimpleRNN(3, unroll=True))
    assert_right(model, data, micro_batch_size=2)


def test_on_a_chunk_it_is_the_mean_over_the_chunk():
    model, data = problem(layers.SimpleRNN(3, unroll=True))
    damped, undamped = matrices(model, data, DAMPING, None, curvature_batch_size=2)
    found = ((damped - undamped) / DAMPING - np.eye(len(damped))) / WEIGHT
    by_case = [hidden_matrix(model, data.x[i : i + 1]) for i in range(NUM_CASES)]
    # Which two cases, the seed says.
    pairs = [(by_case[i] + by_case[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(np.abs(found - pair).max() for pair in pairs) < 1e-12


def test_without_damping_or_part_there_are_no_hidden_states_in_the_product():
    model, data = problem(layers.SimpleRNN(3, unroll=True))
    plain, _ = problem(layers.SimpleRNN(3, unroll=True), weight=None)
    damped, undamped = matrices(plain, data, DAMPING, None)
    np.testing.assert_array_equal(damped, undamped + DAMPING * np.eye(len(damped)))
    np.testing.assert_array_equal(matrices(model, data, 0.0)[0], undamped)


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
def test_states_kept_from_batch_to_batch_are_those_of_the_start_in_every_product():
    stack = [layers.SimpleRNN(3, stateful=True), layers.Dense(1)]
    network = keras.Sequential([keras.Input(batch_shape=(NUM_CASES, LENGTH, 2)), *stack])
    model = trainable(network, optimizer=damped_optimizer(StructuralDamping()))
    losses = fit(model, normal(NUM_CASES, LENGTH, 2), normal(NUM_CASES, 1), batch_size=NUM_CASES, epochs=6)["loss"]
    assert losses[-1] < losses[0]


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
        message = f"`{type(solver).__name__}` does not damp hidden states.*ConjugateGradient"
        with pytest.raises(ValueError, match=message):
            HessianFree(solver=solver, structural_damping=part)
    with pytest.raises(ValueError, match="hidden states to the outputs that the curvature goes through.*GaussNewton"):
        HessianFree(curvature=Hessian(), structural_damping=part)
    assert not HessianFree(structural_damping=part).chooses_solver


def test_a_network_without_hidden_states_is_refused():
    model, data = problem(layers.Flatten())
    with pytest.raises(ValueError, match="Received: a network without a layer of `keras.layers.RNN`"):
        fit(model, data.x, data.y)
