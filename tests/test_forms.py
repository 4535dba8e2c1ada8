"""What HFModel promises of forms: whatever model and data a Keras user brings, the updates are those of the same cases as plain arrays."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import hessian_free, loss_and_gradient, model_data, with_objective

from keras_hf import DoubleBackward, EmpiricalFisherDiagonal, GaussNewton, HFModel, Identity, LevenbergMarquardt
from keras_hf.arrays import in_batches, repeated
from keras_hf.problem import batching, structure

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:An update on")]


class CountingModel(HFModel):
    """Counts how often its training step is traced."""

    num_traces = 0

    def train_step(self, data):
        self.num_traces += 1
        return super().train_step(data)


def compiled(network, loss="mse", preconditioner=None, damping=0.1, **arguments):
    model = CountingModel(network)
    # Few iterations: CG at its end would amplify the order of sums.
    model.compile(hessian_free(damping, preconditioner or Identity(), max_iterations=8, seed=0), loss, **arguments)
    return model


def fit(model, *data, **arguments):
    return model.fit(
        *data, **{"shuffle": False, "verbose": 0, "callbacks": [LevenbergMarquardt()], **arguments}
    ).history


def set_weights(model, seed=5):
    """Weights that depend on their place alone."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(scale=0.5, size=weight.shape) for weight in model.weights])


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def assert_falls(history):
    assert (np.diff(history["loss"]) < 0).all(), history["loss"]
    assert all(step > 0 for step in history["step_size"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# Data. 24 cases in batches of 10, the last of 4.

X, Y, WEIGHT = normal(24, 2), normal(24, 3, seed=1), np.linspace(0.1, 2, 24)
BATCHES = [slice(0, 10), slice(10, 20), slice(20, 24)]


def network():
    return keras.Sequential([keras.Input((2,)), layers.Dense(4, "tanh"), layers.Dense(3)])


def weights_after(loss="mse", **arguments):
    model = compiled(network(), loss)
    set_weights(model)
    history = fit(model, **arguments)
    assert model.num_traces == 1
    return model.get_weights(), history


@functools.cache
def weights_after_arrays(batch_size=10):
    return weights_after(x=X, y=Y, sample_weight=WEIGHT, batch_size=batch_size)[0]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, i):
        return X[BATCHES[i]], Y[BATCHES[i]], WEIGHT[BATCHES[i]]


def generator():
    while True:
        for batch in BATCHES:
            yield X[batch], Y[batch], WEIGHT[batch]


def dataset(batch_size=10):
    return tf.data.Dataset.from_tensor_slices((X, Y, WEIGHT)).batch(batch_size)


def sharded_by_data():
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset().with_options(options)


def with_others(array):
    """A quarter of other cases behind, which `validation_split` takes away."""
    return np.concatenate([array, normal(8, *array.shape[1:], seed=9)])


FORMS = {
    "tensors": lambda: {
        "x": tf.constant(X),
        "y": tf.constant(Y),
        "sample_weight": tf.constant(WEIGHT),
        "batch_size": 10,
    },
    "weights in a column": lambda: {"x": X, "y": Y, "sample_weight": WEIGHT[:, None], "batch_size": 10},
    "dataset": lambda: {"x": dataset()},
    "dataset with options": lambda: {"x": sharded_by_data()},
    "infinite dataset": lambda: {"x": dataset().repeat(), "steps_per_epoch": 3},
    "prefetched dataset": lambda: {"x": dataset().prefetch(2)},
    "generator": lambda: {"x": generator(), "steps_per_epoch": 3},
    "PyDataset": lambda: {"x": Batches()},
    "validation_split": lambda: {
        "x": with_others(X),
        "y": with_others(Y),
        "sample_weight": with_others(WEIGHT),
        "batch_size": 10,
        "validation_split": 0.25,
    },
    "validation_data": lambda: {
        "x": X,
        "y": Y,
        "sample_weight": WEIGHT,
        "batch_size": 10,
        "validation_data": (X[:7], Y[:7]),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [form if form in ("dataset", "PyDataset") else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_any_form_of_data_gives_the_updates_of_arrays(form):
    after, history = weights_after(**FORMS[form]())
    assert_same(after, weights_after_arrays())
    assert history["num_cases"] == [4]
    assert ("val_loss" in history) == form.startswith("validation")


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        {"x": dataset(24)},
        {"x": X, "y": Y, "sample_weight": WEIGHT},
        {"x": X, "y": Y, "sample_weight": WEIGHT, "shuffle": True},
        {"x": tf.constant(X), "y": tf.constant(Y), "sample_weight": tf.constant(WEIGHT), "shuffle": True},
        {"x": X, "y": Y, "sample_weight": WEIGHT, "batch_size": 100, "steps_per_epoch": 1},
    ],
    ids=["dataset", "no batch_size", "shuffled", "tensors", "a larger batch_size"],
)
def test_a_batch_of_all_cases_gives_one_update_in_any_order(data):
    assert_same(weights_after(**data)[0], weights_after_arrays(24))


# One batch of arrays, which `fit` makes a dataset that repeats.


class Labelled:
    """Cases as pandas holds them: places by `iloc` alone."""

    def __init__(self, array):
        self.iloc, self.shape, self.dtype = array, array.shape, array.dtype

    def __len__(self):
        return len(self.iloc)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.iloc, dtype)

    def __getitem__(self, label):
        raise KeyError(label)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, tf.constant, Labelled])
def test_a_split_trains_on_the_first_cases_and_validates_on_the_last(kind, shuffle):
    after, history = weights_after(
        **{name: kind(with_others(array)) for name, array in (("x", X), ("y", Y), ("sample_weight", WEIGHT))},
        validation_split=0.25,
        shuffle=shuffle,
    )
    assert_same(after, weights_after_arrays(24))
    assert history["num_cases"] == [24]
    model = compiled(network())
    model.set_weights(after)
    others = [with_others(array)[24:] for array in (X, Y, WEIGHT)]
    expected = model.evaluate(*others[:2], sample_weight=others[2], verbose=0)
    assert history["val_loss"] == [pytest.approx(expected, rel=1e-9)]


@pytest.mark.slow
def test_a_split_of_nests_is_one_of_their_leaves():
    data = PARTS, TARGETS, LOSSES, LOSS_WEIGHTS
    after, history = branches_after(branches(), *data, sample_weight=WEIGHTS, validation_split=0.25, epochs=2)
    first, last = (
        [{name: leaf[part] for name, leaf in nest.items()} for nest in (PARTS, TARGETS, WEIGHTS)]
        for part in (slice(18), slice(18, None))
    )
    expected, reference = branches_after(
        branches(), *first[:2], LOSSES, LOSS_WEIGHTS, sample_weight=first[2], validation_data=last, epochs=2
    )
    assert_same(after, expected)
    for key in reference:
        np.testing.assert_allclose(history[key], reference[key], rtol=1e-7, err_msg=key)


@pytest.mark.parametrize("split, left", [(1.0, 0), (0.99, 0), (1.5, -12), (-0.5, 36), (1e-17, 24)])
@pytest.mark.parametrize("batch_size", [None, 10])
def test_a_split_that_leaves_nothing_is_refused(split, left, batch_size):
    message = f"`validation_split` must leave cases.*Received: validation_split={split}, which leaves {left} of 24 for"
    with pytest.raises(ValueError, match=message):
        fit(compiled(network()), X, Y, validation_split=split, batch_size=batch_size)


class Stopping(keras.callbacks.Callback):
    """Stops training after the second epoch."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch >= 1


@pytest.mark.slow
def test_every_epoch_of_arrays_is_an_update_as_of_a_dataset_until_a_callback_stops_it():
    model, reference = compiled(network()), compiled(network())
    for each in (model, reference):
        set_weights(each)
    stages = [
        ({"epochs": 5, "callbacks": [LevenbergMarquardt(), Stopping()]}, 24, 2),
        # Other cases, other numbers, then pieces of them, and epochs counted from another.
        ({}, 16, 1),
        ({"batch_size": 10, "epochs": 2}, 24, 6),
        ({"epochs": 5, "initial_epoch": 2}, 20, 3),
    ]
    num_updates = 0
    for arguments, num_cases, num_new in stages:
        arrays = X[-num_cases:], Y[-num_cases:], WEIGHT[-num_cases:]
        data = of_unknown_size(*arrays, arguments.get("batch_size", num_cases))
        expected = fit(reference, data, **{k: v for k, v in arguments.items() if k != "batch_size"})
        history = fit(model, *arrays[:2], sample_weight=arrays[2], **arguments)
        num_updates += num_new
        assert int(model.optimizer.iterations) == num_updates
        assert_same(model.get_weights(), reference.get_weights())
        for key in expected:
            np.testing.assert_allclose(history[key], expected[key], rtol=1e-6, err_msg=key)
    assert reference.num_traces == 1


def of_unknown_size(x, y, sample_weight, batch_size):
    """A dataset whose batches TensorFlow does not know the size of: it is traced once."""
    specs = [tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in (x, y, sample_weight)]
    starts = range(0, len(x), batch_size)
    batches = lambda: ([array[i : i + batch_size] for array in (x, y, sample_weight)] for i in starts)  # noqa: E731
    data = tf.data.Dataset.from_generator(lambda: map(tuple, batches()), output_signature=tuple(specs))
    return data.apply(tf.data.experimental.assert_cardinality(len(starts)))


def test_class_weights_and_weights_of_cases_together_are_refused():
    with pytest.raises(ValueError, match="class_weight.*sample_weight"):
        fit(compiled(network(), CLASSIFYING), X, CLASSES, class_weight=CLASS_WEIGHT, sample_weight=WEIGHT)


@pytest.mark.parametrize("floatx", ["float32", "float64"])
def test_arrays_are_converted_once_to_the_floats_of_keras_and_nothing_else_is(floatx):
    keras.config.set_floatx(floatx)
    arrays = {"a": X, "b": tf.constant(Y), "c": WEIGHT.astype("float16"), "none": None}
    others = {"i": CLASSES, "u": CLASSES.astype("uint8"), "s": np.array(["a"] * 24), "t": CLASSES > 1}
    batch, y = next(iter(repeated(arrays, others, None, None)))
    assert {name: None if leaf is None else leaf.dtype.name for name, leaf in batch.items()} == {
        "a": floatx,
        "b": floatx,
        "c": floatx,
        "none": None,
    }
    assert {name: leaf.dtype.name for name, leaf in y.items()} == {
        "i": "int64",
        "u": "uint8",
        "s": "string",
        "t": "bool",
    }
    np.testing.assert_array_equal(batch["a"], X.astype(floatx))


def test_all_arrays_come_in_the_order_that_the_seed_has_when_training_begins():
    seed, places = tf.Variable(3), np.arange(24)
    batches = iter(repeated({"a": places, "none": None}, [places, places.astype(str)], WEIGHT, seed).take(2))
    seed.assign(4)
    (x, (y, names), weight), (again, *_) = batches
    order = x["a"].numpy()
    assert x["none"] is None and sorted(order) == list(places) != list(order)
    np.testing.assert_array_equal(order, batching.order(24, 4))
    for leaf, expected in (
        (y, order),
        (names, order.astype(str).astype("S")),
        (weight, WEIGHT[order]),
        (again["a"], order),
    ):
        np.testing.assert_array_equal(leaf, expected)


def test_lists_of_arrays_stay_apart():
    x, y, weight = next(iter(repeated([X, X[:, :1], [X]], [Y], WEIGHT, None)))
    assert keras.tree.map_structure(lambda leaf: tuple(leaf.shape), x) == ((24, 2), (24, 1), ((24, 2),))
    assert [tuple(leaf.shape) for leaf in y] == [(24, 3)] and weight.shape == (24,)


@pytest.mark.parametrize("is_shuffled", [True, False])
def test_batches_of_near_equal_size_have_every_case_once_an_epoch(is_shuffled):
    places = np.arange(11)
    batches = in_batches({"a": places, "none": None}, [places, 2.0 * places], None, 4, is_shuffled)
    epochs = [list(batches) for _ in range(2)]
    orders = [np.concatenate([x["a"] for x, _ in epoch]) for epoch in epochs]
    for epoch, order in zip(epochs, orders, strict=True):
        assert [len(x["a"]) for x, _ in epoch] == [2, 3, 3, 3]
        assert sorted(order) == list(places)
        np.testing.assert_array_equal(np.concatenate([y[1] for _, y in epoch]), 2 * order)
    assert batches.cardinality() == 4
    assert (list(orders[0]) == list(orders[1]) == list(places)) == (not is_shuffled)


@pytest.mark.slow
def test_steps_per_epoch_cuts_arrays_as_in_keras():
    after, history = weights_after(x=X, y=Y, sample_weight=WEIGHT, steps_per_epoch=2)
    assert history["num_cases"] == [12]
    assert_same(after, weights_after_arrays(12))


@pytest.mark.slow
def test_one_dimensional_targets_are_those_of_one_column():
    after = []
    for y in (Y[:, 0], Y[:, :1]):
        model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(1)]))
        set_weights(model)
        fit(model, X, y)
        after.append(model.get_weights())
    assert_same(*after)


CLASSES = np.random.default_rng(2).integers(0, 3, 24)
CLASS_WEIGHT = {0: 1.0, 1: 2.5, 2: 0.25}
OF_CLASS = np.array([CLASS_WEIGHT[label] for label in CLASSES])
CLASSIFYING = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")


@functools.cache
def weights_after_class_weights():
    return weights_after(CLASSIFYING, x=X, y=CLASSES, sample_weight=OF_CLASS)[0]


@pytest.mark.parametrize("form", ["arrays", "dataset", "one-hot"])
@pytest.mark.slow
def test_class_weights_are_the_sample_weights_they_stand_for(form):
    one_hot = keras.losses.CategoricalCrossentropy(from_logits=True, dtype="float64")
    loss, data = {
        "arrays": (CLASSIFYING, {"x": X, "y": CLASSES}),
        "dataset": (CLASSIFYING, {"x": tf.data.Dataset.from_tensor_slices((X, CLASSES)).batch(24)}),
        "one-hot": (one_hot, {"x": X, "y": np.eye(3)[CLASSES]}),
    }[form]
    assert_same(weights_after(loss, **data, class_weight=CLASS_WEIGHT)[0], weights_after_class_weights())


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights", [{"sample_weight": OF_CLASS}, {"class_weight": CLASS_WEIGHT}], ids=["sample", "class"]
)
def test_train_on_batch_takes_weights(weights):
    model = compiled(network(), CLASSIFYING)
    set_weights(model)
    model.train_on_batch(X, CLASSES, **weights)
    assert_same(model.get_weights(), weights_after_class_weights())


@pytest.mark.slow
def test_train_on_batch_of_any_size_traces_at_most_twice():
    model = compiled(network())
    for num_cases in (24, 10, 7, 24):
        logs = model.train_on_batch(X[:num_cases], Y[:num_cases], return_dict=True)
        assert logs["num_cases"] == num_cases
    assert model.num_traces <= 2  # the second for any number of cases


# Several inputs and outputs.


def branches(inputs=dict, outputs=dict):
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    hidden = layers.Concatenate()([layers.Dense(3, "tanh")(a), b])
    p, q = layers.Dense(1, name="p")(hidden), layers.Dense(2, "softmax", name="q")(hidden)
    return keras.Model({"a": a, "b": b} if inputs is dict else [a, b], {"p": p, "q": q} if outputs is dict else [p, q])


PARTS = {"a": X, "b": Y}
TARGETS = {"p": normal(24, 1, seed=3), "q": np.eye(2)[np.random.default_rng(4).integers(0, 2, 24)]}
LOSSES, LOSS_WEIGHTS = {"p": "mse", "q": "categorical_crossentropy"}, {"p": 0.5, "q": 2.0}
WEIGHTS = {"p": WEIGHT, "q": WEIGHT[::-1].copy()}


def listed(nest):
    return list(nest.values())


def branches_after(net, x, y, loss, loss_weights=None, **arguments):
    model = compiled(net, loss, loss_weights=loss_weights)
    set_weights(model)
    history = fit(model, x, y, **arguments)
    assert model.num_traces == 1
    return model.get_weights(), history


@functools.cache
def branches_after_dicts():
    return branches_after(branches(), PARTS, TARGETS, LOSSES, LOSS_WEIGHTS, sample_weight=WEIGHTS)


@pytest.mark.slow
def test_the_loss_of_dicts_is_their_weighted_sum():
    net = branches()
    set_weights(net)
    y_pred = net(PARTS)
    squares = np.mean((y_pred["p"] - TARGETS["p"]) ** 2, -1)
    entropies = -np.sum(TARGETS["q"] * np.log(y_pred["q"]), -1)
    expected = 0.5 * np.mean(WEIGHT * squares) + 2 * np.mean(WEIGHT[::-1] * entropies)
    assert branches_after_dicts()[1]["loss"][0] == pytest.approx(expected, rel=1e-9)


STRUCTURES = {
    "lists": lambda: (
        branches(list, list),
        listed(PARTS),
        listed(TARGETS),
        listed(LOSSES),
        listed(LOSS_WEIGHTS),
        listed(WEIGHTS),
    ),
    "list of outputs, losses by name": lambda: (branches(dict, list), PARTS, TARGETS, LOSSES, LOSS_WEIGHTS, WEIGHTS),
    "dict of inputs to a network of a list": lambda: (
        branches(list, dict),
        PARTS,
        TARGETS,
        LOSSES,
        LOSS_WEIGHTS,
        WEIGHTS,
    ),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.slow
def test_any_structure_gives_the_updates_of_dicts(structure):
    net, x, y, loss, loss_weights, sample_weight = STRUCTURES[structure]()
    if structure.startswith("list of"):
        y, sample_weight = (
            listed(y),
            listed(sample_weight),
        )  # Keras finds losses by name, and targets where no weights come
    after, _ = branches_after(net, x, y, loss, loss_weights, sample_weight=sample_weight)
    assert_same(after, branches_after_dicts()[0])


@pytest.mark.slow
def test_a_dataset_of_dicts_gives_the_updates_of_dicts():
    data = tf.data.Dataset.from_tensor_slices((PARTS, TARGETS, WEIGHTS)).batch(24)
    assert_same(branches_after(branches(), data, None, LOSSES, LOSS_WEIGHTS)[0], branches_after_dicts()[0])


@pytest.mark.slow
def test_weights_for_all_outputs_are_the_same_weights_for_each():
    one, _ = branches_after(branches(), PARTS, TARGETS, LOSSES, sample_weight=WEIGHT)
    each, _ = branches_after(branches(), PARTS, TARGETS, LOSSES, sample_weight={"p": WEIGHT, "q": WEIGHT})
    assert_same(one, each)


@pytest.mark.slow
def test_an_output_without_weights_has_weights_of_one():
    none, _ = branches_after(branches(), PARTS, TARGETS, LOSSES, sample_weight={"p": WEIGHT, "q": None})
    ones, _ = branches_after(branches(), PARTS, TARGETS, LOSSES, sample_weight={"p": WEIGHT, "q": np.ones(24)})
    assert_same(none, ones)


@pytest.mark.parametrize(
    "net, y, loss",
    [
        (lambda: branches(), TARGETS, {"p": "mse", "q": None}),
        (lambda: branches(), {"p": TARGETS["p"]}, {"p": "mse"}),
        (lambda: branches(dict, list), listed(TARGETS), ["mse", None]),
    ],
    ids=["None in a dict", "left out", "None in a list"],
)
@pytest.mark.slow
def test_an_output_without_loss_is_as_if_it_were_not_there(net, y, loss):
    net = net()
    set_weights(net)
    head = [weight.numpy() for weight in net.get_layer("q").weights]
    alone = keras.Model(net.inputs, keras.tree.flatten(net.outputs)[0])
    alone = keras.models.clone_model(alone)
    rest = [weight.numpy() for layer in net.layers if layer.name != "q" for weight in layer.weights]
    alone.set_weights(rest)
    model, reference = compiled(net, loss), compiled(alone)
    fit(model, PARTS, y)
    fit(reference, listed(PARTS), TARGETS["p"])
    assert_same([w for layer in net.layers if layer.name != "q" for w in layer.get_weights()], alone.get_weights())
    for before, after in zip(head, net.get_layer("q").get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


# Layers shared, nested, frozen, unused.


class Twice(keras.Model):
    """Calls one layer twice, and holds one that it never calls."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = layers.Dense(2, "tanh"), layers.Dense(3)
        self.unused = layers.Dense(2)

    def build(self, shape):
        for layer in (self.shared, self.head, self.unused):
            layer.build((None, 2))

    def call(self, x):
        return self.head(self.shared(self.shared(x)))


def shared(nested):
    layer, x = layers.Dense(2, "tanh"), keras.Input((2,))
    if nested:
        inner = keras.Sequential([keras.Input((2,)), layer])
        return keras.Sequential([keras.Input((2,)), inner, inner, layers.Dense(3)])
    return keras.Model(x, layers.Dense(3)(layer(layer(x))))


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_a_shared_layer_is_trained_as_a_subclass_trains_it(nested):
    reference, model = compiled(Twice()), compiled(shared(nested))
    reference.network.build((None, 2))
    set_weights(reference)
    set_weights(model)
    before = reference.network.unused.get_weights()
    for each in (reference, model):
        fit(each, X, Y, epochs=2)
    assert_same(reference.network.shared.get_weights() + reference.network.head.get_weights(), model.get_weights())
    for one, other in zip(before, reference.network.unused.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_training_behind_a_frozen_layer_is_training_on_its_outputs():
    frozen = keras.Sequential([keras.Input((2,)), layers.Dense(4, "tanh")], name="frozen")
    set_weights(frozen)
    before, features = frozen.get_weights(), frozen(X).numpy()
    frozen.trainable = False
    behind = [layers.Dense(3, "tanh"), layers.Dense(3)]
    model = compiled(keras.Sequential([keras.Input((2,)), frozen, *behind]))
    reference = compiled(keras.Sequential([keras.Input((4,)), layers.Dense(3, "tanh"), layers.Dense(3)]))
    set_weights(reference)
    for one, other in zip(behind, reference.network.layers, strict=True):
        one.set_weights(other.get_weights())
    fit(reference, features, Y)
    fit(model, X, Y)
    assert_same(behind[0].get_weights() + behind[1].get_weights(), reference.get_weights())
    for one, other in zip(before, frozen.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# Kinds of layers: the loss falls in every update.


def attention():
    x = keras.Input((5, 4))
    query = layers.Dense(3)(x)
    return keras.Model(x, layers.Flatten()(layers.Attention()([query, query])))


def multi_head_attention():
    x = keras.Input((5, 4))
    return keras.Model(x, layers.Flatten()(layers.MultiHeadAttention(2, 2)(x, x)))


def on_sequences(layer):
    return lambda: keras.Sequential([keras.Input((5, 4)), layer(), layers.Flatten()])


def on_tokens(mask):
    rest = layers.LSTM(3) if mask else layers.Flatten()
    return keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(7, 3, mask_zero=mask), rest])


TOKENS = np.random.default_rng(6).integers(0, 7, (24, 5))
LAYERS = [
    pytest.param(on_sequences(lambda: layers.LSTM(3)), normal(24, 5, 4), id="LSTM"),
    pytest.param(on_sequences(lambda: layers.GRU(3)), normal(24, 5, 4), id="GRU"),
    pytest.param(on_sequences(lambda: layers.Bidirectional(layers.LSTM(2))), normal(24, 5, 4), id="Bidirectional"),
    pytest.param(
        on_sequences(lambda: layers.TimeDistributed(layers.Dense(2, "tanh"))), normal(24, 5, 4), id="TimeDistributed"
    ),
    pytest.param(attention, normal(24, 5, 4), id="Attention"),
    pytest.param(multi_head_attention, normal(24, 5, 4), id="MultiHeadAttention"),
    pytest.param(lambda: on_tokens(mask=False), TOKENS, id="Embedding"),
    pytest.param(lambda: on_tokens(mask=True), TOKENS, id="masked LSTM"),
    pytest.param(
        lambda: keras.Sequential([keras.Input((3, 4, 4, 1)), layers.ConvLSTM2D(2, 3), layers.Flatten()]),
        normal(24, 3, 4, 4, 1),
        id="ConvLSTM2D",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("net, x", LAYERS)
def test_the_loss_falls_in_every_update(net, x):
    model = compiled(keras.Sequential([net(), layers.Dense(1)]), preconditioner=EmpiricalFisherDiagonal())
    assert_falls(fit(model, x, normal(24, 1, seed=8), epochs=4))
    assert model.num_traces == 1


@pytest.mark.parametrize(
    "shape",
    [pytest.param((6, 2), marks=pytest.mark.slow), (5, 6, 2), pytest.param((3, 4, 5, 1), marks=pytest.mark.slow)],
)
def test_losses_of_any_rank_are_means_over_all_their_values(shape):
    net = keras.Sequential([keras.Input(shape), layers.Dense(1)])
    y = normal(24, *shape[:-1], 1, seed=1)
    model = compiled(net)
    x = normal(24, *shape)
    expected = np.mean((net(x) - y) ** 2)
    assert fit(model, x, y)["loss"][0] == pytest.approx(expected, rel=1e-12)


def test_a_linear_network_under_dropout_has_a_reduction_ratio_of_1():
    net = keras.Sequential([keras.Input((5,)), layers.Dropout(0.5, seed=3), layers.Dense(2)])
    model = compiled(net, damping=1e-3)
    history = fit(model, normal(24, 5), normal(24, 2, seed=1), epochs=3)
    # The quadratic model is the loss itself, if every pass sees the same masks.
    np.testing.assert_allclose(history["reduction_ratio"], 1, atol=1e-9)
    assert history["step_size"] == [1, 1, 1]


class Residual(keras.Model):
    """u'' + u and u of a network u(t): what a physics-informed loss compares with zero and with data."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = layers.Dense(6, "tanh"), layers.Dense(1)

    def call(self, t):
        with tf.GradientTape() as outer:
            outer.watch(t)
            with tf.GradientTape() as inner:
                inner.watch(t)
                u = self.head(self.hidden(t))
            velocity = inner.gradient(u, t)
        return tf.concat([outer.gradient(velocity, t) + u, u], -1)


@pytest.mark.slow
def test_a_network_that_differentiates_itself_trains():
    t = np.linspace(0, 1, 24)[:, None]
    y = np.concatenate([0 * t, np.sin(t)], -1)
    model = compiled(Residual(), preconditioner=EmpiricalFisherDiagonal())
    assert_falls(fit(model, t, y, epochs=5))
    assert model.num_traces == 1
    data = model_data(model, t, y)
    loss, gradient = loss_and_gradient(model, data)
    found = with_objective(model, data, lambda objective: objective.loss_and_gradient()[:2])
    np.testing.assert_allclose(found[0], loss, rtol=1e-12)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-9, atol=1e-12)


# Real data, in float32.


@pytest.fixture
def digits(data_dir):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    with np.load(data_dir / "mnist.npz") as arrays:
        return arrays["x_train"][:400].astype("float32") / 255, arrays["y_train"][:400]


def lstm():
    return keras.Sequential([keras.Input((28, 28)), layers.LSTM(16, use_cudnn=False), layers.Dense(10)])


def cnn():
    convolutions = [
        layers.Conv2D(4, 5, strides=2, activation="tanh"),
        layers.Conv2D(8, 3, strides=2, activation="tanh"),
    ]
    return keras.Sequential(
        [keras.Input((28, 28)), layers.Reshape((28, 28, 1)), *convolutions, layers.Flatten(), layers.Dense(10)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("net", [lstm, cnn])
def test_digits_are_learned_with_a_loss_that_falls_in_every_update(net, digits):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = compiled(net(), loss, EmpiricalFisherDiagonal(), metrics=["accuracy"])
    history = fit(model, *digits, epochs=6)
    assert_falls(history)
    assert model.num_traces == 1
    # Of ten classes chance gives 0.1; the log has the accuracy before an update.
    assert history["accuracy"][-1] > 0.3


def test_sequences_of_unknown_length_are_worked_on_in_pieces_within_the_bound(monkeypatch):
    model = compiled(
        keras.Sequential(
            [keras.Input((None, 3)), layers.Dense(2, "tanh"), layers.GlobalAveragePooling1D(), layers.Dense(1)]
        )
    )
    data = model_data(model, normal(30, 8, 3), normal(30, 1, seed=1))

    def size_and_product(memory):
        monkeypatch.setattr(structure, "_PIECE_MEMORY", memory)

        def of(objective, found):
            assert not found.chunk_is_one_piece
            product = objective.product(GaussNewton(DoubleBackward()))(tf.ones([objective.num_weights], tf.float64))
            return found.default_piece_size(data), product

        @tf.function(autograph=False, input_signature=[tf.TensorSpec([30, None, 3], tf.float64)])
        def compute(x):
            return model._with_objective(data._replace(x=x), of)

        return compute(data.x)

    (of_whole, whole), (of_piece, in_pieces) = size_and_product(2**31), size_and_product(2**14)
    assert of_whole > 30 and 1 < of_piece < 15
    assert_same([whole], [in_pieces])
