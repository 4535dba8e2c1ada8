"""What the trainable first hidden state promises: it is where every sequence begins, it is trained, and it is saved."""

import keras
import numpy as np
import pytest
from keras import layers
from problems import hessian_free
from training import fit, trainable

from keras_hf import Identity, InitialState, StructuralDamping
from keras_hf.network.hidden_states import recorded_hidden_states


def network(make, num_states=1, mask=False, units=3):
    x = sequences = keras.Input((4, 2))
    masks = {}
    if mask:
        masking = layers.Masking()
        sequences = masking(x)
        masks["mask"] = masking.compute_mask(x)
    states = [InitialState(units, initializer="ones")(sequences) for _ in range(num_states)]
    return keras.Model(x, layers.Dense(1)(make(units, unroll=True)(sequences, initial_state=states, **masks)))


def the_layer(net, kind):
    (layer,) = (layer for layer in net.layers if isinstance(layer, kind))
    return layer


def inputs():
    return np.random.default_rng(0).normal(size=(5, 4, 2)).astype("float32")


@pytest.mark.parametrize("make, num_states", [(layers.SimpleRNN, 1), (layers.GRU, 1), (layers.LSTM, 2)])
def test_every_sequence_begins_with_it(make, num_states):
    net = network(make, num_states)
    layer = the_layer(net, make)
    with recorded_hidden_states([layer]) as calls:
        net(inputs())
    (found,) = calls[layer].states
    first, _ = layer.cell(inputs()[:, 0], [np.ones((5, 3), "float32")] * num_states)
    np.testing.assert_allclose(found.values[:, 0], first, rtol=1e-5)


def test_steps_under_a_mask_leave_it():
    x = inputs()
    x[0, :3] = 0
    net = network(layers.SimpleRNN, mask=True)
    last, _ = the_layer(net, layers.SimpleRNN).cell(x[:1, 3], [np.ones((1, 3), "float32")])
    np.testing.assert_allclose(net(x)[:1], net.layers[-1](last), rtol=1e-5)


@pytest.mark.slow
def test_it_is_trained_to_a_small_loss_under_structural_damping_and_saved(tmp_path):
    optimizer = hessian_free(
        preconditioner=Identity(), growing_batch=None, seed=0, structural_damping=StructuralDamping(0.1)
    )
    model = trainable(network(layers.SimpleRNN, units=6), optimizer=optimizer)
    losses = fit(model, inputs(), inputs()[:, 0, :1], epochs=10)["loss"]
    assert losses[-1] < 0.01 * losses[0]
    assert np.abs(the_layer(model.network, InitialState).state.numpy() - 1).min() > 0
    model.save(tmp_path / "run.keras")
    loaded = keras.models.load_model(tmp_path / "run.keras")
    np.testing.assert_array_equal(loaded.predict(inputs(), verbose=0), model.predict(inputs(), verbose=0))
    assert loaded.optimizer.structural_damping.weight == 0.1


def test_units_that_are_no_count_are_refused():
    with pytest.raises(ValueError, match="`units` must be an integer >= 1. Received: units=0"):
        InitialState(0)
