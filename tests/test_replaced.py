"""What replacing attributes for a while promises: afterwards everything is as it was."""

import keras
import numpy as np
import pytest
from training import fit, trainable

from keras_hf import Identity
from keras_hf.common.replaced import replaced


class Owner:
    """An attribute of each kind: of the class, of the instance, computed."""

    of_class, _kept = 1, 3

    def __init__(self):
        self.own = 2

    @property
    def computed(self):
        return self._kept

    @computed.setter
    def computed(self, value):
        self._kept = value


def test_everything_is_as_it_was_also_after_an_error():
    owner = Owner()
    with pytest.raises(KeyError):
        with replaced((owner, "of_class", 7), (owner, "own", 8), (owner, "computed", 9)):
            assert (owner.of_class, owner.own, owner.computed) == (7, 8, 9)
            raise KeyError
    assert (owner.of_class, owner.own, owner.computed) == (1, 2, 3)
    assert "of_class" not in vars(owner)


def test_replacing_twice_at_once_puts_the_first_back_last():
    owner = Owner()
    with replaced((owner, "own", 7), (owner, "own", 8)):
        assert owner.own == 8
    assert owner.own == 2


def test_calls_that_the_user_has_set_on_layers_and_losses_outlive_training():
    dense, loss = keras.layers.Dense(3, "tanh"), keras.losses.MeanSquaredError()
    plain, of_loss = dense.call, loss.call
    dense.call = lambda *args, **kwargs: 2.0 * plain(*args, **kwargs)
    loss.call = lambda *args: of_loss(*args)
    own = dense.call, loss.call
    network = keras.Sequential([keras.Input((2,)), dense])
    model = trainable(network, loss, preconditioner=Identity(), max_iterations=2, growing_batch=None)
    fit(model, np.ones((20, 2)), np.ones((20, 3)))
    assert (dense.call, loss.call) == own and dense.activation is keras.activations.tanh
