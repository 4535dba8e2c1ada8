"""What replicas promise: the numbers of one device."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import compiled, model_data
from worker import OPTIMIZERS

from keras_hf import (
    ConjugateGradient,
    DoubleBackward,
    EmpiricalFisher,
    FiniteDifferenceHessian,
    GaussNewton,
    GrowingBatch,
    HessianFree,
    HFModel,
    KroneckerFactored,
    LevenbergMarquardt,
    UpdateRecorder,
    read_updates,
)
from keras_hf.problem.fixed_network import Data


def cases(num_cases):
    rng = np.random.default_rng(0)
    floatx = keras.backend.floatx()
    return rng.normal(size=(num_cases, 3)).astype(floatx), rng.normal(size=(num_cases, 2)).astype(floatx)


def untrained(strategy, loss="mse", optimizer=None):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        l2 = keras.regularizers.L2(1e-2)
        stack = [layers.Dense(4, "tanh", kernel_regularizer=l2), layers.Dense(2)]
        model = HFModel(keras.Sequential([keras.Input((3,)), *stack]))
        # Kronecker factors draw signs.
        fixed = {"damping": 0.1, "seed": 1, **OPTIMIZERS["diagonal"]}
        model.compile(HessianFree(**{**fixed, **(optimizer or {})}), loss=loss, metrics=["mae"])
    return model


def trained(strategy, x, y, loss="mse", optimizer=None, **arguments):
    model = untrained(strategy, loss, optimizer)
    history = model.fit(
        x, y, epochs=3, callbacks=[LevenbergMarquardt()], verbose=0, validation_data=(x, y), **arguments
    )
    return model, history.history


def both(num_cases, **arguments):
    """The model trained on one device and on two replicas, and their histories."""
    strategies = tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    (one, history), (two, two_history) = (trained(strategy, *cases(num_cases), **arguments) for strategy in strategies)
    return one.get_weights(), history, two.get_weights(), two_history


@pytest.mark.slow
@pytest.mark.parametrize("num_cases", [50, 51])
def test_two_replicas_give_the_weights_of_one_device(num_cases, float64):
    one, history, two, two_history = both(num_cases)
    for key in history:
        np.testing.assert_allclose(history[key], two_history[key], rtol=1e-6, err_msg=key)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.slow
def test_two_replicas_give_the_weights_of_one_device_in_float32():
    one, _, two, _ = both(51)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
@pytest.mark.slow
def test_two_replicas_combine_sums_and_weighted_means(reduction, float64):
    weight = np.random.default_rng(1).uniform(size=51)
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    one, _, two, _ = both(51, loss=loss, sample_weight=weight, optimizer={"micro_batch_size": 20})
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("curvature", [EmpiricalFisher(), FiniteDifferenceHessian()])
@pytest.mark.slow
def test_two_replicas_form_the_products_of_one_device(curvature, float64):
    one, _, two, _ = both(51, optimizer={"curvature": curvature, "micro_batch_size": 20})
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [True, False])
def test_two_replicas_form_products_on_the_chunk_of_one_device(shuffle, float64):
    one, _, two, _ = both(51, optimizer=OPTIMIZERS["chunk"], shuffle=shuffle)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.slow
def test_two_replicas_are_recorded_and_saved_as_one_device_is(tmp_path):
    model = untrained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
    callbacks = [UpdateRecorder(tmp_path / "u.jsonl"), LevenbergMarquardt(interval=2)]
    history = model.fit(*cases(51), epochs=3, callbacks=callbacks, verbose=0).history
    records = read_updates(tmp_path / "u.jsonl")
    assert [record["damping"] for record in records] == history["damping"] and len(set(history["damping"])) > 1
    assert [len(record["trace"]["course"]) - 1 for record in records] == history["cg_iterations"]
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    for one, other in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("diagonal", "chunk")])
@pytest.mark.parametrize("shuffle", [True, False])
def test_two_replicas_use_the_cases_and_numbers_of_one_device(name, shuffle, float64):
    one, history, two, two_history = both(51, optimizer=OPTIMIZERS[name], shuffle=shuffle)
    assert history["num_cases"] == two_history["num_cases"]
    np.testing.assert_allclose(history["loss"], two_history["loss"], rtol=1e-6)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_replicas_use_all_cases_where_the_part_is_more_than_half_of_the_batch_of_all_of_them():
    # 26 and 25 cases: 13 are half of the ones, and more than half of the others.
    model = untrained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), optimizer={"growing_batch": GrowingBatch(26)})
    assert model.fit(*cases(51), callbacks=[LevenbergMarquardt()], verbose=0).history["num_cases"] == [51]


@pytest.mark.slow
def test_a_growing_batch_grows_on_replicas(float64):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    # Of noise nothing generalises.
    growing = {"growing_batch": GrowingBatch(initial_size=6, share=1, patience=1, noise=10), "damping": 1e-3}
    _, history = trained(strategy, *cases(50), optimizer=growing)
    assert history["num_cases"][0] == 6 and 12 <= history["num_cases"][-1] <= 24


@pytest.mark.slow
@pytest.mark.parametrize("num_cases", [11, 10, 1])
def test_two_replicas_gather_rows_where_they_are_fewer_than_weights(num_cases, float64):
    one, history, two, two_history = both(num_cases, optimizer=OPTIMIZERS["direct"])
    np.testing.assert_allclose(history["loss"], two_history["loss"], rtol=1e-6, atol=1e-12)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_replicas_take_exact_steps_on_batches_whose_size_tensorflow_knows(float64):
    model = untrained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), optimizer=OPTIMIZERS["direct"])
    batches = tf.data.Dataset.from_tensor_slices(cases(10)).batch(10, drop_remainder=True)
    losses = model.fit(batches, epochs=3, callbacks=[LevenbergMarquardt()], verbose=0).history["loss"]
    assert np.diff(losses).max() < 0


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

    jacobian, *differences = on_replicas(network, [[0, 1, 2], [3]], of_both)
    # Rows of the fifth case, which is not there, are zero.
    assert jacobian[0].shape == (10, 26) and not jacobian[0][8:].any() and jacobian[0][:8].any(1).all()
    for difference in differences:
        np.testing.assert_allclose(difference, np.zeros_like(difference), atol=1e-10)


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


def on_replicas(network, parts, function):
    """Calls `function(objective)` with the objective of the network on the cases in `parts`, each a replica's, and returns its lists of arrays."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = compiled(network())
    x, y = cases(1 + max(max(part, default=0) for part in parts))
    model_data(model, x, y)

    def of_replica(context):
        places = parts[context.replica_id_in_sync_group]
        return Data(x[places], y[places], None)

    data = strategy.experimental_distribute_values_from_function(of_replica)

    def on_each(data):
        # As batches come: of a number of cases that is known no sooner.
        x, y = (tf.compat.v1.placeholder_with_default(leaf, [None, leaf.shape[1]]) for leaf in data[:2])
        return model._with_objective(Data(x, y, None), lambda objective, _: function(objective))

    @tf.function(autograph=False)
    def compute():
        return strategy.run(on_each, (data,))

    return [[np.asarray(value) for value in strategy.experimental_local_results(found)] for found in compute()]


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3]], [[], [0, 1]]])
def test_replicas_count_a_pass_once_and_average_what_is_a_float(parts):
    network = lambda: keras.Sequential([keras.Input((3,)), States(), layers.Dense(2)])  # noqa: E731
    found = on_replicas(network, parts, lambda objective: objective.loss_and_gradient().states)
    for calls, is_odd, number, mean in zip(*found, strict=True):
        assert (calls, is_odd.tolist(), number.tolist()) == (1, [True, True], [2**62 + 1] * 2)
        np.testing.assert_allclose(mean, cases(sum(map(len, parts)))[0].mean(0), rtol=1e-6)


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3]], [[], [0, 1]]])
def test_replicas_take_batch_statistics_of_all_cases_together(parts):
    network = lambda: keras.Sequential([keras.Input((3,)), layers.BatchNormalization(), layers.Dense(2)])  # noqa: E731
    found = on_replicas(
        network, parts, lambda objective: objective.next_states(objective.loss_and_gradient().states, 0.0)
    )
    x = cases(sum(map(len, parts)))[0]
    for means, variances in zip(*found, strict=True):
        np.testing.assert_allclose(means, x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(variances, x.var(0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [[[0, 1, 2], []], [[], [0, 1, 2]]])
def test_a_replica_without_cases_adds_nothing(parts):
    def network():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization(), layers.Dense(2)])

    def function(objective):
        at_start, v = objective.loss_and_gradient(), tf.ones([objective.num_weights])
        product = objective.product(GaussNewton(DoubleBackward()))
        return [at_start.loss, at_start.gradient, *at_start.states, product(v), product.errors(v)]

    *found, error = on_replicas(network, parts, function)
    *together, _ = on_replicas(network, [[0, 1, 2]] * 2, function)
    assert error[0].max() < 1e-4
    for one, both in zip(found, together, strict=True):
        # Twice the same cases have the means of once.
        np.testing.assert_allclose(one[0], both[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_replicas_share_out_what_is_computed_once_for_all():
    inputs = [(tf.fill([3, 3], float(i)), tf.constant(10.0 * i)) for i in range(1, 5)]

    def shared(objective):
        return objective.shared_out(lambda a, b: a + b, inputs, [1.0, 8.0, 4.0, 2.0])

    network = lambda: keras.Sequential([keras.Input((3,)), layers.Dense(2)])  # noqa: E731
    found = on_replicas(network, [[0], [1]], shared)
    for i, values in enumerate(found, 1):
        assert all((value == 11.0 * i).all() for value in values)


@pytest.mark.slow
def test_inverses_of_wide_layers_are_those_of_one_device(float64):
    def network(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = HFModel(keras.Sequential([keras.Input((3,)), layers.Dense(300, "tanh"), layers.Dense(2)]))
            solver = ConjugateGradient(KroneckerFactored(interval=2), max_iterations=5)
            model.compile(HessianFree(0.1, solver, growing_batch=None, seed=1), loss="mse")
        x, y = cases(51)
        model.fit(x, y, epochs=3, callbacks=[LevenbergMarquardt()], verbose=0)
        return model

    one, two = (
        network(strategy)
        for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
    )
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)
    states = [model.optimizer.state().solver["preconditioner"] for model in (one, two)]
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_layer_that_sums_over_replicas_is_refused_by_name():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        norm = layers.BatchNormalization(synchronized=True, name="norm")
        model = HFModel(keras.Sequential([keras.Input((3,)), norm, layers.Dense(2)]))
        model.compile(HessianFree(0.1), loss="mse")
    with pytest.raises(ValueError, match="Received: synchronized=True in norm"):
        model.fit(*cases(12), callbacks=[LevenbergMarquardt()], verbose=0)
