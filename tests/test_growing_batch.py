"""What an update of a growing batch promises: it is that of the cases it uses, its logs are theirs, and it grows by the rule."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import hessian_free

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    GrowingBatch,
    HessianFree,
    HFModel,
    Identity,
    LevenbergMarquardt,
)
from keras_hf.problem import batching

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:An update on")]

NUM_CASES, SIZE = 24, 5


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


X, Y, WEIGHT = normal(NUM_CASES, 2), normal(NUM_CASES, 1, seed=1), np.linspace(0.1, 2, NUM_CASES)


@keras.saving.register_keras_serializable("tests")
class CountingModel(HFModel):
    """Counts how often its training step is traced."""

    num_traces = 0

    def train_step(self, data):
        self.num_traces += 1
        return super().train_step(data)


def compiled(growing_batch=None, loss="mse", net=None, **arguments):
    net = keras.Sequential([keras.Input((2,)), layers.Dense(4, "tanh"), layers.Dense(1)]) if net is None else net
    model = CountingModel(net)
    # Few iterations: CG at its end would amplify the order of sums.
    arguments = {"damping": 0.1, "preconditioner": Identity(), "seed": 0, "max_iterations": 8, **arguments}
    model.compile(
        hessian_free(growing_batch=growing_batch, **arguments), loss, metrics=["mae"], weighted_metrics=["mse"]
    )
    model.set_weights([normal(*weight.shape, seed=5) for weight in model.weights])
    return model


def fixed(size=SIZE):
    """A growing batch that won't grow within a few updates."""
    return GrowingBatch(initial_size=size, patience=100, noise=1e6)


def fit(model, *data, **arguments):
    return model.fit(
        *data, **{"shuffle": False, "verbose": 0, "callbacks": [LevenbergMarquardt()], **arguments}
    ).history


def fit_parts(model, parts, *data, **arguments):
    """Updates on the cases at these places, one part after the other: history."""
    histories = [fit(model, *[array[part] for array in data], **arguments) for part in parts]
    return {key: [history[key][0] for history in histories] for key in histories[0]}


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def assert_same_updates(model, history, reference, expected):
    assert_same(model.get_weights(), reference.get_weights())
    assert set(history) == set(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(history[key], values, rtol=1e-7, err_msg=key)


def part_state(model):
    return {key: int(value) for key, value in model.optimizer.state().growing_batch.items()}


# Five updates of 5 of 24 cases: the last goes around, and a round ends.
PARTS = [range(0, 5), range(5, 10), range(10, 15), range(15, 20), [20, 21, 22, 23, 0]]

OPTIONS = {
    "default": {"preconditioner": None},
    "chunk and pieces": {"curvature_batch_size": 4, "micro_batch_size": 3},
    "chunk and pieces larger than the part": {"curvature_batch_size": 7, "micro_batch_size": 6},
}


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in OPTIONS.items()],
)
def test_updates_and_logs_are_those_of_the_cases_used_alone(options):
    model, reference = compiled(fixed(), **options), compiled(**options)
    history = fit(model, X, Y, epochs=5)
    assert_same_updates(model, history, reference, fit_parts(reference, PARTS, X, Y))
    assert history["num_cases"] == [SIZE] * 5
    state = part_state(model)
    assert state["size"] == SIZE and 25 <= state["start"] <= 25 + NUM_CASES - 2 * SIZE


@pytest.mark.slow
def test_weighted_means_are_over_the_cases_used():
    def loss():
        return keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")

    model, reference = compiled(fixed(), loss(), micro_batch_size=2), compiled(loss=loss(), micro_batch_size=2)
    history = fit(model, X, Y, sample_weight=WEIGHT)
    expected = fit(reference, X[:SIZE], Y[:SIZE], sample_weight=WEIGHT[:SIZE])
    assert_same_updates(model, history, reference, expected)


@pytest.mark.slow
def test_loss_and_metrics_are_what_evaluate_gives_of_the_cases_used():
    model = compiled(fixed())
    for part in PARTS:
        part = list(part)
        expected = model.evaluate(X[part], Y[part], sample_weight=WEIGHT[part], verbose=0, return_dict=True)
        history = fit(model, X, Y, sample_weight=WEIGHT)
        assert {key: history[key][0] for key in expected} == pytest.approx(expected, rel=1e-9)


def dataset(batches):
    """A dataset of these batches, whose sizes TensorFlow does not know before they come."""
    specs = tf.TensorSpec((None, 2), tf.float64), tf.TensorSpec((None, 1), tf.float64)
    data = tf.data.Dataset.from_generator(lambda: ((X[part], Y[part]) for part in batches), output_signature=specs)
    return data.apply(tf.data.experimental.assert_cardinality(len(batches)))


@pytest.mark.slow
def test_every_batch_of_a_dataset_gives_a_part():
    model, reference = compiled(fixed(size=3)), compiled()
    history = fit(model, tf.data.Dataset.from_tensor_slices((X, Y)).batch(10), epochs=2)
    # Of batches of 10, 10 and 4 cases: the next three, and all where they are fewer than six. After four updates the next round begins anywhere.
    start = part_state(model)["start"] - 7
    parts = [range(0, 3), range(13, 16), range(20, 24)]
    parts += [range(0, 3), [10 + place % 10 for place in range(start, start + 3)], range(20, 24)]
    assert_same_updates(model, history, reference, fit(reference, dataset(parts), steps_per_epoch=3, epochs=2))


@pytest.mark.slow
def test_nests_are_cut_in_all_their_leaves():
    a, b = keras.Input((2,), name="a"), keras.Input((1,), name="b")

    def net():
        hidden = layers.Concatenate()([layers.Dense(3, "tanh")(a), b])
        return keras.Model(
            {"a": a, "b": b}, {"p": layers.Dense(1, name="p")(hidden), "q": layers.Dense(2, name="q")(a)}
        )

    def nest(part):
        return {"a": X[part], "b": Y[part]}, {"p": Y[part], "q": X[part] ** 2}

    results = []
    for growing, parts in ((fixed(), [slice(None)] * 2), (None, [slice(0, 5), slice(5, 10)])):
        model = HFModel(net())
        model.compile(
            HessianFree(0.1, solver=ConjugateGradient(preconditioner=Identity()), growing_batch=growing, seed=0),
            {"p": "mse", "q": "mse"},
        )
        model.set_weights([normal(*weight.shape, seed=5) for weight in model.weights])
        for part in parts:
            fit(model, *nest(part))
        results.append(model.get_weights())
    assert_same(*results)


# Growth.


@pytest.mark.slow
def test_it_grows_as_the_rule_says_of_losses_that_evaluate_gives():
    rule = {"initial_size": 3, "share": 0.5, "patience": 2, "noise": 0.6}
    model, growing = compiled(GrowingBatch(**rule), damping=1e-3), GrowingBatch(**rule)
    state = growing.initial_state([], [])
    sizes = []
    # Noise alone: what is learned of some cases says nothing of others.
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
        assert part_state(model) == {key: int(value) for key, value in state.items()}
        assert sizes[-1] == len(used)
    assert sizes[0] == 3 and sizes[-1] >= 12
    assert model.num_traces == 1


def test_it_stays_small_while_cases_are_alike():
    x, y = np.tile(X[:6], (10, 1)), np.tile(Y[:6], (10, 1))
    model = compiled(GrowingBatch(initial_size=6, patience=1))
    # Every part holds the same cases.
    assert fit(model, x, y, epochs=6)["num_cases"] == [6] * 6


@pytest.mark.slow
def test_it_is_soon_large_where_one_class_is_rare_and_stays_small_where_none_is():
    x = normal(8000, 6).astype("float32")
    score = 1.2 * x[:, 0] + x[:, 1] * x[:, 2] - 0.6 * x[:, 3] ** 2

    def sizes(rate, class_weight=None):
        net = keras.Sequential([keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(1, "sigmoid")])
        model = compiled(GrowingBatch(), "binary_crossentropy", net, damping=1.0)
        y = (score > np.quantile(score, 1 - rate))[:, None].astype("float32")
        return fit(model, x, y, epochs=10, class_weight=class_weight)["num_cases"]

    # Of 250 cases three are positive.
    assert sizes(0.014, {0: 1.0, 1: 34.0})[-1] >= 4000
    assert sizes(0.5)[-1] <= 500


@pytest.mark.slow
def test_with_a_rate_it_grows_in_every_update_until_it_uses_all_cases():
    model = compiled(GrowingBatch(initial_size=4, patience=100, noise=1e6, rate=0.25))
    sizes = model.fit(X, Y, epochs=7, callbacks=[ConstantDamping()], verbose=0).history["num_cases"]
    # Rounded up: 4, 5, 7, 9, 12, and 15 would be more than half of all.
    assert sizes == [4, 5, 7, 9, 12, 24, 24]
    # It has stopped growing: a larger batch later is not used as a whole at once.
    assert int(model.optimizer.state().growing_batch["size"]) == 15


@pytest.mark.slow
def test_its_size_outlives_fit_and_a_larger_batch():
    model = compiled(GrowingBatch(initial_size=3, share=1, patience=1, noise=10), damping=1e-3)
    sizes = fit(model, X, Y, epochs=5)["num_cases"]
    assert sizes == sorted(sizes) and sizes[-1] == NUM_CASES
    size = part_state(model)["size"]
    assert fit(model, np.tile(X, (9, 1)), np.tile(Y, (9, 1)))["num_cases"] == [size]


@pytest.mark.slow
def test_a_rejected_step_moves_on_and_is_no_miss_nor_are_unseen_cases_that_are_no_numbers():
    x = X.copy()
    x[[2, 12]] = np.nan
    model = compiled(GrowingBatch(initial_size=SIZE, patience=1))
    before = model.get_weights()
    with pytest.warns(UserWarning, match=f"1 of the {SIZE} cases"):
        assert fit(model, x, Y)["step_size"] == [0]
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert part_state(model) == {"size": SIZE, "start": SIZE, "misses": 0}
    # The next part is sound, and the one after it not.
    assert fit(model, x, Y)["step_size"][0] > 0
    assert part_state(model) == {"size": SIZE, "start": 2 * SIZE, "misses": 0}
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.slow
def test_a_step_that_raises_leaves_size_and_start():
    class Rising(layers.Layer):
        """Another function in every call."""

        def build(self, shape):
            self.calls = self.add_weight(initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.value.assign_add(1.0)
            return x * self.calls.value.read_value()

    net = keras.Sequential([keras.Input((2,)), Rising(), layers.Dense(1)])
    model = HFModel(net)
    model.compile(HessianFree(growing_batch=GrowingBatch(initial_size=SIZE, share=1, patience=1)), "mse")
    with pytest.raises(ValueError, match="two different losses"):
        fit(model, X, Y)
    assert part_state(model) == {"size": SIZE, "start": 0, "misses": 0}


@pytest.mark.slow
def test_unseen_cases_leave_no_trace_in_batch_statistics():
    def net():
        return keras.Sequential([keras.Input((2,)), layers.BatchNormalization(), layers.Dense(1)])

    model, reference = compiled(fixed(), net=net()), compiled(net=net())
    fit(model, X, Y, epochs=2)
    fit_parts(reference, PARTS[:2], X, Y)
    # Moving statistics among the weights.
    assert_same(model.get_weights(), reference.get_weights())


# Saving.


@pytest.mark.slow
def test_a_saved_model_goes_on_with_the_same_part(tmp_path):
    model = compiled(GrowingBatch(initial_size=3, share=1, patience=2, noise=10), damping=1e-3)
    fit(model, X, Y, epochs=4)
    state = part_state(model)
    assert state["size"] > 3 and state["start"] >= 12
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert again.optimizer.growing_batch.get_config() == model.optimizer.growing_batch.get_config()
    assert part_state(again) == state
    assert fit(again, X, Y, epochs=2) == fit(model, X, Y, epochs=2)
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# Bad input, and what is said.


@pytest.mark.parametrize("value", [5, "growing", GrowingBatch, LevenbergMarquardt(), True])
def test_what_is_no_growing_batch_is_refused(value):
    with pytest.raises(TypeError, match=r"`growing_batch` must be a `GrowingBatch` object, such as `GrowingBatch\(\)`"):
        HessianFree(growing_batch=value)


@pytest.mark.slow
def test_a_part_that_is_small_on_purpose_gives_no_warning_but_a_small_batch_does():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(NUM_CASES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(compiled(fixed()), data)
    with pytest.warns(UserWarning, match=f"An update on {NUM_CASES} cases fits their noise"):
        fit(compiled(GrowingBatch()), data)
