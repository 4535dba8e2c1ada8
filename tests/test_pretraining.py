"""What pretraining promises: contrastive divergence as enumeration gives it, and a network that is the machines, unrolled."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import assert_equal

from examples import pretraining
from examples.autoencoder import build_autoencoder
from examples.baselines import reconstruction_error
from examples.datasets import synthetic_curves
from examples.pretraining import BoltzmannMachine


def states(num_units):
    """All states of binary units, `(2^n, n)`."""
    return np.array(list(itertools.product((0.0, 1.0), repeat=num_units)), "float32")


def random_machine(num_visible=4, num_hidden=3, **kinds):
    machine = BoltzmannMachine(num_visible, num_hidden, **kinds)
    rng = np.random.default_rng(1)
    for parameter in (machine.weights, machine.visible_bias, machine.hidden_bias):
        parameter.assign(rng.normal(size=parameter.shape))
    return machine


def probabilities(machine):
    """Of all pairs of states, `(2^visible, 2^hidden)`, by the energy."""
    weights, b, c = (part.numpy() for part in (machine.weights, machine.visible_bias, machine.hidden_bias))
    v, h = states(len(b)), states(len(c))
    weight = np.exp(v @ weights @ h.T + (v @ b)[:, None] + h @ c)
    return weight / weight.sum()


def test_means_are_those_of_the_boltzmann_distribution():
    machine = random_machine()
    joint, v, h = probabilities(machine), states(4), states(3)
    of_hidden = joint @ h / joint.sum(1, keepdims=True)
    of_visible = joint.T @ v / joint.sum(0)[:, None]
    np.testing.assert_allclose(machine.hidden_means(v), of_hidden, rtol=1e-5)
    np.testing.assert_allclose(machine.visible_means(h), of_visible, rtol=1e-5)


def test_contrastive_divergence_is_on_average_what_enumeration_gives():
    machine = random_machine()
    case, h = states(4)[5], states(3)
    joint = probabilities(machine)
    of_states = joint[5] / joint[5].sum()
    reconstructions = joint.T @ states(4) / joint.sum(0)[:, None]
    again = machine.hidden_means(reconstructions.astype("float32")).numpy()
    hidden = of_states @ h
    expected = (
        np.outer(case, hidden) - np.einsum("s,sv,sh->vh", of_states, reconstructions, again),
        case - of_states @ reconstructions,
        hidden - of_states @ again,
    )
    num_draws = 100_000
    found = machine.contrastive_divergence(tf.tile(case[None], [num_draws, 1]), tf.constant([0, 1]))
    for one, other in zip(found, expected, strict=True):
        # Terms are at most 1: five standard deviations of their mean.
        np.testing.assert_allclose(one, other, atol=5 / num_draws**0.5)


def test_of_cases_that_the_machine_makes_itself_the_visible_biases_have_no_gradient_on_average():
    machine = random_machine()
    own = probabilities(machine).sum(1, dtype="float64")
    cases = states(4)[np.random.default_rng(2).choice(16, size=100_000, p=own / own.sum())]
    _, of_visible, _ = machine.contrastive_divergence(tf.constant(cases), tf.constant([0, 1]))
    np.testing.assert_allclose(of_visible, 0, atol=5 / 100_000**0.5)


def test_linear_hidden_units_are_normal_around_what_comes_in():
    machine = random_machine(num_visible=3, num_hidden=2, linear_hidden=True)
    weights, c = machine.weights.numpy(), machine.hidden_bias.numpy()
    v = states(3)
    np.testing.assert_allclose(machine.hidden_means(v), v @ weights + c, rtol=1e-5)
    # The distribution of the states shows in the reconstructions: their mean by quadrature.
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(40)
    noise = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    share = np.outer(node_weights, node_weights).ravel() / (2 * np.pi)
    mean = v[5] @ weights + c
    expected = v[5] - share @ machine.visible_means((mean + noise).astype("float32")).numpy()
    num_draws = 100_000
    _, found, _ = machine.contrastive_divergence(tf.tile(v[5][None], [num_draws, 1]), tf.constant([0, 1]))
    np.testing.assert_allclose(found, expected, atol=5 / num_draws**0.5)


def test_linear_visible_units_are_reconstructed_by_what_comes_in():
    machine = random_machine(linear_visible=True)
    h = states(3)
    expected = h @ machine.weights.numpy().T + machine.visible_bias.numpy()
    np.testing.assert_allclose(machine.visible_means(h), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kinds", "rate"), [({}, 0.1), ({"linear_hidden": True}, 0.001), ({"linear_visible": True}, 0.001)]
)
def test_updates_have_momentum_and_decay_weights_alone(kinds, rate, monkeypatch):
    machine = random_machine(**kinds)
    start = [machine.weights.numpy(), machine.visible_bias.numpy(), machine.hidden_bias.numpy()]
    gradients = [np.full(part.shape, 0.5, "float32") for part in start]
    monkeypatch.setattr(machine, "contrastive_divergence", lambda visible, seed: gradients)
    machine.fit(states(4), epochs=7, batch_size=8)
    expected = []
    for part, gradient, decay in zip(start, gradients, (2e-4, 0, 0), strict=True):
        velocity = 0.0
        for epoch in range(7):
            for _ in range(2):
                velocity = (0.5 if epoch < 5 else 0.9) * velocity + rate * (gradient - decay * part)
                part = part + velocity
        expected.append(part)
    for one, other in zip((machine.weights, machine.visible_bias, machine.hidden_bias), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.slow
def test_the_network_is_the_machines_unrolled():
    x = synthetic_curves(100, 0)
    network = build_autoencoder((20, 4), l2=0.0, seed=0)
    assert pretraining.pretrained(network, x, epochs=2, seed=3) is network
    kernels, biases = zip(*(layer.get_weights() for layer in network.layers), strict=True)
    first = BoltzmannMachine(784, 20, seed=[3, 0])
    first.fit(x, epochs=2)
    # The code's units are linear, those before and after it are not.
    code = BoltzmannMachine(20, 4, linear_hidden=True, seed=[3, 1])
    code.fit(first.hidden_means(x), epochs=2)
    assert_equal(kernels, [first.weights, code.weights, tf.transpose(code.weights), tf.transpose(first.weights)])
    assert_equal(biases, [first.hidden_bias, code.hidden_bias, code.visible_bias, first.visible_bias])


def test_pretrained_layers_reconstruct_better_than_the_mean_image():
    x = synthetic_curves(500, 0)
    network = build_autoencoder((50, 6), l2=0.0, seed=0)
    outermost = keras.Sequential([network.layers[0], network.layers[-1]])
    errors = {model: reconstruction_error(model, x) for model in (outermost, network)}
    pretraining.pretrained(network, x, epochs=100, seed=0)
    mean_image = x.var(0).sum()
    for model, share in ((outermost, 0.5), (network, 0.9)):
        assert reconstruction_error(model, x) < share * mean_image < errors[model]
