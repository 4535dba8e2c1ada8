"""What HFModel promises of forms: whatever model and data a Keras user brings, the updates are those of the same cases as plain arrays."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import loss_and_gradient, model_data, on_objective, with_objective
from training import assert_equal, assert_same, fit, normal, renewed, set_weights, small_network, trainable

from keras_hf import DoubleBackward, EmpiricalFisherDiagonal, GaussNewton, GrowingBatch, Identity, LevenbergMarquardt
from keras_hf.network import structure
from keras_hf.problem import batching
from keras_hf.training.fit_data import FitData, in_batches, repeated, weights_of_classes

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:An update on")]


def compiled(network=None, loss="mse", compile_arguments=None, **arguments):
    # Few iterations: CG at its end would amplify the order of sums.
    settings = {"preconditioner": Identity(), "max_iterations": 8, "growing_batch": None, **arguments}
    network = small_network(3) if network is None else network
    return trainable(network, loss, compile_arguments=compile_arguments, **settings)


def assert_falls(history):
    assert (np.diff(history["loss"]) < 0).all(), history["loss"]
    assert all(step > 0 for step in history["step_size"])


# Data. 24 cases: of arrays, a `batch_size` of 10 makes three batches of 8.

X, Y, WEIGHT = normal(24, 2), normal(24, 3, seed=1), np.linspace(0.1, 2, 24)
ARRAYS = {"x": X, "y": Y, "sample_weight": WEIGHT}


# With these, one trace is for arrays and datasets of any number of cases: those of a batch that may grow, and that fit into one micro-batch.
OF_ANY_SIZE = {"growing_batch": GrowingBatch(), "curvature_batch_size": 24}


def regression():
    model = compiled(**OF_ANY_SIZE)
    set_weights(model)
    return model


def weights_after(make=regression, **arguments):
    """The weights after `fit`, and its history."""
    model = renewed(make)
    history = fit(model, **arguments)
    assert model.num_traces == 1
    return model.get_weights(), history


@functools.cache
def weights_after_arrays():
    """The weights after an epoch, by batch size; the first is traced for any number of cases, because the last batch is smaller."""
    return {batch_size: weights_after(**ARRAYS, batch_size=batch_size)[0] for batch_size in (10, 12, 24)}


def batches():
    return [tuple(array[start : start + 8] for array in ARRAYS.values()) for start in (0, 8, 16)]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return batches()[i]


def dataset(batch_size=8, num_cases=24):
    """A dataset of the last cases, whose batches TensorFlow does not know the size of."""
    return tf.data.Dataset.from_tensor_slices((X[-num_cases:], Y[-num_cases:], WEIGHT[-num_cases:])).batch(batch_size)


def sharded_by_data():
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset().with_options(options)


def of_arrays(function, **arguments):
    """Arguments of `fit`: what the function makes of each array, and others."""
    return {**{name: function(array) for name, array in ARRAYS.items()}, **arguments}


def with_others(array):
    """A quarter of other cases behind, which `validation_split` takes away."""
    return np.concatenate([array, normal(8, *array.shape[1:], seed=9)])


# The `batch_size` of arrays, and what makes the arguments of `fit`.
FORMS = {
    "tensors": (10, lambda: of_arrays(tf.constant, batch_size=10)),
    "dataset": (10, lambda: {"x": dataset()}),
    "dataset with options": (10, lambda: {"x": sharded_by_data()}),
    "infinite dataset": (10, lambda: {"x": dataset().repeat(), "steps_per_epoch": 3}),
    "prefetched dataset": (10, lambda: {"x": dataset().prefetch(2)}),
    "generator": (10, lambda: {"x": (batch for batch in itertools.cycle(batches())), "steps_per_epoch": 3}),
    "PyDataset": (10, lambda: {"x": Batches()}),
    "validation_split": (10, lambda: of_arrays(with_others, batch_size=10, validation_split=0.25)),
    "validation_data": (10, lambda: {**ARRAYS, "batch_size": 10, "validation_data": (X[:7], Y[:7])}),
    "steps_per_epoch, which cuts arrays as in Keras": (12, lambda: {**ARRAYS, "steps_per_epoch": 2}),
    # All cases in one batch give one update, in any order.
    "dataset of one batch": (24, lambda: {"x": dataset(24)}),
    "no batch_size": (24, lambda: ARRAYS),
    "shuffled": (24, lambda: {**ARRAYS, "shuffle": True}),
    "shuffled tensors": (24, lambda: of_arrays(tf.constant, shuffle=True)),
    "a larger batch_size": (24, lambda: {**ARRAYS, "batch_size": 100, "steps_per_epoch": 1}),
}


@pytest.mark.slow
def test_any_form_of_data_gives_the_updates_of_arrays_in_the_same_trace():
    expected = weights_after_arrays()
    for form, (batch_size, data) in FORMS.items():
        after, history = weights_after(**data())
        names = [f"{form}: weight {number}" for number in range(len(after))]
        assert_same(*(dict(zip(names, weights, strict=True)) for weights in (after, expected[batch_size])))
        assert history["num_cases"] == [8 if batch_size == 10 else batch_size], form
        assert ("val_loss" in history) == form.startswith("validation"), form


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
def test_a_split_trains_on_the_first_cases_and_validates_on_the_last():
    expected = weights_after_arrays()[24]
    x, y, weight = (with_others(array)[24:] for array in ARRAYS.values())
    for kind, shuffle in itertools.product([np.asarray, tf.constant, Labelled], [False, True]):
        data = of_arrays(lambda array, kind=kind: kind(with_others(array)), validation_split=0.25, shuffle=shuffle)
        after, history = weights_after(**data)
        assert_same(after, expected)
        assert history["num_cases"] == [24]
        model = renewed(regression)
        model.set_weights(after)
        assert history["val_loss"] == [pytest.approx(model.evaluate(x, y, sample_weight=weight, verbose=0), rel=1e-9)]


@pytest.mark.parametrize("split, left", [(1.0, 0), (0.99, 0), (1.5, -12), (-0.5, 36), (1e-17, 24)])
@pytest.mark.parametrize("batch_size", [None, 10])
def test_a_split_that_leaves_nothing_is_refused(split, left, batch_size):
    message = f"`validation_split` must leave cases.*Received: validation_split={split}, which leaves {left} of 24 for"
    with pytest.raises(ValueError, match=message):
        fit(renewed(compiled), X, Y, validation_split=split, batch_size=batch_size)


class Stopping(keras.callbacks.Callback):
    """Stops training after the second epoch."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch >= 1


@pytest.mark.slow
def test_every_epoch_of_arrays_is_an_update_as_of_a_dataset_until_a_callback_stops_it():
    def stages(is_dataset):
        """Weights, history and number of updates after each `fit` of several."""
        model = renewed(regression)
        for num_cases, batch_size, arguments in (
            (24, None, {"epochs": 5, "callbacks": [LevenbergMarquardt(), Stopping()]}),
            # Other cases, other numbers, then micro-batches of them, and epochs counted from another.
            (16, None, {}),
            (24, 10, {"epochs": 2}),
            (20, None, {"epochs": 5, "initial_epoch": 2}),
        ):
            if is_dataset:
                history = fit(model, dataset(8 if batch_size else num_cases, num_cases), **arguments)
            else:
                x, y, weight = (array[-num_cases:] for array in ARRAYS.values())
                history = fit(model, x, y, sample_weight=weight, batch_size=batch_size, **arguments)
            yield model.get_weights(), history, int(model.optimizer.iterations)
        assert model.num_traces == 1

    expected = list(stages(is_dataset=True))
    assert [num_updates for *_, num_updates in expected] == [2, 3, 9, 12]
    for (weights, history, num_updates), (of_dataset, logs, number) in zip(stages(False), expected, strict=True):
        assert num_updates == number
        assert_same(weights, of_dataset)
        assert_same(history, logs, rtol=1e-6)


def test_keras_is_not_told_to_shuffle_what_comes_in_an_order_of_its_own():
    arguments = {**dict.fromkeys(("validation_data", "batch_size")), "validation_split": 0.0, "shuffle": True}
    kinds = (dataset(), iter(batches()), (batch for batch in batches()), Batches())
    shuffled = [
        FitData(x, None, None, **arguments).for_keras(None, None, False, False, 1, True)["shuffle"] for x in kinds
    ]
    assert shuffled == [False, False, False, True]


@pytest.mark.parametrize("floatx", ["float32", "float64"])
def test_arrays_are_converted_once_to_the_floats_of_keras_and_nothing_else_is(floatx):
    keras.config.set_floatx(floatx)
    arrays = {"a": X, "b": tf.constant(Y), "c": WEIGHT.astype("float16"), "none": None}
    others = {"i": CLASSES, "u": CLASSES.astype("uint8"), "s": np.array(["a"] * 24), "t": CLASSES > 1}
    x, y = next(iter(repeated(arrays, others, None, None)))
    assert x.pop("none") is None
    assert {name: leaf.dtype.name for name, leaf in x.items()} == dict.fromkeys("abc", floatx)
    assert [y[name].dtype.name for name in "iust"] == ["int64", "uint8", "string", "bool"]
    np.testing.assert_array_equal(x["a"], X.astype(floatx))


def test_all_arrays_come_in_the_order_that_the_seed_has_when_training_begins():
    seed, places = tf.Variable(3), np.arange(24)
    in_order = lambda num_cases: batching.order(num_cases, tf.convert_to_tensor(seed))  # noqa: E731
    batches = iter(repeated({"a": places, "none": None}, [places, places.astype(str)], WEIGHT, in_order).take(2))
    seed.assign(4)
    (x, (y, names), weight), (again, *_) = batches
    order = x["a"].numpy()
    assert x["none"] is None and sorted(order) == list(places) != list(order)
    np.testing.assert_array_equal(order, batching.order(24, 4))
    expected = [order, order.astype(str).astype("S"), WEIGHT[order], order]
    for leaf, values in zip([y, names, weight, again["a"]], expected, strict=True):
        np.testing.assert_array_equal(leaf, values)


# Of `fit`, but for the arrays.
ARGUMENTS = dict.fromkeys(("batch_size", "steps_per_epoch", "shuffle", "validation_data", "validation_batch_size"))


@pytest.mark.parametrize("grows", [True, False])
def test_without_shuffling_arrays_keep_their_order_unless_a_part_of_them_is_to_be_like_the_rest(grows):
    places = np.arange(24.0)[:, None]
    data = FitData(places, places, None, **ARGUMENTS, validation_split=0.0)
    x, y = next(iter(data.for_keras(tf.constant(0), tf.constant(0), grows, False, 1, True)["x"]))
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(x, places[batching.spread(24)] if grows else places)


def test_lists_of_arrays_stay_apart():
    x, y, weight = next(iter(repeated([X, X[:, :1], [X]], [Y], WEIGHT, None)))
    assert keras.tree.map_structure(lambda leaf: tuple(leaf.shape), x) == ((24, 2), (24, 1), ((24, 2),))
    assert [tuple(leaf.shape) for leaf in y] == [(24, 3)] and weight.shape == (24,)


@pytest.mark.parametrize("is_shuffled", [True, False])
def test_batches_of_near_equal_size_have_every_case_once_an_epoch(is_shuffled):
    places, num_updates = np.arange(11), tf.Variable(0, dtype=tf.int64)
    order = functools.partial(batching.order, seed=tf.Variable(3)) if is_shuffled else None
    batches = in_batches({"a": places, "none": None}, [places, 2.0 * places], None, 4, num_updates, order)

    def epoch_after(number):
        num_updates.assign(number)
        return list(batches)

    epochs = [epoch_after(number) for number in (0, 4, 4)]
    orders = [np.concatenate([x["a"] for x, _ in epoch]) for epoch in epochs]
    for epoch, order in zip(epochs, orders, strict=True):
        assert [len(x["a"]) for x, _ in epoch] == [2, 3, 3, 3]
        assert sorted(order) == list(places)
        np.testing.assert_array_equal(np.concatenate([y[1] for _, y in epoch]), 2 * order)
    assert batches.cardinality() == 4
    # Of the same number of updates, as in a resumed run, they are the same.
    assert list(orders[1]) == list(orders[2])
    assert (list(orders[0]) == list(orders[1]) == list(places)) == (not is_shuffled)


@pytest.mark.parametrize("is_shuffled", [True, False])
def test_epochs_of_fewer_batches_than_hold_all_cases_go_on_where_the_last_has_ended(is_shuffled):
    num_updates = tf.Variable(0)
    order = functools.partial(batching.order, seed=tf.constant(3)) if is_shuffled else None
    batches = in_batches(np.arange(11), None, None, 4, num_updates, order, steps=3)
    found = []
    for number in range(0, 12, 3):
        num_updates.assign(number)
        found.append(np.concatenate([x for (x,) in batches]))
    assert batches.cardinality() == 3
    passes = np.split(np.concatenate(found), 3)
    assert [sorted(cases) for cases in passes] == [list(range(11))] * 3
    assert (list(passes[0]) == list(passes[1])) == (not is_shuffled)


@pytest.mark.parametrize("arguments", [{}, {"steps_per_epoch": 3}])
def test_the_optimizers_seed_alone_fixes_batches_and_a_resumed_run_has_those_of_one_that_was_not_stopped(arguments):
    def weights_after_fits_up_to(*epochs):
        model = renewed(regression)
        for start, end in itertools.pairwise([0, *epochs]):
            # Another one in every fit of every run.
            keras.utils.set_random_seed(10 * len(epochs) + start)
            fit(model, **ARRAYS, batch_size=6, shuffle=True, initial_epoch=start, epochs=end, **arguments)
        return model.get_weights()

    assert_equal(weights_after_fits_up_to(1, 3, 4), weights_after_fits_up_to(4))


@pytest.mark.parametrize("batch_size", [None, 6, 7])
def test_what_arrays_become_has_no_thread_that_its_end_waits_for(batch_size):
    data = FitData(X, Y, None, **{**ARGUMENTS, "batch_size": batch_size}, validation_split=0.0)
    assert (
        data.for_keras(tf.constant(0), tf.constant(0), False, False, 1, True)["x"].options().autotune.enabled is False
    )


@pytest.mark.slow
def test_one_dimensional_targets_and_weights_are_those_of_one_column():
    after = []
    for y, weight in ((Y[:, 0], WEIGHT), (Y[:, :1], WEIGHT[:, None])):
        model = compiled(keras.Sequential([keras.Input((2,)), layers.Dense(1)]))
        set_weights(model)
        fit(model, X, y, sample_weight=weight)
        after.append(model.get_weights())
    assert_same(*after)


CLASSES = np.random.default_rng(2).integers(0, 3, 24)
CLASS_WEIGHT = {0: 0.25, 1: 2.5}  # and 1 of class 2
OF_CLASS = np.array([CLASS_WEIGHT.get(label, 1.0) for label in CLASSES])


def classification(loss="sparse_categorical_crossentropy", **arguments):
    hidden = layers.Dense(4, "tanh"), layers.Dense(3, "softmax")
    model = compiled(keras.Sequential([keras.Input((2,)), *hidden]), loss, **arguments)
    set_weights(model)
    return model


def of_labels():
    return classification(**OF_ANY_SIZE)


def of_one_hot():
    return classification("categorical_crossentropy", **OF_ANY_SIZE)


def labelled(y, *weight):
    """A dataset of one batch."""
    return tf.data.Dataset.from_tensor_slices((X, y, *weight)).batch(24)


@pytest.mark.slow
@pytest.mark.parametrize("make, y", [(of_labels, CLASSES), (of_one_hot, np.eye(3)[CLASSES])])
def test_class_weights_are_the_sample_weights_they_stand_for(make, y):
    expected, _ = weights_after(make, x=labelled(y, OF_CLASS))
    for data in ({"x": X, "y": y}, {"x": labelled(y)}):
        assert_same(weights_after(make, **data, class_weight=CLASS_WEIGHT)[0], expected)


LABELS = np.array([-1, 0, 1, 2])


@pytest.mark.parametrize(
    "y",
    [LABELS, LABELS[:, None].astype("float32"), tf.constant(LABELS), np.stack([LABELS, LABELS], 1)[..., None]],
    ids=["labels", "a column of floats", "tensor", "sequences"],
)
def test_every_label_has_the_weight_of_its_class_and_classes_that_are_not_named_have_1(y):
    found = weights_of_classes({0: 0.5, 1: 3.0}, y)
    np.testing.assert_array_equal(found, np.stack([[1, 0.5, 3, 1]] * 2, 1) if y.ndim > 2 else [1, 0.5, 3, 1])
    assert found.dtype == keras.config.floatx()


def test_one_hot_and_boolean_labels_have_the_weights_of_their_classes():
    for y in (np.eye(3)[[2, 0, 1]], np.eye(3)[[[2, 0, 1]]]):
        np.testing.assert_array_equal(np.ravel(weights_of_classes({0: 0.5, 1: 3.0}, y)), [1, 0.5, 3])
    np.testing.assert_array_equal(weights_of_classes({1: 3.0}, np.array([True, False])), [3, 1])


def test_validation_cases_are_not_weighed_by_their_classes():
    data = FitData(X, CLASSES, None, CLASS_WEIGHT, **{**ARGUMENTS, "batch_size": 9}, validation_split=0.25)
    arguments = data.for_keras(tf.constant(0), tf.constant(0), False, False, 1, True)
    assert len(arguments["validation_data"]) == 2 and len(arguments["x"].element_spec) == 3
    assert data.specs().sample_weight == tf.TensorSpec([9], "float64")


@pytest.mark.parametrize(
    "y, sample_weight, class_weight, error",
    [
        (CLASSES, WEIGHT, CLASS_WEIGHT, "`class_weight` and `sample_weight` must not be given both"),
        ([CLASSES, CLASSES], None, CLASS_WEIGHT, "for the targets of one output, an array. Received: y of type list"),
        (CLASSES, None, [1.0, 2.0], "must be a dict from numbers of classes to weights. Received: class_weight=\\[1.0"),
    ],
)
def test_weights_of_classes_that_cannot_be_are_refused(y, sample_weight, class_weight, error):
    with pytest.raises(ValueError, match=error):
        FitData(X, y, sample_weight, class_weight, **ARGUMENTS, validation_split=0.0)


@pytest.mark.slow
def test_boolean_labels_have_the_weights_of_their_classes():
    after, labels = [], CLASSES > 0
    for y in (labels, labels.astype("int32")):
        model = classification()
        fit(model, X, y, class_weight=CLASS_WEIGHT)
        after.append(model.get_weights())
    assert_same(*after)


@pytest.mark.slow
def test_train_on_batch_takes_weights_and_of_any_size_traces_at_most_twice():
    after = []
    # Made for this test alone: how often it is traced is the fact.
    for weights in ({"sample_weight": OF_CLASS}, {"class_weight": CLASS_WEIGHT}):
        model = renewed(classification)
        model.train_on_batch(X, CLASSES, **weights)
        after.append(model.get_weights())
    assert_same(after[0], weights_after(of_labels, x=labelled(CLASSES, OF_CLASS))[0])
    assert_same(*after)
    for num_cases in (10, 7, 24):
        cases = X[:num_cases], CLASSES[:num_cases], OF_CLASS[:num_cases]
        assert model.train_on_batch(*cases, return_dict=True)["num_cases"] == num_cases
    assert 1 <= model.num_traces <= 2  # the second for any number of cases


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


def two_outputs(network=None, loss=LOSSES, loss_weights=LOSS_WEIGHTS, **arguments):
    network = branches() if network is None else network
    model = compiled(network, loss, {"loss_weights": loss_weights}, **arguments)
    set_weights(model)
    return model


def two_outputs_of_any_size():
    return two_outputs(**OF_ANY_SIZE)


def after_nests(x=PARTS, y=TARGETS, sample_weight=WEIGHTS, **arguments):
    model = renewed(two_outputs_of_any_size)
    history = fit(model, x, y, sample_weight=sample_weight, **arguments)
    return model.get_weights(), history


after_dicts = functools.cache(after_nests)


@pytest.mark.slow
def test_the_loss_of_dicts_is_their_weighted_sum():
    network = branches()
    set_weights(network)
    y_pred = network(PARTS)
    squares = np.mean((y_pred["p"] - TARGETS["p"]) ** 2, -1)
    entropies = -np.sum(TARGETS["q"] * np.log(y_pred["q"]), -1)
    expected = 0.5 * np.mean(WEIGHT * squares) + 2 * np.mean(WEIGHT[::-1] * entropies)
    assert after_dicts()[1]["loss"][0] == pytest.approx(expected, rel=1e-9)


# The network's, then x, y, sample weights, losses and their weights.
STRUCTURES = {
    "lists": (list, list, *map(listed, (PARTS, TARGETS, WEIGHTS, LOSSES, LOSS_WEIGHTS))),
    # Keras finds losses by name, and targets where no weights come.
    "list of outputs, losses by name": (dict, list, PARTS, listed(TARGETS), listed(WEIGHTS), LOSSES, LOSS_WEIGHTS),
    "dict of inputs to a network of a list": (list, dict, PARTS, TARGETS, WEIGHTS, LOSSES, LOSS_WEIGHTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_structure_gives_the_updates_of_dicts(structure):
    inputs, outputs, x, y, sample_weight, loss, loss_weights = STRUCTURES[structure]
    model = two_outputs(branches(inputs, outputs), loss, loss_weights)
    fit(model, x, y, sample_weight=sample_weight)
    assert_same(model.get_weights(), after_dicts()[0])
    assert model.num_traces == 1


@pytest.mark.slow
def test_a_dataset_of_dicts_gives_the_updates_of_dicts():
    expected, _ = after_dicts()
    after, _ = after_nests(tf.data.Dataset.from_tensor_slices((PARTS, TARGETS, WEIGHTS)).batch(24), None, None)
    assert_same(after, expected)


@pytest.mark.slow
def test_a_split_of_nests_is_one_of_their_leaves():
    after, history = after_nests(validation_split=0.25, epochs=2)
    first, last = (
        [{name: leaf[part] for name, leaf in nest.items()} for nest in (PARTS, TARGETS, WEIGHTS)]
        for part in (slice(18), slice(18, None))
    )
    expected, reference = after_nests(*first, validation_data=last, epochs=2)
    assert_same(after, expected)
    assert_same(history, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights, meaning",
    [
        pytest.param(WEIGHT, {"p": WEIGHT, "q": WEIGHT}, id="for all outputs"),
        pytest.param({"p": WEIGHT, "q": None}, {"p": WEIGHT, "q": np.ones(24)}, id="none"),
    ],
)
def test_weights_for_all_outputs_are_those_of_each_and_none_are_ones(weights, meaning):
    assert_same(after_nests(sample_weight=weights)[0], after_nests(sample_weight=meaning)[0])


def but_of_q(network):
    return [weight for layer in network.layers if layer.name != "q" for weight in layer.get_weights()]


@functools.cache
def weights_after_p_alone():
    network = branches(list, list)
    set_weights(network)
    alone = keras.models.clone_model(keras.Model(network.inputs, network.outputs[0]))
    alone.set_weights(but_of_q(network))
    fit(compiled(alone), listed(PARTS), TARGETS["p"])
    return alone.get_weights()


@pytest.mark.slow
@pytest.mark.parametrize(
    "outputs, y, loss",
    [
        (dict, TARGETS, {"p": "mse", "q": None}),
        (dict, {"p": TARGETS["p"]}, {"p": "mse"}),
        (list, listed(TARGETS), ["mse", None]),
    ],
    ids=["None in a dict", "left out", "None in a list"],
)
def test_an_output_without_loss_is_as_if_it_were_not_there(outputs, y, loss):
    network = branches(dict, outputs)
    model = two_outputs(network, loss, loss_weights=None)
    head = network.get_layer("q").get_weights()
    fit(model, PARTS, y)
    assert_same(but_of_q(network), weights_after_p_alone())
    assert_equal(head, network.get_layer("q").get_weights())


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
def test_a_shared_layer_is_trained_as_a_subclass_trains_it_nested_or_not():
    subclass = Twice()
    subclass.build((None, 2))
    models = [compiled(network) for network in (subclass, shared(nested=False), shared(nested=True))]
    for model in models:
        set_weights(model)
    unused = subclass.unused.get_weights()
    for model in models:
        fit(model, X, Y, epochs=2)
    expected = subclass.shared.get_weights() + subclass.head.get_weights()
    for model in models[1:]:
        assert_same(model.get_weights(), expected)
    assert_equal(subclass.unused.get_weights(), unused)


@pytest.mark.slow
def test_training_behind_a_frozen_layer_is_training_on_its_outputs():
    frozen = keras.Sequential([keras.Input((2,)), layers.Dense(4, "tanh")], name="frozen")
    set_weights(frozen)
    before, features = frozen.get_weights(), frozen(X).numpy()
    frozen.trainable = False
    behind, alone = small_network(3, num_inputs=4, units=3), small_network(3, num_inputs=4, units=3)
    for network in (behind, alone):
        set_weights(network)
    fit(compiled(keras.Sequential([keras.Input((2,)), frozen, behind])), X, Y)
    fit(compiled(alone), features, Y)
    assert_same(behind.get_weights(), alone.get_weights())
    assert_equal(before, frozen.get_weights())


# Kinds of layers: the loss falls in every update.


def recurrent():
    return keras.Sequential([keras.Input((5, 4)), layers.Bidirectional(layers.GRU(2)), layers.Dense(1)])


def attention():
    x = keras.Input((5, 4))
    hidden = layers.TimeDistributed(layers.Dense(3, "tanh"))(x)
    hidden = layers.Attention()([hidden, hidden])
    return keras.Model(x, layers.Dense(1)(layers.Flatten()(layers.MultiHeadAttention(2, 2)(hidden, hidden))))


def masked():
    inner = layers.Embedding(7, 3, mask_zero=True), layers.LSTM(3)
    return keras.Sequential([keras.Input((5,), dtype="int32"), *inner, layers.Dense(1)])


def convolutional():
    inner = layers.ConvLSTM2D(2, 3), layers.Flatten()
    return keras.Sequential([keras.Input((3, 4, 4, 1)), *inner, layers.Dense(1)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, x",
    [
        pytest.param(recurrent, normal(24, 5, 4), id="Bidirectional GRU"),
        pytest.param(attention, normal(24, 5, 4), id="TimeDistributed, Attention and MultiHeadAttention"),
        pytest.param(masked, np.random.default_rng(6).integers(0, 7, (24, 5)), id="Embedding and masked LSTM"),
        pytest.param(convolutional, normal(24, 3, 4, 4, 1), id="ConvLSTM2D"),
    ],
)
def test_the_loss_falls_in_every_update(network, x):
    model = compiled(network())
    assert_falls(fit(model, x, normal(24, 1, seed=8), epochs=4))
    assert model.num_traces == 1


def test_losses_of_any_rank_are_means_over_all_their_values():
    shapes = [(6, 2), (5, 6, 2), (3, 4, 5, 1)]
    inputs = [keras.Input(shape) for shape in shapes]
    network = keras.Model(inputs, [layers.Dense(1)(each) for each in inputs])
    x = [normal(24, *shape) for shape in shapes]
    y = [normal(24, *shape[:-1], 1, seed=1) for shape in shapes]
    expected = sum(np.mean((output - target) ** 2) for output, target in zip(network(x), y, strict=True))
    model = compiled(network)
    data = model_data(model, x, y)
    loss, gradient, *_ = with_objective(model, data, lambda objective: objective.loss_and_gradient())
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, loss_and_gradient(model, data)[1], rtol=1e-9, atol=1e-12)


def test_a_linear_network_under_dropout_has_a_reduction_ratio_of_1():
    network = keras.Sequential([keras.Input((5,)), layers.Dropout(0.5, seed=3), layers.Dense(2)])
    history = fit(compiled(network, damping=1e-3), normal(24, 5), normal(24, 2, seed=1), epochs=3)
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
    return [layers.LSTM(16, use_cudnn=False)]


def cnn():
    convolutions = (layers.Conv2D(units, size, strides=2, activation="tanh") for units, size in ((4, 5), (8, 3)))
    return [layers.Reshape((28, 28, 1)), *convolutions, layers.Flatten()]


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [lstm, cnn])
def test_digits_are_learned_with_a_loss_that_falls_in_every_update(hidden, digits):
    network = keras.Sequential([keras.Input((28, 28)), *hidden(), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = compiled(network, loss, {"metrics": ["accuracy"]}, preconditioner=EmpiricalFisherDiagonal())
    history = fit(model, *digits, epochs=6)
    assert_falls(history)
    assert model.num_traces == 1
    # Of ten classes chance gives 0.1; the log has the accuracy before an update.
    assert history["accuracy"][-1] > 0.3


def test_sequences_of_unknown_length_are_worked_on_in_micro_batches_within_the_bound(monkeypatch):
    hidden = layers.Dense(2, "tanh"), layers.GlobalAveragePooling1D()
    model = compiled(keras.Sequential([keras.Input((None, 3)), *hidden, layers.Dense(1)]))
    data = model_data(model, normal(30, 8, 3), normal(30, 1, seed=1))

    def size_and_product(memory):
        monkeypatch.setattr(structure, "_MICRO_BATCH_MEMORY", memory)

        def of(objective):
            found = model.setup.structure
            assert not objective._parts.micro_batches.chunk_is_one
            product = objective.product(GaussNewton(DoubleBackward()))(tf.ones([objective.num_weights], tf.float64))
            return found.default_micro_batch_size(data), product

        @tf.function(autograph=False, input_signature=[tf.TensorSpec([30, None, 3], tf.float64)])
        def compute(x):
            return on_objective(model, data._replace(x=x), of)

        return compute(data.x)

    (of_whole, whole), (of_micro_batch, in_micro_batches) = size_and_product(2**31), size_and_product(2**14)
    assert of_whole > 30 and 1 < of_micro_batch < 15
    assert_same([whole], [in_micro_batches])
