"""What replicas promise: the numbers of one device."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import worker
from keras import layers
from problems import compiled, model_data, on_objective
from training import assert_same, fit, renewed

from keras_hf import DoubleBackward, GaussNewton, HessianFree, HFModel, LevenbergMarquardt, UpdateRecorder, read_updates
from keras_hf.network.fixed_network import Data

ONE = tf.distribute.get_strategy()


@functools.cache
def two():
    """Two replicas."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def assert_as_one(atol=1e-6, rtol=1e-5, but=(), **run):
    """That two replicas make the run of one device, which has the history returned."""
    (_, one), (_, found) = worker.trained(ONE, **run), worker.trained(two(), **run)
    worker.assert_as_one(found, one, atol, rtol, but)
    return one["history"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Kronecker of 20 cases", "Kronecker of a growing part", "Nystrom", "momentum", "direct"]
)
def test_two_replicas_make_the_updates_of_one_device(name, float64):
    for shuffle in (True, False):
        assert_as_one(**worker.RUNS[name], shuffle=shuffle)


@pytest.mark.slow
def test_two_replicas_form_products_on_the_chunk_of_one_device(float64):
    for shuffle in (True, False):
        assert_as_one(1e-9, 1e-6, **worker.RUNS["chunk"], shuffle=shuffle)


@pytest.mark.slow
def test_a_growing_batch_grows_on_replicas_as_on_one_device(float64):
    history = assert_as_one(**worker.RUNS["growing"])
    assert set(history["num_cases"]) == {13, 26, 103}
    # As they are ordered; replicas with as many cases each, with fewer in the last batch, and without any.
    for run in (
        {"shuffle": False},
        {"num_cases": 50},
        worker.RUNS["batches"],
        worker.RUNS["dataset"],
        worker.RUNS["one case"],
    ):
        assert_as_one(**{**run, "optimizer": "growing"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "reduction"),
    [("Fisher in micro-batches", "sum"), ("Hessian in micro-batches", "mean_with_sample_weight")],
)
def test_two_replicas_form_the_products_and_combine_the_losses_of_one_device(optimizer, reduction, float64):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    # Keras' own validation takes the mean of the sums of replicas.
    assert_as_one(1e-7, but=["val_loss"], optimizer=optimizer, loss=loss, weighted=True)


@pytest.mark.slow
def test_two_replicas_train_record_and_save_as_one_device_in_float32(tmp_path):
    assert_as_one(1e-5, 1e-4, optimizer="diagonal")
    model = renewed(worker.model_of, two(), "diagonal", "mse", False, False, 4)
    callbacks = [UpdateRecorder(tmp_path / "u.jsonl"), LevenbergMarquardt(interval=2)]
    history = fit(model, *worker.cases(), epochs=3, callbacks=callbacks)
    records = read_updates(tmp_path / "u.jsonl")
    assert [record["damping"] for record in records] == history["damping"] and len(set(history["damping"])) > 1
    assert [len(record["trace"]["course"]) - 1 for record in records] == history["cg_iterations"]
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    for one, other in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.slow
def test_two_replicas_gather_rows_where_they_are_fewer_than_weights(float64):
    # One device does not know the size of a dataset's batch before it comes, and forms the matrix of weights.
    run = functools.partial(worker.trained, optimizer="direct")
    for num_cases in (11, 10, 1):
        worker.assert_as_one(run(two(), num_cases=num_cases)[1], run(ONE, num_cases=num_cases, as_dataset=True)[1])


@pytest.mark.slow
def test_replicas_take_exact_steps_on_batches_whose_size_tensorflow_knows(float64):
    model = renewed(worker.model_of, two(), "direct", "mse", False, False, 3)
    batches = tf.data.Dataset.from_tensor_slices(worker.cases(10)).batch(10, drop_remainder=True)
    assert np.diff(fit(model, batches, epochs=3)["loss"]).max() < 0


@pytest.mark.slow
def test_inverses_of_wide_layers_are_those_of_one_device(float64):
    (one, expected), (other, found) = (worker.trained(each, "Kronecker", width=300) for each in (ONE, two()))
    worker.assert_as_one(found, expected)
    states = [model.optimizer.state().solver["preconditioner"] for model in (one, other)]
    assert_same(*states, rtol=1e-5, atol=1e-7)


# The objective of a few cases.


def on_replicas(network, divisions, function):
    """Calls `function(objective)` with the objective of the network on cases that are divided among replicas, and returns its lists of arrays.

    Args:
        network: Callable that makes it.
        divisions: List of the places of the cases of each replica, of which there are a list each.
        function: Callable, traced once.
    """
    with two().scope():
        model = compiled(network())
    x, y = worker.cases(4)
    model_data(model, x, y)

    def on_each(x, y, num_cases):
        # As batches come: of a number of cases that is known no sooner.
        data = Data(x[:num_cases], y[:num_cases], None)
        return on_objective(model, data, function)

    @tf.function(autograph=False)
    def compute(*data):
        return two().run(on_each, data)

    def values(division):
        def of_replica(context):
            places = division[context.replica_id_in_sync_group]
            filled = [*places, *[0] * (len(x) - len(places))]
            return x[filled], y[filled], tf.constant(len(places))

        found = compute(*two().experimental_distribute_values_from_function(of_replica))
        return [[np.asarray(value) for value in two().experimental_local_results(each)] for each in found]

    return [values(division) for division in divisions]


class States(layers.Layer):
    """Counts its calls, in a number, a flag and 64 bits, and averages its inputs."""

    def build(self, shape):
        add = lambda shape, dtype: self.add_weight(shape=shape, dtype=dtype, trainable=False, initializer="zeros")  # noqa: E731
        self.calls, self.is_odd, self.hash = add((), "int32"), add((2,), "bool"), add((2,), "int64")
        self.mean = add(shape[-1:], "float32")

    def call(self, x):
        self.calls.assign(self.calls + 1)
        self.is_odd.assign(keras.ops.logical_not(self.is_odd))
        self.hash.assign(self.hash + (2**62 + 1))
        self.mean.assign(keras.ops.mean(x, 0))
        return x


def test_replicas_count_a_pass_once_average_what_is_a_float_and_take_batch_statistics_of_all_cases_together():
    network = lambda: keras.Sequential([keras.Input((3,)), States(), layers.BatchNormalization(), layers.Dense(2)])  # noqa: E731
    divisions = [[[0, 1, 2], [3]], [[], [0, 1]]]
    found = on_replicas(
        network, divisions, lambda objective: objective.next_states(objective.loss_and_gradient().states, 0.0)
    )
    for division, states in zip(divisions, found, strict=True):
        x = worker.cases(4)[0][sum(division, [])]
        for calls, is_odd, number, mean, *statistics in zip(*states, strict=True):
            assert (calls, is_odd.tolist(), number.tolist()) == (1, [True, True], [2**62 + 1] * 2)
            np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
            assert_same(statistics, [x.mean(0), x.var(0)], rtol=1e-5)


@pytest.mark.slow
def test_a_replica_without_cases_adds_nothing():
    def network():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization(), layers.Dense(2)])

    def function(objective):
        at_start, v = objective.loss_and_gradient(), tf.ones([objective.num_weights])
        product = objective.product(GaussNewton(DoubleBackward()))
        return [at_start.loss, at_start.gradient, *at_start.states, product(v), product.error(v)]

    # Twice the same cases have the means of once.
    together, *apart = on_replicas(network, [[[0, 1, 2]] * 2, [[0, 1, 2], []], [[], [0, 1, 2]]], function)
    for *found, error in apart:
        assert error[0].max() < 1e-4
        assert_same([each[0] for each in found], [each[0] for each in together[:-1]], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_gathered_rows_are_those_of_all_replicas(float64):
    network = lambda: keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])  # noqa: E731

    def of_both(objective):
        objective.__dict__["_most_cases"] = 5
        divided, rows = objective.rows, objective.rows.gathered()
        u, v = rows.residuals, tf.range(objective.num_weights, dtype=tf.float64)
        whole = tf.matmul(rows.jacobian, rows.jacobian, transpose_a=True)

        def norms(rows):
            combined = rows.combined([2.0, 3.0], [rows.residuals, rows.second_derivative(v)])
            return rows.norm(combined), rows.norm(rows.plus_push(rows.residuals, v))

        differences = [whole - of_parts for whole, of_parts in zip(norms(rows), norms(divided), strict=True)]
        return [rows.jacobian, divided.gram() - whole, rows.pull(u) - divided.pull(divided.residuals), *differences]

    ((jacobian, *differences),) = on_replicas(network, [[[0, 1, 2], [3]]], of_both)
    # Rows of the fifth case, which is not there, are zero.
    assert jacobian[0].shape == (10, 26) and not jacobian[0][8:].any() and jacobian[0][:8].any(1).all()
    for difference in differences:
        np.testing.assert_allclose(difference, np.zeros_like(difference), atol=1e-10)


@pytest.mark.slow
def test_replicas_share_out_what_is_computed_once_for_all():
    inputs = [(tf.fill([3, 3], float(i)), tf.constant(10.0 * i)) for i in range(1, 5)]

    def shared(objective):
        return objective.shared_out(lambda a, b: a + b, inputs, [1.0, 8.0, 4.0, 2.0])

    network = lambda: keras.Sequential([keras.Input((3,)), layers.Dense(2)])  # noqa: E731
    (found,) = on_replicas(network, [[[0], [1]]], shared)
    for i, values in enumerate(found, 1):
        assert all((value == 11.0 * i).all() for value in values)


def test_a_layer_that_sums_over_replicas_is_refused_by_name():
    with two().scope():
        norm = layers.BatchNormalization(synchronized=True, name="norm")
        model = HFModel(keras.Sequential([keras.Input((3,)), norm, layers.Dense(2)]))
        model.compile(HessianFree(0.1), loss="mse")
    with pytest.raises(ValueError, match="Received: synchronized=True in norm"):
        fit(model, *worker.cases(12))
