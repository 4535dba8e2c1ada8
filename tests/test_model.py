"""What HFModel promises: Keras' workflow, honest logs, nothing lost."""

import os
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from training import all_values, assert_equal, assert_same, fit, renewed, set_weights, small_network, trainable

import keras_hf
from keras_hf import ConstantDamping, DirectSolver, GaussNewton, HessianFree, HFModel, Identity, LevenbergMarquardt
from keras_hf.differentiation.curvature import Curvature

LOGS = {"loss", "update_loss", "damping", "reduction_ratio", "step_size", "gradient_norm", "num_cases", "converged"}
LOGS |= {"cg_iterations", "cg_step", "cg_stop", "negative_curvature"}
# Parts that take half as long to trace as the default ones.
SIMPLE = {"preconditioner": Identity(), "growing_batch": None}


def cases(num_cases=300, seed=0):
    x = np.random.default_rng(seed).normal(size=(num_cases, 2)).astype(keras.backend.floatx())
    return x, np.sin(x[:, :1] * x[:, 1:])


def default():
    """A model with the default parts, which is traced for any number of cases."""
    model = trainable(compile_arguments={"metrics": ["mae"]})
    set_weights(model)
    return model


# The workflow.


def test_fit_lowers_the_loss_and_logs_that_before_every_update():
    model, (x, y) = renewed(default), cases()
    before = model.evaluate(x, y, batch_size=300, verbose=0, return_dict=True)["loss"]
    history = fit(model, x, y, epochs=12, validation_data=(x, y), shuffle=True)
    assert history["loss"][-1] < 0.35 * history["loss"][0]
    assert set(history) == LOGS | {"mae", "val_loss", "val_mae"}
    assert history["num_cases"] == [300] * 12
    assert int(model.optimizer.iterations) == 12
    # In float32, summed in another order.
    assert history["loss"] == pytest.approx([before, *history["val_loss"][:-1]], rel=1e-5)


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_of_an_epoch_loss_and_metrics_are_means_over_its_cases_and_the_rest_is_of_its_last_update(steps_per_execution):
    model, updates = (
        trainable(compile_arguments={"metrics": ["mse"], "steps_per_execution": steps_per_execution}, **SIMPLE),
        [],
    )
    model.after_update = lambda report, num_nonfinite: updates.append(report.logs)
    # Batches of 33, 33 and 34 cases.
    history = fit(model, *cases(100), batch_size=34, epochs=2, callbacks=[ConstantDamping()])
    for epoch in range(2):
        *_, last = logs = updates[3 * epoch : 3 * epoch + 3]
        means = np.average([log["update_loss"] for log in logs], weights=[log["num_cases"] for log in logs])
        assert history["loss"][epoch] == pytest.approx(history["mse"][epoch], rel=1e-5)
        assert history["loss"][epoch] == pytest.approx(means, rel=1e-6)
        assert history["loss"][epoch] != pytest.approx(float(last["update_loss"]), rel=1e-3)
        for key in history.keys() - {"loss", "mse"}:
            np.testing.assert_equal(history[key][epoch], np.asarray(last[key]), err_msg=key)


@pytest.mark.slow
def test_arrays_without_batch_size_are_one_batch_with_it_several_and_no_size_is_traced_anew():
    model = renewed(default)
    # Several batches are compared with each other, one is not.
    for batch_size in (None, 150, None):
        fit(model, *cases(), batch_size=batch_size)
    num_traces = model.num_traces

    def num_updates(num_cases, **arguments):
        before = int(model.optimizer.iterations)
        fit(model, *cases(num_cases), **arguments)
        return int(model.optimizer.iterations) - before

    assert num_updates(300) == 1
    model.evaluate(*cases(100), verbose=0)
    assert num_updates(263, epochs=2) == 2
    assert num_updates(520, batch_size=260) == 2
    assert num_updates(520, validation_split=0.1) == 1
    assert num_updates(300, shuffle=True) == 1
    # The last batch is smaller.
    assert num_updates(700, batch_size=300, epochs=2) == 6
    model.optimizer.damping.assign(3.0)
    assert num_updates(690, batch_size=300) == 3
    assert model.num_traces == num_traces


@pytest.mark.slow
def test_the_order_of_a_whole_batch_is_fixed_by_the_seed():
    seen = []

    class Recording(Curvature):
        def linearize(self, micro_batch):
            tf.py_function(lambda x: seen.append(x.numpy()), [micro_batch._data.x], [])
            return GaussNewton(self.linearization).linearize(micro_batch)

    x, y = cases(20)
    model = trainable(curvature=Recording(), curvature_batch_size=5, **SIMPLE)
    fit(model, x, y, epochs=8, shuffle=True)
    # The first is that of the check.
    chunks = [tuple(map(tuple, chunk)) for chunk in seen[1:]]
    assert len(set(chunks)) == 4 and set(chunks[:4]) == set(chunks[4:8])
    assert {case for chunk in chunks for case in chunk} == set(map(tuple, x))
    assert set(chunks) != {tuple(map(tuple, x[i : i + 5])) for i in (0, 5, 10, 15)}
    seen.clear()
    fit(model, x, y, epochs=4)
    assert {tuple(map(tuple, chunk)) for chunk in seen} == {tuple(map(tuple, x[i : i + 5])) for i in (0, 5, 10, 15)}


def limited(micro_batch_size=None, run_eagerly=False):
    # CG at its end would amplify the order of sums, and backtracking choose among iterates that differ by rounding.
    settings = {"max_iterations": 8, "micro_batch_size": micro_batch_size}
    model = trainable(compile_arguments={"run_eagerly": run_eagerly}, **settings)
    set_weights(model)
    return model


@pytest.mark.slow
def test_micro_batches_give_the_updates_of_the_whole_though_an_update_was_traced_for_one_micro_batch(float64):
    x, y = cases(400)
    reference, model = renewed(limited), renewed(limited, 90)
    fit(model, x[:80], y[:80])
    model = renewed(limited, 90)
    # Batches of 260 and 140 cases.
    for each in (reference, model):
        fit(each, x, y, batch_size=260, epochs=2)
    assert_same(model.get_weights(), reference.get_weights())
    assert model.num_traces == 2


@pytest.mark.slow
def test_train_on_batch_returns_what_keras_returns_and_takes_the_solver_of_fit(float64):
    x = np.linspace(-1, 1, 16)[:, None]
    for metrics, returned in (None, ()), (["mae"], (2,)):
        model = HFModel(keras.Sequential([keras.Input((1,)), layers.Dense(1)]))
        model.compile(loss="mse", metrics=metrics)
        expected = model.evaluate(x, 3 * x, verbose=0)
        found = model.train_on_batch(x, 3 * x)
        assert np.shape(found) == returned
        np.testing.assert_allclose(found, expected)
        assert isinstance(model.solver, DirectSolver)


@pytest.mark.slow
def test_train_on_batch_and_eager_make_the_same_update(float64):
    x, y = cases()
    reference, eager = renewed(limited), limited(run_eagerly=True)
    logs = reference.train_on_batch(x, y, return_dict=True)
    fit(eager, x, y)
    assert LOGS <= set(logs)
    assert_same(reference.get_weights(), eager.get_weights())


class Joining(keras.Model):
    """Takes several inputs, and no mask."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, inputs):
        return self.dense(keras.ops.concatenate(keras.tree.flatten(inputs), -1))


class Masking(Joining):
    """Takes a mask as well, and remembers it."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, inputs, mask=None):
        self.seen = mask
        return super().call(inputs)


@pytest.mark.parametrize("form", [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}])
def test_a_subclassed_network_of_several_inputs_needs_no_mask(form):
    x, y = cases(20)
    model = trainable(Joining())
    x = form(x[:, :1], x[:, 1:])
    np.testing.assert_array_equal(model(x), model.network(x))
    # Built from cases, as `fit` does.
    assert np.isfinite(model.evaluate(x, y, verbose=0))


def test_masks_of_several_inputs_reach_a_network_that_takes_them():
    a, b = (keras.ops.ones((4, 3)) for _ in range(2))
    mask = keras.ops.ones((4,), "bool")
    model = HFModel(Masking())
    model.call((a, b), mask=(mask, None))
    assert model.network.seen[0] is mask and model.network.seen[1] is None
    model.call((a, b), mask=(None, None))
    assert all(leaf is None for leaf in keras.tree.flatten(model.network.seen))


@pytest.mark.parametrize(
    "make", [lambda: Subclassed(), lambda: keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(1)])]
)
def test_a_network_that_is_not_built_trains(make):
    history = fit(trainable(make(), **SIMPLE), *cases(), epochs=3)
    assert history["loss"][-1] < history["loss"][0]


def normalized():
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(4), layers.BatchNormalization(), layers.Activation("tanh"), layers.Dense(1)]
    return trainable(keras.Sequential([keras.Input((2,)), layers.BatchNormalization(momentum=0.5), *stack]))


@pytest.mark.slow
def test_after_a_step_under_batch_normalization_evaluation_has_the_loss_of_training():
    model, (x, y) = renewed(normalized), cases(40)
    losses = []
    for _ in range(3):
        losses += fit(model, x, y)["loss"]
        evaluated = model.evaluate(x, y, verbose=0)
    losses += fit(model, x, y)["loss"]
    assert losses[3] < 0.9 * losses[0]
    np.testing.assert_allclose(evaluated, losses[3], rtol=1e-5)
    # The statistics are those at the weights of the last step, and the layer's own momentum is as it was.
    normalization = model.network.layers[0]
    np.testing.assert_allclose(normalization.moving_mean, x.mean(0), atol=1e-5)
    assert normalization.momentum == 0.5 and "call" not in vars(normalization)
    # A step that is rejected leaves the statistics, too.
    before = model.get_weights()
    with pytest.warns(UserWarning, match="40 of the cases of the batch"):
        assert fit(model, x, np.full_like(y, np.nan))["step_size"] == [0]
    assert_equal(model.get_weights(), before)
    # After the rest of an epoch, what was seen of all cases counts half.
    assert float(model.optimizer.state().statistics_cases) == 40
    assert fit(model, x[:3], y[:3])["step_size"][0] > 0
    assert float(model.optimizer.state().statistics_cases) == 20


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite_reject_the_step_and_say_so(value):
    model, (x, y) = renewed(normalized), cases(40)
    fit(model, x, y)
    x[7, 1] = value
    before = model.get_weights()
    with pytest.warns(UserWarning, match="1 of the cases of the batch hold numbers that are not finite"):
        history = fit(model, x, y)
    assert history["step_size"] == [0] and np.isnan(history["reduction_ratio"]).all()
    assert_equal(before, model.get_weights())
    assert (model.optimizer.state().solver["warm_start"].numpy() == 0).all()


# By how much a kernel violates each.
CONSTRAINTS = {
    keras.constraints.NonNeg(): lambda kernel: -kernel.min(),
    keras.constraints.MaxNorm(0.5): lambda kernel: np.linalg.norm(kernel, axis=0).max() - 0.5,
    keras.constraints.UnitNorm(): lambda kernel: abs(np.linalg.norm(kernel, axis=0) - 1).max(),
}


@pytest.mark.slow
def test_constraints_hold_after_every_update_and_the_loss_falls():
    hidden = [layers.Dense(4, "tanh", kernel_constraint=constraint) for constraint in CONSTRAINTS]
    inputs = keras.Input((2,))
    network = keras.Model(inputs, layers.Dense(1)(layers.Concatenate()([layer(inputs) for layer in hidden])))
    violations = []

    def look(batch, logs):
        kernels = [layer.kernel.numpy() for layer in hidden]
        violations.extend(violation(kernel) for violation, kernel in zip(CONSTRAINTS.values(), kernels, strict=True))

    after = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    history = fit(trainable(network), *cases(), epochs=8, callbacks=[LevenbergMarquardt(), after])
    assert len(violations) == 24 and max(violations) < 1e-5
    # From the first feasible point on, which the first update starts from.
    assert np.diff(history["loss"][1:]).max() <= 0 and history["loss"][-1] < history["loss"][1]


def test_summary_shows_the_layers_of_the_network(capsys):
    trainable().summary()
    assert "dense" in capsys.readouterr().out


# Saving.


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A network that Keras cannot look into."""

    def __init__(self, width=4, **kwargs):
        super().__init__(**kwargs)
        self.width, self.hidden, self.out = width, layers.Dense(width, "tanh"), layers.Dense(1)

    def call(self, x):
        return self.out(self.hidden(x))

    def get_config(self):
        return {"width": self.width}


@pytest.mark.slow
def test_a_saved_subclassed_network_goes_on_too(tmp_path):
    x, y = cases()
    model = trainable(Subclassed(), **SIMPLE)
    fit(model, x, y, epochs=2)
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert float(again.optimizer.damping) == float(model.optimizer.damping) != 0.1
    assert fit(again, x, y, epochs=2) == fit(model, x, y, epochs=2)


@pytest.mark.slow
def test_export_is_the_network_alone_and_serves_without_the_package(tmp_path):
    x, y = cases(5)
    model = trainable(**SIMPLE)
    fit(model, x, y)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", model.predict(x, verbose=0))
    model.export(tmp_path / "serving", verbose=False)
    script = (
        "import sys, numpy as np, tensorflow as tf\n"
        "served = tf.saved_model.load('serving')\n"
        "found = served.serve(np.load('x.npy'))\n"
        "np.testing.assert_allclose(found, np.load('y.npy'), rtol=1e-5, atol=1e-6)\n"
        "assert 'keras_hf' not in sys.modules\n"
        "assert len(served.variables) == 4, served.variables\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    )


# Nothing is lost.


@pytest.mark.slow
def test_an_exploding_step_is_rejected_and_training_recovers():
    network = keras.Sequential([keras.Input((2,)), layers.Dense(4, "exponential"), layers.Dense(1)])
    model = trainable(network, damping=1e-6, **SIMPLE)
    network.layers[0].set_weights([np.full((2, 4), 3.0), np.zeros(4)])
    history = fit(model, *cases(), epochs=6)
    assert np.isfinite(history["loss"]).all() and all(np.isfinite(weight).all() for weight in model.get_weights())
    assert np.diff(history["loss"]).max() <= 0


@pytest.mark.slow
def test_a_step_that_raises_leaves_every_value_bit_equal():
    raising, num_calls = None, 0

    def interrupt(place):
        """Control dependencies that raise an error in the fourth call at the place that is to raise it."""

        def count():
            nonlocal num_calls
            num_calls += place == raising
            if num_calls > 3:
                raise MemoryError("no memory left")

        return tf.control_dependencies([tf.py_function(count, [], [])])

    class Interrupted(Curvature):
        def linearize(self, micro_batch):
            product = GaussNewton(self.linearization).linearize(micro_batch)

            def interrupted(v):
                with interrupt("product"):
                    return [tf.identity(part) for part in product(v)]

            return interrupted

    def loss(y, y_pred):
        with interrupt("loss"):
            return tf.reduce_mean((y - y_pred) ** 2, -1)

    model = trainable(loss=loss, curvature=Interrupted(), preconditioner=Identity(), max_iterations=3)
    before = all_values(model)
    # In the products, and at a candidate's weights.
    for place in ("product", "loss"):
        raising, num_calls = place, 0
        with pytest.raises(Exception, match="no memory left"):
            fit(model, *cases())
        assert num_calls > 3
        assert_equal(before, all_values(model))


# Bad input.


@pytest.mark.parametrize("network", [None, "mlp", layers.Dense(2)])
def test_a_network_that_is_no_model_is_refused(network):
    with pytest.raises(TypeError, match="`network` must be a `keras.Model`.*Received: network="):
        HFModel(network)


def test_a_network_without_a_call_is_refused_with_the_place_of_its_loss():
    class OfTrainStep(keras.Model):
        def train_step(self, data):
            return {}

    with pytest.raises(ValueError, match="OfTrainStep without one. Give it a `call`.*`HFModel.compute_loss`"):
        HFModel(OfTrainStep())


@pytest.mark.parametrize("optimizer", ["adam", keras.optimizers.SGD()])
def test_another_optimizer_is_refused(optimizer):
    with pytest.raises(ValueError, match="trains with `keras_hf.HessianFree`. Received: optimizer=.*model.network"):
        HFModel(small_network()).compile(optimizer=optimizer, loss="mse")


def test_xla_is_refused():
    with pytest.raises(ValueError, match="cannot train under XLA.*Received: jit_compile=True"):
        HFModel(small_network()).compile(loss="mse", jit_compile=True)


def test_compile_without_optimizer_means_hessian_free():
    model = HFModel(small_network())
    model.compile(loss="mse")
    assert isinstance(model.optimizer, HessianFree)


def test_hessian_free_on_a_plain_model_says_what_to_do():
    model = small_network()
    model.compile(optimizer=HessianFree(), loss="mse")
    with pytest.raises(ValueError, match=r"through `keras_hf.HFModel`.*Wrap the model"):
        model.fit(*cases(), verbose=0)


@pytest.mark.parametrize(
    "loss, cousin",
    [
        ("mae", "Huber"),
        (keras.losses.MeanAbsoluteError(), "Huber"),
        (keras.losses.Hinge(), "SquaredHinge"),
        ("hinge", "SquaredHinge"),
    ],
)
def test_a_loss_without_curvature_is_said_with_its_smooth_cousin(loss, cousin):
    with pytest.warns(UserWarning, match=f"no curvature.*{cousin}"):
        HFModel(small_network()).compile(loss=loss)


def test_fit_without_a_damping_rule_adapts_the_damping_as_levenberg_marquardt_does_and_with_one_by_that_alone():
    dampings = {}
    for rules in ((), (LevenbergMarquardt(),), (ConstantDamping(),)):
        model = renewed(default)
        fit(model, *cases(), callbacks=[*rules, keras.callbacks.LambdaCallback()], epochs=4)
        dampings[rules] = float(model.optimizer.damping.numpy())
    by_default, by_the_rule, constant = dampings.values()
    assert by_default == by_the_rule != constant

    # Which may run in another thread.
    model = renewed(default)
    damping = float(model.optimizer.damping.numpy())
    fit(model, *cases(), callbacks=keras.callbacks.CallbackList([], add_history=True, model=model), epochs=4)
    assert float(model.optimizer.damping.numpy()) == damping


def test_overrides_of_the_network_are_not_called_and_that_is_said():
    class Own(keras.Model):
        def train_step(self, data):
            return {}

        def call(self, x):
            return x

    with pytest.warns(UserWarning, match="does not call the `train_step` that Own overrides"):
        HFModel(Own())


def test_a_network_without_weights_is_refused():
    model = trainable(keras.Sequential([keras.Input((2,)), layers.Flatten()]))
    with pytest.raises(ValueError, match="at least one trainable weight"):
        fit(model, *cases())


def test_another_backend_is_refused_at_import(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="KERAS_BACKEND=tensorflow"):
        runpy.run_path(keras_hf.__file__)
