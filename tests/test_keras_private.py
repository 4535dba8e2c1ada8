"""What each private name of Keras is taken to mean: these tests fail on a Keras that renamed one, or means another thing by it."""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_hf import ConjugateGradient, ConstantDamping, HessianFree, HFModel, KroneckerFactored
from keras_hf.common import keras_private
from keras_hf.common.replaced import replaced

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
Y = np.ones([4, 2], "float32")


class WithoutTraining(layers.Layer):
    def call(self, x):
        return x


@pytest.fixture(scope="module")
def model():
    """A plain Keras model, compiled, before any batch."""
    network = keras.Sequential(
        [keras.Input((3,)), layers.Dropout(0.5), keras.Sequential([layers.Dense(2)]), WithoutTraining()]
    )
    network.compile("sgd", loss="mse")
    return network


def compiled(loss="mse", **arguments):
    """A compiled model of two outputs."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile(loss=loss, **arguments)
    return model


def test_all_layers_are_the_model_and_those_of_models_in_it(model):
    found = keras_private.all_layers(model)
    assert found[0] is model
    assert {type(layer).__name__ for layer in found} >= {"Dropout", "Sequential", "Dense", "WithoutTraining"}
    assert len({id(layer) for layer in found}) == len(found)


def test_a_layer_says_whether_its_call_takes_training_and_seed_generators_are_its_own(model):
    (dropout,) = [layer for layer in keras_private.all_layers(model) if isinstance(layer, layers.Dropout)]
    assert keras_private.takes_training(dropout)
    assert not keras_private.takes_training(WithoutTraining())
    assert keras_private.seed_generators(dropout) == [dropout.seed_generator]
    assert keras_private.seed_generators(model) == []


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_are_what_softmax_and_sigmoid_take(activation):
    x = tf.constant(X)
    assert keras_private.logits(layers.Activation(activation)(x)) is x
    assert keras_private.logits(layers.Activation("tanh")(x)) is None


def test_losses_go_through_the_logits():
    output = layers.Activation("sigmoid")(tf.constant(X))
    output._keras_logits = keras_private.logits(output) + 1.0
    loss = keras.losses.BinaryCrossentropy()
    target = tf.ones([4, 3])
    np.testing.assert_allclose(loss(target, output), loss(target, tf.sigmoid(X + 1.0)), rtol=1e-5)


def test_a_mask_goes_with_the_tensor_and_into_the_loss():
    x = tf.constant([[[1.0]], [[0.0]], [[3.0]]])
    masked = layers.Masking()(x)
    np.testing.assert_array_equal(keras_private.mask(masked), [[True], [False], [True]])
    assert keras_private.mask(x) is None
    # The mean of 1 and 9, without the case that is off.
    assert float(keras.losses.MeanSquaredError()(tf.zeros([3, 1, 1]), masked)) == pytest.approx(5.0)


def test_layers_of_keras_stop_gradients_in_the_modules_where_they_are_let_through():
    folder = Path(keras.src.layers.__file__).parent
    stopping = {path.stem for path in folder.rglob("*.py") if re.search(r"stop_gradient\(", path.read_text())}
    assert {name for name in stopping if not name.endswith("_test")} <= {
        "batch_normalization",
        "spectral_normalization",
    }
    layer = layers.SpectralNormalization(layers.Dense(2))
    layer.build((None, 3))

    def slope():
        with tf.GradientTape() as tape:
            vector = layer.normalized_weights()[0]
        return tape.gradient(vector, layer.kernel.value)

    assert slope() is None
    with keras_private.complete_derivatives():
        assert slope() is not None
    assert slope() is None


def test_methods_before_compile_are_refused(model):
    with pytest.raises(ValueError, match="compile"):
        keras_private.require_compiled(keras.Sequential([layers.Dense(1)]), "fit")
    keras_private.require_compiled(model, "fit")


def test_a_compiled_model_has_a_loss_or_none(model):
    loss = keras_private.compiled_loss(model)
    assert not loss.built
    loss.build(tf.constant(Y), tf.zeros([4, 2]))
    assert float(loss(tf.constant(Y), tf.zeros([4, 2]))) == 1.0
    other = keras.Sequential([layers.Dense(1)])
    other.compile("sgd")
    assert keras_private.compiled_loss(other) is None


def test_losses_that_are_set_before_the_loss_is_built_are_called():
    loss = keras_private.compiled_loss(compiled())
    keras_private.set_losses(loss, lambda y, y_pred: 7.0 + 0.0 * y_pred[:, 0])
    loss.build(tf.constant(Y), tf.zeros([4, 2]))
    assert float(loss(tf.constant(Y), tf.zeros([4, 2]))) == 7.0


def test_losses_are_called_by_other_functions_and_then_as_before():
    loss, seen = keras_private.compiled_loss(compiled(keras.losses.MeanSquaredError(), loss_weights=3.0)), []
    loss.build(tf.constant(Y), tf.zeros([4, 2]))

    def make_call(of_user, weight):
        def call(y, y_pred, sample_weight=None):
            seen.append((type(of_user), weight, y.shape, y_pred.shape, sample_weight.shape))
            return tf.constant(5.0)

        return call

    y, y_pred, sample_weight = tf.constant(Y), tf.zeros([4, 2]), tf.ones([4])
    with keras_private.losses_called_by(loss, make_call):
        loss(y, y_pred, sample_weight)
    assert seen == [(keras.losses.MeanSquaredError, 3.0, (4, 2), (4, 2), (4,))]
    assert float(loss(y, y_pred, sample_weight)) == 3.0 and len(seen) == 1


def test_compute_loss_is_called_with_and_without_training():
    class With(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return x, y, y_pred, sample_weight, training

    class Without(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return x, y, y_pred, sample_weight

    assert keras_private.call_compute_loss(With(), 1, 2, 3, 4) == (1, 2, 3, 4, True)
    assert keras_private.call_compute_loss(Without(), 1, 2, 3, 4) == (1, 2, 3, 4)


def test_the_tracked_loss_is_a_mean_over_cases():
    model = compiled()
    keras_private.track_loss(model, 1.0, 3)
    keras_private.track_loss(model, 5.0, 1)
    assert float(model.get_metrics_result()["loss"]) == 2.0


def test_an_optimizer_knows_the_weights_it_was_built_for(model):
    optimizer = keras.optimizers.SGD()
    optimizer.build(model.trainable_variables)
    assert [id(v) for v in keras_private.optimized_weights(optimizer)] == [id(v) for v in model.trainable_variables]


def test_moving_averages_follow_the_weights_and_begin_with_the_first():
    optimizer = keras.optimizers.SGD(use_ema=True)
    weight = keras.Variable([4.0])
    optimizer.build([weight])
    for value, expected in ((8.0, 8.0), (4.0, 7.0)):
        weight.assign([value])
        keras_private.average_weights(optimizer, tf.constant(0.75, tf.float64))
        optimizer.iterations.assign_add(1)
        np.testing.assert_allclose(optimizer._model_variables_moving_average[0], [expected])
    without = keras.optimizers.SGD()
    without.build([weight])
    keras_private.average_weights(without, 0.75)


def test_a_symbolic_build_makes_weights_loss_metrics_and_optimizer():
    model = keras.Sequential([layers.Dense(2)])
    model.compile("sgd", "mse", metrics=["mae"])
    spec = lambda n: tf.TensorSpec([None, n], "float32")  # noqa: E731
    keras_private.symbolic_build(model, (spec(3), spec(2), None))
    assert [weight.shape for weight in model.weights] == [(3, 2), (2,)]
    assert keras_private.compiled_loss(model).built and model.optimizer.built
    assert set(model.get_metrics_result()) == {"loss", "mae"}


# What Keras calls in `HFModel`.


class Looking(HFModel):
    """Keeps what `_maybe_symbolic_build` was called with."""

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        self.seen = None if iterator is None else keras_private.batch_spec(iterator), data_batch
        super()._maybe_symbolic_build(iterator, data_batch)


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_keras_has_the_model_built_before_the_first_batch(method):
    model = Looking(keras.Sequential([layers.Dense(2)]))
    model.compile(HessianFree(0.1, solver=ConjugateGradient(), growing_batch=None), "mse")
    # No update is made.
    model.make_train_function = model.make_test_function = lambda force=False: None
    model.train_function = model.test_function = lambda iterator: {"loss": 0.0}
    whole = {"verbose": 0} if method in ("fit", "evaluate") else {}
    getattr(model, method)(X, Y, **whole, **({"callbacks": [ConstantDamping()]} if method == "fit" else {}))
    spec, batch = model.seen
    if whole:
        # `fit` on all cases tells their number.
        num_cases = 4 if method == "fit" else None
        assert [tuple(leaf.shape) for leaf in spec] == [(num_cases, 3), (num_cases, 2)] and batch is None
    else:
        assert [leaf.shape for leaf in batch if leaf is not None] == [(4, 3), (4, 2)] and spec is None
    assert model.built and model.optimizer.built and model.network.count_params() == 8


def test_an_optimizer_that_is_built_with_the_first_batch_knows_the_layers():
    solver = ConjugateGradient(preconditioner=KroneckerFactored(interval=2))
    shapes = []
    for start in ([], [keras.Input((3,))]):
        model = HFModel(keras.Sequential([*start, layers.Dense(3, "tanh", name="one"), layers.Dense(2, name="two")]))
        model.compile(HessianFree(0.1, solver=solver), "mse")
        model._maybe_symbolic_build(data_batch=(X, Y, None))
        shapes.append(keras.tree.map_structure(lambda tensor: tensor.shape, model.optimizer.state()))
    assert shapes[0] == shapes[1]
    # Two factors of each of the layers, their inputs' with a bias.
    assert {tuple(shape) for shape in shapes[0].solver["preconditioner"].values()} >= {(4, 4), (3, 3), (2, 2)}


def test_a_batch_divided_among_replicas_has_the_spec_of_its_parts():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    dataset = tf.data.Dataset.from_tensor_slices(X).batch(2)
    spec = strategy.experimental_distribute_dataset(dataset).element_spec
    assert not isinstance(spec, tf.TensorSpec)
    first = keras_private.spec_of_first_replica(spec)
    assert isinstance(first, tf.TensorSpec) and first.shape[1:] == (3,)
    assert keras_private.spec_of_first_replica(first) is first


def test_no_other_room_touches_these_names():
    room = Path(keras_private.__file__)
    attribute = re.compile(r"(?<!self)\.(_[a-z]\w*)|getattr\(\w+, \"(_\w+)\"")
    found = {
        path: {name for pair in attribute.findall(path.read_text()) for name in pair if name}
        for path in room.parents[1].rglob("*.py")
    }
    names = found.pop(room) - {"_replace"}
    assert len(found) > 50
    assert names > {"_flat_losses", "_user_loss", "_keras_logits", "_keras_mask"}
    assert {path: names & others for path, others in found.items() if names & others} == {}


def test_steps_return_the_first_replicas_results():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        network = compiled(optimizer="sgd")
    number = lambda: tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)  # noqa: E731
    network.train_step = lambda data: {"loss": number(), "scalar": tf.constant(3)}
    data = lambda: iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors((X, Y)).repeat()))  # noqa: E731
    network.make_train_function()
    assert float(network.train_function(data())["loss"]) == 0.5
    with keras_private.results_of_first_replica():
        network.make_train_function(force=True)
        logs = network.train_function(data())
    assert float(logs["loss"]) == 0.0 and logs["scalar"].dtype == tf.int32


def test_a_backup_has_two_files_and_the_epoch_to_go_on_from(tmp_path, model):
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    backup.set_model(model)
    saved = []
    with replaced(keras_private.backups_saved_by(backup, lambda: saved.append(keras_private.epoch_of_backup(backup)))):
        backup.on_epoch_end(4)
    assert saved == [5]
    backup.on_epoch_end(5)
    weights, metadata = keras_private.paths_of_backup(backup)
    assert Path(weights).exists() and json.loads(Path(metadata).read_text())["epoch"] == 6


def test_fit_begins_at_the_epoch_that_it_was_told():
    network = compiled(optimizer="sgd")
    keras_private.start_at_epoch(network, 3)
    assert network.fit(X, Y, epochs=5, verbose=0).epoch == [3, 4]
