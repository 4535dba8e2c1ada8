"""What an update of a growing batch promises: it is that of the cases it uses, its logs are theirs, and it grows by the rule."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import training
from keras import layers
from training import assert_equal, assert_same, normal, renewed, set_weights, trainable

from keras_hf import ConstantDamping, GrowingBatch, HessianFree, Identity, LevenbergMarquardt
from keras_hf.problem import batching

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:An update on")]

NUM_CASES, SIZE = 24, 5
X, Y, WEIGHT = normal(NUM_CASES, 2), normal(NUM_CASES, 1, seed=1), np.linspace(0.1, 2, NUM_CASES)


def fit(model, *data, sample_weight=None, **arguments):
    """Trains on arrays so that the parts of a batch are runs of the cases as they are here: `fit` takes those of a part from all over the batch."""
    if (
        model.optimizer.growing_batch is not None
        and not isinstance(data[0], tf.data.Dataset)
        and "batch_size" not in arguments
    ):
        places = np.argsort(batching.spread(len(keras.tree.flatten(data)[0])))
        data, sample_weight = keras.tree.map_structure(
            lambda array: None if array is None else array[places], (list(data), sample_weight)
        )
    return training.fit(
        model, *data, **({} if sample_weight is None else {"sample_weight": sample_weight}), **arguments
    )


def compiled(growing_batch=None, loss="mse", network=None, metrics=None, **arguments):
    # Few iterations: CG at its end would amplify the order of sums.
    settings = {"preconditioner": Identity(), "max_iterations": 8, "growing_batch": growing_batch, **arguments}
    model = trainable(network, loss, compile_arguments=metrics, **settings)
    set_weights(model, scale=1.0)
    return model


def state_of(model):
    return {key: int(value) for key, value in model.optimizer.state().growing_batch.items()}


def set_size(model, size):
    state = model.optimizer.state()
    model.optimizer.assign_state(state._replace(growing_batch={**state.growing_batch, "size": tf.constant(size)}))


# Updates are those of the cases used.

# A growing batch that won't grow within a few updates.
FIXED = GrowingBatch(initial_size=SIZE, patience=100, noise=1e6)
METRICS = {"metrics": ["mae"], "weighted_metrics": ["mse"]}


def of_parts(growing_batch=None):
    return compiled(growing_batch, metrics=METRICS)


def of_micro_batches(growing_batch=None):
    """Of micro-batches, by the default preconditioner, for means that weights divide."""
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    settings = {"preconditioner": None, "curvature_batch_size": 4, "micro_batch_size": 3}
    return compiled(growing_batch, loss, metrics=METRICS, **settings)


def dataset(*parts):
    """A dataset of these parts of the cases, whose sizes TensorFlow does not know before they come."""
    signature = tuple(tf.TensorSpec((None, *array.shape[1:]), tf.float64) for array in (X, Y, WEIGHT))
    batches = lambda: ((X[part], Y[part], WEIGHT[part]) for part in map(list, parts))  # noqa: E731
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return data.apply(tf.data.experimental.assert_cardinality(len(parts)))


def assert_same_updates(model, history, reference, parts):
    """That updates are those of another model on these parts of the cases alone, one after the other, and so are their logs.

    Of a constant damping: of batches, which those parts are there, a rule goes by `optimism`, too.
    """
    histories = [fit(reference, dataset(part), callbacks=[ConstantDamping()]) for part in parts]
    assert_same(model.get_weights(), reference.get_weights())
    assert_same(history, {key: [logs[key][0] for logs in histories] for key in histories[0] if key in history})


# Five updates of 5 of 24 cases: the last goes around, and a round ends.
PARTS = [range(0, 5), range(5, 10), range(10, 15), range(15, 20), [20, 21, 22, 23, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_parts, of_micro_batches])
def test_updates_and_logs_are_those_of_the_cases_used_alone(make):
    model, reference = renewed(make, FIXED), renewed(make)
    history = fit(model, X, Y, sample_weight=WEIGHT, epochs=5, callbacks=[ConstantDamping()])
    assert_same_updates(model, history, reference, PARTS)
    assert history["num_cases"] == [SIZE] * 5
    state = state_of(model)
    assert state["size"] == SIZE and 25 <= state["start"] <= 25 + NUM_CASES - 2 * SIZE


@pytest.mark.slow
def test_chunks_and_micro_batches_may_be_larger_than_the_part():
    model, reference = renewed(of_micro_batches, FIXED), renewed(of_micro_batches)
    set_size(model, 2)
    history = fit(model, X, Y, sample_weight=WEIGHT, epochs=3, callbacks=[ConstantDamping()])
    assert_same_updates(model, history, reference, [range(0, 2), range(2, 4), range(4, 6)])


@pytest.mark.slow
def test_loss_and_metrics_are_what_evaluate_gives_of_the_cases_used():
    model = renewed(of_parts, FIXED)
    for part in map(list, PARTS):
        expected = model.evaluate(X[part], Y[part], sample_weight=WEIGHT[part], verbose=0, return_dict=True)
        history = fit(model, X, Y, sample_weight=WEIGHT)
        assert {key: history[key][0] for key in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_every_batch_of_a_dataset_gives_a_part():
    model, reference = renewed(of_micro_batches, FIXED), renewed(of_micro_batches)
    set_size(model, 3)
    constant = {"epochs": 2, "callbacks": [ConstantDamping()]}
    history = fit(model, tf.data.Dataset.from_tensor_slices((X, Y, WEIGHT)).batch(10), **constant)
    # Of batches of 10, 10 and 4 cases: the next three, and all where they are fewer than six. After four updates the next round begins anywhere.
    start = state_of(model)["start"] - 7
    parts = [range(0, 3), range(13, 16), range(20, 24)]
    parts += [range(0, 3), [10 + place % 10 for place in range(start, start + 3)], range(20, 24)]
    expected = fit(reference, dataset(*parts), steps_per_epoch=3, **constant)
    assert_same(model.get_weights(), reference.get_weights())
    assert_same(history, expected, keys=expected.keys() - {"optimism"})


@pytest.mark.slow
def test_nests_are_cut_in_all_their_leaves_and_unseen_cases_leave_no_trace_in_batch_statistics():
    def network():
        a, b = keras.Input((2,), name="a"), keras.Input((1,), name="b")
        hidden = layers.Concatenate()([layers.Dense(3, "tanh")(layers.BatchNormalization()(a)), b])
        return keras.Model(
            {"a": a, "b": b}, {"p": layers.Dense(1, name="p")(hidden), "q": layers.Dense(2, name="q")(a)}
        )

    def nest(part):
        return {"a": X[part], "b": Y[part]}, {"p": Y[part], "q": X[part] ** 2}

    results = []
    for growing_batch, parts in ((FIXED, [slice(None)] * 2), (None, PARTS[:2])):
        model = compiled(growing_batch, {"p": "mse", "q": "mse"}, network())
        for part in parts:
            fit(model, *nest(part))
        # Moving statistics among the weights.
        results.append(model.get_weights())
    assert_same(*results)


# Growth.


RULE = {"initial_size": 3, "share": 0.5, "patience": 2, "noise": 0.6}


def by_rule():
    """Noise alone: what is learned of some cases says nothing of others."""
    return compiled(GrowingBatch(**RULE), damping=1e-3)


@pytest.mark.slow
def test_it_grows_as_the_rule_says_of_losses_that_evaluate_gives():
    model, growing = renewed(by_rule), GrowingBatch(**RULE)
    state = growing.initial_state([], [])
    sizes = []
    for number in range(9):
        used, unseen = (run.indices().numpy() for run in growing.select(state, tf.constant([NUM_CASES])))

        def losses(part):
            return np.square(Y[part] - model.predict(X[part], verbose=0))[:, 0] if len(part) else np.zeros(1)

        before = [losses(part).mean() for part in (used, unseen)]
        sizes += fit(model, X, Y, callbacks=[ConstantDamping()])["num_cases"]
        after = losses(unseen)
        variation = after.var() / after.mean() ** 2 if len(unseen) else 0.0
        reduction, *trial = (
            tf.constant(value, tf.float64)
            for value in (before[0] - losses(used).mean(), before[1], after.mean(), variation)
        )
        turn, num_cases = tf.constant([0, number]), tf.constant(NUM_CASES)
        trial = batching.Trial(tf.size(unseen), *trial)
        state = growing.next_state(state, tf.size(used), reduction, trial, num_cases, turn)
        assert state_of(model) == {key: int(value) for key, value in state.items()}
        assert sizes[-1] == len(used)
    assert sizes[0] == 3 and sizes[-1] >= 12
    assert model.num_traces == 1


@pytest.mark.slow
def test_its_size_outlives_fit_and_a_file_and_a_larger_batch(tmp_path):
    model = renewed(by_rule)
    sizes = fit(model, X, Y, epochs=4)["num_cases"]
    state = state_of(model)
    assert 3 < state["size"] < NUM_CASES / 2 and state["start"] >= 12
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert again.optimizer.growing_batch.get_config() == model.optimizer.growing_batch.get_config()
    assert state_of(again) == state
    # The next updates use the same part.
    history = fit(model, X, Y, epochs=2)
    assert fit(again, X, Y, epochs=2) == history
    assert_equal(model.get_weights(), again.get_weights())
    sizes += history["num_cases"] + fit(model, X, Y, epochs=6)["num_cases"]
    assert sizes == sorted(sizes) and sizes[-1] == NUM_CASES
    size = state_of(model)["size"]
    assert fit(model, np.tile(X, (9, 1)), np.tile(Y, (9, 1)))["num_cases"] == [size]


def impatient():
    """Grows after the first miss."""
    return compiled(GrowingBatch(initial_size=SIZE, patience=1))


def test_it_stays_small_while_cases_are_alike():
    # Every part holds the same cases.
    x, y = np.tile(X[:SIZE], (10, 1)), np.tile(Y[:SIZE], (10, 1))
    # Of a dataset the order stays.
    whole = tf.data.Dataset.from_tensors((x, y))
    assert fit(renewed(impatient), whole, epochs=6)["num_cases"] == [SIZE] * 6


@pytest.mark.slow
def test_a_rejected_step_moves_on_and_is_no_miss_nor_are_unseen_cases_that_are_no_numbers():
    x, model = X.copy(), renewed(impatient)
    x[[2, 12]] = np.nan
    before = model.get_weights()
    with pytest.warns(UserWarning, match="2 of the cases of the batch"):
        assert fit(model, x, Y)["step_size"] == [0]
    assert_equal(before, model.get_weights())
    assert state_of(model) == {"size": SIZE, "start": SIZE, "misses": 0}
    # The next part is sound, and the one after it not.
    assert fit(model, x, Y)["step_size"][0] > 0
    assert state_of(model) == {"size": SIZE, "start": 2 * SIZE, "misses": 0}
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.slow
def test_a_part_that_is_small_on_purpose_gives_no_warning():
    """A small batch gives one: see `test_a_small_batch_of_a_dataset_is_said_once` of test_doors.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(renewed(impatient), np.tile(X, (2, 1)), np.tile(Y, (2, 1)), batch_size=NUM_CASES)


def of_classes():
    network = keras.Sequential([keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(1, "sigmoid")])
    return compiled(GrowingBatch(), "binary_crossentropy", network, damping=1.0)


@pytest.mark.slow
def test_it_is_soon_large_where_one_class_is_rare_and_stays_small_where_none_is():
    x = normal(8000, 6).astype("float32")
    score = 1.2 * x[:, 0] + x[:, 1] * x[:, 2] - 0.6 * x[:, 3] ** 2

    def sizes(rate, weight_of_rare):
        y = (score > np.quantile(score, 1 - rate))[:, None].astype("float32")
        return fit(renewed(of_classes), x, y, epochs=10, class_weight={0: 1.0, 1: weight_of_rare})["num_cases"]

    # Of 250 cases three are positive.
    assert sizes(0.014, 34.0)[-1] >= 4000
    assert sizes(0.5, 1.0)[-1] <= 500


@pytest.mark.slow
def test_with_a_rate_it_grows_in_every_update_until_it_uses_all_cases():
    model = compiled(GrowingBatch(initial_size=4, patience=100, noise=1e6, rate=0.25))
    sizes = fit(model, X, Y, epochs=7, callbacks=[ConstantDamping()])["num_cases"]
    # Rounded up: 4, 5, 7, 9, 12, and 15 would be more than half of all.
    assert sizes == [4, 5, 7, 9, 12, 24, 24]
    # It has stopped growing: a larger batch later is not used as a whole at once.
    assert state_of(model)["size"] == 15


@pytest.mark.slow
def test_a_step_that_raises_leaves_size_and_start():
    class Rising(layers.Layer):
        """Another function in every call."""

        def build(self, shape):
            self.calls = self.add_weight(initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.value.assign_add(1.0)
            return x * self.calls.value.read_value()

    network = keras.Sequential([keras.Input((2,)), Rising(), layers.Dense(1)])
    model = compiled(GrowingBatch(initial_size=SIZE, share=1, patience=1), network=network)
    with pytest.raises(ValueError, match="two different losses"):
        fit(model, X, Y)
    assert state_of(model) == {"size": SIZE, "start": 0, "misses": 0}


# Bad input.


@pytest.mark.parametrize("value", [5, "growing", GrowingBatch, LevenbergMarquardt(), True])
def test_what_is_no_growing_batch_is_refused(value):
    with pytest.raises(TypeError, match=r"`growing_batch` must be a `GrowingBatch` object, such as `GrowingBatch\(\)`"):
        HessianFree(growing_batch=value)
