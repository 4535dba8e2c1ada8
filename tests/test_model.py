"""What HFModel promises: Keras' workflow, honest logs, nothing lost."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import hessian_free

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    EmpiricalFisherDiagonal,
    GaussNewton,
    HessianFree,
    HFModel,
    Identity,
    LevenbergMarquardt,
)
from keras_hf.problem.curvature import Curvature

LOGS = {
    "loss",
    "damping",
    "reduction_ratio",
    "cg_iterations",
    "cg_step",
    "cg_stop",
    "negative_curvature",
    "step_size",
    "gradient_norm",
    "num_cases",
    "converged",
}


# Parts that take half as long to trace as the default ones.
SIMPLE = {"preconditioner": EmpiricalFisherDiagonal(), "growing_batch": None}


def network():
    return keras.Sequential([keras.Input((2,)), layers.Dense(4, "tanh"), layers.Dense(1)])


def compiled(net=None, loss="mse", **arguments):
    model = HFModel(network() if net is None else net)
    metrics = arguments.pop("metrics", None)
    model.compile(optimizer=hessian_free(**{"damping": 0.1, "seed": 0, **arguments}), loss=loss, metrics=metrics)
    return model


def cases(num_cases=300, seed=0):
    x = np.random.default_rng(seed).normal(size=(num_cases, 2)).astype(keras.backend.floatx())
    return x, np.sin(x[:, :1] * x[:, 1:])


def fit(model, x, y, **arguments):
    return model.fit(x, y, **{"verbose": 0, "callbacks": [LevenbergMarquardt()], **arguments})


def all_values(model):
    return [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]


class CountingModel(HFModel):
    """Counts how often its training step is traced."""

    num_traces = 0

    def train_step(self, data):
        type(self).num_traces += 1
        return super().train_step(data)


# The workflow.


def test_fit_lowers_the_loss_and_logs_every_update():
    model = compiled(metrics=["mae"])
    history = fit(model, *cases(), epochs=12, validation_data=cases(seed=1)).history
    assert history["loss"][-1] < 0.35 * history["loss"][0]
    assert set(history) == LOGS | {"mae", "val_loss", "val_mae"}
    assert history["num_cases"] == [300] * 12
    assert int(model.optimizer.iterations) == 12


@pytest.mark.slow
def test_the_loss_logged_is_that_before_the_update():
    x, y = cases()
    model = compiled()
    before = model.evaluate(x, y, batch_size=300, verbose=0)
    first = fit(model, x, y, validation_data=(x, y)).history
    second = fit(model, x, y).history
    assert first["loss"][0] == pytest.approx(before, rel=1e-6)
    assert first["val_loss"][0] == pytest.approx(second["loss"][0], rel=1e-6)


def test_arrays_without_batch_size_are_one_batch_and_with_it_several():
    x, y = cases(520)
    model = compiled(**SIMPLE)
    fit(model, x, y)
    assert int(model.optimizer.iterations) == 1
    fit(model, x, y, batch_size=260)
    assert int(model.optimizer.iterations) == 3
    fit(model, x, y, validation_split=0.1)
    assert int(model.optimizer.iterations) == 4


@pytest.mark.slow
def test_the_order_of_a_whole_batch_is_fixed_by_the_seed():
    seen = []

    class Recording(Curvature):
        def linearize(self, piece):
            tf.py_function(lambda x: seen.append(x.numpy()), [piece._data.x], [])
            return GaussNewton(self.linearization).linearize(piece)

    x, y = cases(20)
    model = compiled(curvature=Recording(), curvature_batch_size=5)
    fit(model, x, y, epochs=8)
    chunks = [tuple(map(tuple, chunk)) for chunk in seen]
    assert len(set(chunks)) == 4 and set(chunks[:4]) == set(chunks[4:8])
    assert {case for chunk in chunks for case in chunk} == set(map(tuple, x))
    assert set(chunks) != {tuple(map(tuple, x[i : i + 5])) for i in (0, 5, 10, 15)}
    seen.clear()
    fit(model, x, y, epochs=4, shuffle=False)
    assert {tuple(map(tuple, chunk)) for chunk in seen} == {tuple(map(tuple, x[i : i + 5])) for i in (0, 5, 10, 15)}


@pytest.mark.slow
def test_pieces_give_the_updates_of_the_whole(float64):
    x, y = cases(100)
    # CG at its end would amplify the order of sums, and backtracking choose among iterates that differ by rounding.
    reference, model = compiled(max_iterations=8), compiled(max_iterations=8, micro_batch_size=30)
    model.set_weights(reference.get_weights())
    fit(reference, x, y, epochs=3)
    fit(model, x, y, epochs=3)
    for one, other in zip(reference.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


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
    model = HFModel(Joining())
    x = form(x[:, :1], x[:, 1:])
    np.testing.assert_array_equal(model(x), model.network(x))
    model.compile(hessian_free(damping=0.1), "mse")
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


@pytest.mark.parametrize("mode", ["subclassed", "unbuilt", pytest.param("functional", marks=pytest.mark.slow)])
def test_any_kind_of_network(mode):
    x = keras.Input((2,))
    net = {
        "subclassed": Subclassed,
        "unbuilt": lambda: keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(1)]),
        "functional": lambda: keras.Model(x, layers.Dense(1)(layers.Dense(4, "tanh")(x))),
    }[mode]()
    history = fit(compiled(net, **SIMPLE), *cases(), epochs=4).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.slow
def test_no_retrace_for_damping_or_a_ragged_last_batch():
    CountingModel.num_traces = 0
    model = CountingModel(network())
    model.compile(optimizer=HessianFree(damping=0.1, micro_batch_size=200), loss="mse")
    fit(model, *cases(700), batch_size=300, epochs=2)
    model.optimizer.damping.assign(3.0)
    fit(model, *cases(690), batch_size=300)
    assert int(model.optimizer.iterations) == 9
    assert CountingModel.num_traces == 1


@pytest.mark.slow
def test_no_retrace_for_another_number_of_cases_another_fit_or_evaluate():
    CountingModel.num_traces = 0
    model = CountingModel(network())
    model.compile(optimizer=HessianFree(damping=0.1, solver=ConjugateGradient(max_iterations=3)), loss="mse")
    fit(model, *cases(300))
    fit(model, *cases(300))
    model.evaluate(*cases(100), verbose=0)
    fit(model, *cases(263), epochs=2)
    fit(model, *cases(520), batch_size=260)
    fit(model, *cases(300), validation_split=0.2)
    fit(model, *cases(300), shuffle=False)
    assert int(model.optimizer.iterations) == 8
    assert CountingModel.num_traces == 1


@pytest.mark.slow
def test_more_cases_than_a_piece_holds_are_all_in_the_products_of_an_update_traced_for_fewer(float64):
    x, y = cases(300)
    arguments = {"damping": 0.1, "seed": 0, "max_iterations": 8, "micro_batch_size": 100, "growing_batch": None}
    reference, model = compiled(**arguments), compiled(**arguments)
    fit(model, x[:90], y[:90])
    model.set_weights(reference.get_weights())
    reference._build_optimizer()
    for variable, other in zip(model.optimizer.variables, reference.optimizer.variables, strict=True):
        variable.assign(other)
    fit(model, x, y), fit(reference, x, y)
    for one, other in zip(all_values(model), all_values(reference), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_train_on_batch_and_eager_make_the_same_update(float64):
    x, y = cases(300)
    reference, eager = compiled(max_iterations=8), compiled()
    eager.compile(
        optimizer=HessianFree(damping=0.1, solver=ConjugateGradient(max_iterations=8), seed=0),
        loss="mse",
        run_eagerly=True,
    )
    eager.set_weights(reference.get_weights())
    logs = reference.train_on_batch(x, y, return_dict=True)
    fit(eager, x, y, shuffle=False)
    assert LOGS <= set(logs)
    for one, other in zip(reference.get_weights(), eager.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_batch_normalization_and_dropout_train_and_keep_the_layers_own_momentum():
    normalization = layers.BatchNormalization(momentum=0.5)
    net = keras.Sequential(
        [keras.Input((2,)), normalization, layers.Dense(8, "tanh"), layers.Dropout(0.1), layers.Dense(1)]
    )
    x, y = cases()
    history = fit(compiled(net), x, y, epochs=3).history
    np.testing.assert_allclose(normalization.moving_mean, x.mean(0), atol=1e-5)
    assert history["step_size"][0] > 0
    assert normalization.momentum == 0.5 and "call" not in vars(normalization)


def normalized(seed=0):
    keras.utils.set_random_seed(seed)
    stack = [layers.Dense(4), layers.BatchNormalization(), layers.Activation("tanh"), layers.Dense(1)]
    return keras.Sequential([keras.Input((2,)), *stack])


@pytest.mark.slow
def test_after_a_step_evaluation_has_the_loss_of_training():
    model, (x, y) = compiled(normalized(), growing_batch=None, preconditioner=Identity()), cases(40)
    losses = []
    for _ in range(3):
        losses.append(fit(model, x, y, shuffle=False).history["loss"][0])
        evaluated = model.evaluate(x, y, verbose=0)
    losses.append(fit(model, x, y, shuffle=False).history["loss"][0])
    assert losses[3] < 0.9 * losses[0]
    np.testing.assert_allclose(evaluated, losses[3], rtol=1e-5)
    # A step that is rejected leaves the statistics, too.
    before = [value.numpy() for value in model.variables]
    with pytest.warns(UserWarning, match="40 of the 40 cases"):
        logs = model.train_on_batch(x, np.full_like(y, np.nan), return_dict=True)
    assert logs["step_size"] == 0
    for value, old in zip(model.variables, before, strict=True):
        if "loss" not in value.path:
            np.testing.assert_array_equal(value.numpy(), old)
    # After the rest of an epoch, what was seen of all cases counts half.
    assert float(model.optimizer.state().statistics_cases) == 40
    assert model.train_on_batch(x[:3], y[:3], return_dict=True)["step_size"] > 0
    assert float(model.optimizer.state().statistics_cases) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraint", "violation"),
    [
        (keras.constraints.NonNeg(), lambda kernel: -kernel.min()),
        (keras.constraints.MaxNorm(0.5), lambda kernel: np.linalg.norm(kernel, axis=0).max() - 0.5),
        (keras.constraints.UnitNorm(), lambda kernel: abs(np.linalg.norm(kernel, axis=0) - 1).max()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_constraints_hold_after_every_update_and_the_loss_falls(constraint, violation):
    hidden = layers.Dense(4, "tanh", kernel_constraint=constraint)
    model = compiled(keras.Sequential([keras.Input((2,)), hidden, layers.Dense(1)]))
    violations = []
    after = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: violations.append(violation(hidden.kernel.numpy()))
    )
    x, y = cases()
    history = fit(model, x, y, epochs=8, callbacks=[LevenbergMarquardt(), after]).history
    assert max(violations) < 1e-5
    # From the first feasible point on, which the first update starts from.
    assert np.diff(history["loss"][1:]).max() <= 0 and history["loss"][-1] < history["loss"][1]


def test_frozen_layers_stay():
    net = network()
    net.layers[0].trainable = False
    before = net.layers[0].get_weights()
    fit(compiled(net, **SIMPLE), *cases(), epochs=2)
    assert all((one == other).all() for one, other in zip(before, net.layers[0].get_weights(), strict=True))


def test_summary_shows_the_layers_of_the_network(capsys):
    compiled().summary()
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
    model = compiled(Subclassed())
    fit(model, x, y, epochs=2)
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert float(again.optimizer.damping) == float(model.optimizer.damping) != 0.1
    assert fit(again, x, y, epochs=2).history == fit(model, x, y, epochs=2).history


@pytest.mark.slow
def test_export_is_the_network_alone_and_serves_without_the_package(tmp_path):
    x, y = cases(5)
    model = compiled()
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
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite_reject_the_step_and_say_so(value):
    x, y = cases()
    net = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(), layers.Dense(4, "tanh"), layers.Dense(1)])
    model = compiled(net)
    fit(model, x, y)
    x[7, 1] = value
    before = model.get_weights()
    with pytest.warns(UserWarning, match="1 of the 300 cases of an update hold numbers that are not finite"):
        history = fit(model, x, y).history
    assert history["step_size"] == [0] and np.isnan(history["reduction_ratio"]).all()
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (model.optimizer.state().solver["warm_start"].numpy() == 0).all()


@pytest.mark.slow
def test_an_exploding_step_is_rejected_and_training_recovers():
    x, y = cases()
    model = compiled(
        keras.Sequential([keras.Input((2,)), layers.Dense(4, "exponential"), layers.Dense(1)]), damping=1e-6
    )
    model.network.layers[0].set_weights([np.full((2, 4), 3.0), np.zeros(4)])
    history = fit(model, x, y, epochs=6).history
    assert np.isfinite(history["loss"]).all() and all(np.isfinite(weight).all() for weight in model.get_weights())
    assert np.diff(history["loss"]).max() <= 0


@pytest.mark.slow
def test_a_step_that_raises_leaves_every_value_bit_equal():
    calls = []

    class Interrupted(Curvature):
        def linearize(self, piece):
            product = GaussNewton(self.linearization).linearize(piece)

            def interrupt():
                calls.append(1)
                if len(calls) > 3:
                    raise MemoryError("no memory left")

            def interrupted(v):
                with tf.control_dependencies([tf.py_function(interrupt, [], [])]):
                    return [tf.identity(part) for part in product(v)]

            return interrupted

    class RaisingInLoss(keras.losses.Loss):
        def call(self, y, y_pred):
            def count():
                calls.append(1)
                if len(calls) > 3:
                    raise MemoryError("no memory left")

            with tf.control_dependencies([tf.py_function(count, [], [])]):
                return tf.reduce_mean((y - y_pred) ** 2, -1)

    # In the products, and at a candidate's weights.
    for model in (compiled(curvature=Interrupted()), compiled(loss=RaisingInLoss(), max_iterations=3)):
        calls.clear()
        x, y = cases()
        model._maybe_symbolic_build(data_batch=(x, y))
        before = all_values(model)
        with pytest.raises(Exception, match="no memory left"):
            fit(model, x, y)
        for one, other in zip(before, all_values(model), strict=True):
            np.testing.assert_array_equal(one, other)


# Bad input.


@pytest.mark.parametrize("network", [None, "mlp", layers.Dense(2)])
def test_a_network_that_is_no_model_is_refused(network):
    with pytest.raises(TypeError, match="`network` must be a `keras.Model`.*Received: network="):
        HFModel(network)


@pytest.mark.parametrize("optimizer", ["adam", keras.optimizers.SGD()])
def test_another_optimizer_is_refused(optimizer):
    with pytest.raises(ValueError, match="trains with `keras_hf.HessianFree`. Received: optimizer=.*model.network"):
        HFModel(network()).compile(optimizer=optimizer, loss="mse")


def test_xla_is_refused():
    with pytest.raises(ValueError, match="cannot train under XLA.*Received: jit_compile=True"):
        HFModel(network()).compile(loss="mse", jit_compile=True)


def test_compile_without_optimizer_means_hessian_free():
    model = HFModel(network())
    model.compile(loss="mse")
    assert isinstance(model.optimizer, HessianFree)


def test_hessian_free_on_a_plain_model_says_what_to_do():
    model = network()
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
        HFModel(network()).compile(loss=loss)


@pytest.mark.slow
def test_fit_without_a_damping_rule_warns_once():
    model = compiled()
    with pytest.warns(UserWarning, match=r"without a damping callback.*LevenbergMarquardt\(\)") as record:
        model.fit(*cases(), verbose=0)
        model.fit(*cases(), verbose=0)
    assert len(record) == 1
    fit(compiled(), *cases(), callbacks=[ConstantDamping()])


@pytest.mark.slow
def test_small_batches_of_a_dataset_warn_once():
    data = tf.data.Dataset.from_tensor_slices(cases(64)).batch(32)
    with pytest.warns(UserWarning, match="update on 32 cases fits their noise") as record:
        compiled().fit(data, epochs=2, verbose=0, callbacks=[LevenbergMarquardt()])
    assert len(record) == 1


def test_overrides_of_the_network_are_not_called_and_that_is_said():
    class Own(keras.Model):
        def train_step(self, data):
            return {}

    with pytest.warns(UserWarning, match="does not call the `train_step` that Own overrides"):
        HFModel(Own())


def test_a_network_without_weights_is_refused():
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Flatten()]))
    with pytest.raises(ValueError, match="at least one trainable weight"):
        fit(model, *cases())


def test_another_backend_is_refused_at_import():
    script = (
        "import keras\n"
        "keras.backend.backend = lambda: 'jax'\n"
        "try:\n    import keras_hf\n"
        "except ImportError as error:\n    assert 'KERAS_BACKEND=tensorflow' in str(error), error\n"
        "else:\n    raise SystemExit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"})
