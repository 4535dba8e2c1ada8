"""What keeps wrong products from going unseen: the self-check, the guard of forward accumulation, and the look at a loss twice."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from problems import compiled, hessian_free, inputs, make_model, set_up
from training import assert_equal, fit, normal

from keras_hf import (
    DoubleBackward,
    FiniteDifferenceHessian,
    ForwardAccumulation,
    GaussNewton,
    Hessian,
    Identity,
    RelativeProgress,
)
from keras_hf.network import structure
from keras_hf.training.product_check import BothWays, Errors, judged, report

X, TARGETS = inputs().astype("float32"), normal(15, 3, seed=3)
IMAGES = normal(15, 4, 4, 2, seed=3, dtype="float32")


def stacked(*stack, curvature=None, name=None):
    """A compiled model with a last layer of 3 outputs."""
    network = keras.Sequential([*stack, layers.Dense(3)], name=name)
    optimizer = hessian_free(preconditioner=Identity(), curvature=curvature, growing_batch=None, seed=0)
    return compiled(network, optimizer=optimizer)


class Nested(layers.Layer):
    """Reads its weight in a nested function, where forward accumulation loses tangents."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return tf.function(lambda x: tf.tanh(x @ self.kernel))(x)


class Recomputing(Nested):
    """Computes again what its gradient needs."""

    def call(self, x):
        return tf.recompute_grad(lambda x: tf.tanh(x @ self.kernel))(x)


@pytest.fixture
def no_structural_guard(monkeypatch):
    """Takes away the guard that looks at the traced graph, so that the one that looks at numbers is alone."""
    monkeypatch.setattr(structure, "_NESTING", structure.re.compile("^nothing$"))


def test_right_products_pass_every_check(float64, capsys):
    checks = make_model().check_products(inputs(), TARGETS)
    assert len(checks) == 7
    assert all(check.holds and check.error < 1e-12 for check in checks)
    printed = capsys.readouterr().out
    assert "GaussNewton, DoubleBackward" in printed and printed.count("ok") == 7


def test_a_report_has_a_line_per_check_and_a_remark_where_one_fails_or_is_missing():
    compared = BothWays(GaussNewton(DoubleBackward()), None, "not for this network")
    errors = Errors(0.0, 1e-9, 1e-9, 0.5, 1e-9, float("nan"), 0.0)
    checks = judged(errors, 1e-3, compared)
    assert [check.holds for check in checks] == [True, True, True, False, True, True, True]
    first, *lines = report("net", compared.curvature, checks).splitlines()
    assert first == "Products for 'net', GaussNewton, DoubleBackward:"
    assert [line.split()[-1] for line in lines[:3]] == ["ok"] * 3
    assert lines[3].endswith("FAILS the loss is not convex in what it is cut at: see `negative_curvature` in the logs")
    assert lines[5].endswith("-     not for this network")


def test_the_hessian_need_not_be_positive(float64, capsys):
    model = make_model()
    set_up(model, curvature=Hessian())
    checks = {check.name: check for check in model.check_products(inputs(), TARGETS)}
    assert checks["u'Gv = v'Gu"].error < 1e-12
    assert np.isnan(checks["u'(Jv) = (J'u)'v"].error)
    assert "this curvature is not made of J" in capsys.readouterr().out


def test_products_by_differences_are_checked_as_far_as_they_can_be(float64, capsys):
    model = make_model()
    set_up(model, curvature=FiniteDifferenceHessian())
    checks = {check.name: check for check in model.check_products(inputs(), TARGETS)}
    missing = [name for name, check in checks.items() if np.isnan(check.error)]
    assert missing == ["u'(Jv) = (J'u)'v", "both linearizations agree"]
    assert checks["two calls agree"].error == 0
    assert max(checks[name].error for name in ("G(2u - 3v) = 2Gu - 3Gv", "u'Gv = v'Gu")) < 1e-6
    printed = capsys.readouterr().out
    assert "FiniteDifferenceHessian:" in printed and "this curvature is made without one" in printed


def test_wrong_products_fail_the_check_of_the_other_way(no_structural_guard, capsys):
    model = stacked(keras.Input((2,)), Nested(), curvature=GaussNewton(ForwardAccumulation()))
    checks = {check.name: check for check in model.check_products(X, TARGETS)}
    assert not checks["u'(Jv) = (J'u)'v"].holds and not checks["both linearizations agree"].holds
    assert "FAILS" in capsys.readouterr().out


def test_a_gradient_that_is_not_that_of_the_loss_fails_its_check(capsys):
    model = stacked(keras.Input((2,)), layers.Dense(4, "tanh"), layers.Lambda(lambda x: x * tf.stop_gradient(x)))
    failed = [check.name for check in model.check_products(X, TARGETS) if not check.holds]
    assert failed == ["the gradient is the loss'"]
    assert "FAILS a layer stops a gradient" in capsys.readouterr().out


def assert_refused(model, x, message):
    """That an update raises an error, and that the weights are as they were."""
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        fit(model, x, TARGETS)
    assert_equal(before, model.get_weights())


@pytest.mark.slow
def test_wrong_products_reject_the_step_and_raise_with_the_cure(no_structural_guard):
    model = stacked(keras.Input((2,)), Nested(), curvature=GaussNewton(ForwardAccumulation()))
    assert_refused(model, X, r"by `ForwardAccumulation` are wrong.*use `DoubleBackward\(\)`")


class PythonNoise(layers.Layer):
    """Draws a number when it is traced: every trace of the network is another function."""

    def call(self, x):
        return x + np.random.normal()


class TensorFlowNoise(layers.Layer):
    """Draws numbers from a generator that no update can hold fixed."""

    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


class Counting(layers.Layer):
    """Depends on how often it was called, through a variable that Keras does not know."""

    def build(self, shape):
        self.calls = [tf.Variable(0.0)]

    def call(self, x):
        return x * (1 + 0.1 * self.calls[0].assign_add(1.0))


@pytest.mark.parametrize("layer", [PythonNoise, pytest.param(Counting, marks=pytest.mark.slow)])
def test_a_network_whose_calls_differ_is_refused_and_its_weights_kept(layer):
    model = stacked(keras.Input((2,)), layer(), name="net")
    assert_refused(model, X, r"'net' gave two different losses for the same cases.*SeedGenerator")


def test_randomness_outside_keras_seed_generators_is_refused_by_name():
    message = "Layer 'noise' draws new random numbers in every call, by TensorFlow's RandomStandardNormal"
    assert_refused(stacked(keras.Input((2,)), TensorFlowNoise(name="noise")), X, message)


def upsampling(interpolation):
    return layers.UpSampling2D(2, interpolation=interpolation, name="up")


@pytest.mark.parametrize(
    ("make_layers", "message"),
    [
        (
            lambda: [layers.Dense(3, "softsign", name="soft")],
            r"Layer 'soft' has no second derivative.*lambda x: x / \(1 \+",
        ),
        (
            lambda: [layers.Dense(2), layers.Reshape((1, 2, 1)), upsampling("bicubic"), layers.Flatten()],
            "Layer 'up' has no second derivative.*interpolation=\"nearest\"",
        ),
        (lambda: [Recomputing()], "recompute_grad.*no second derivative.*micro_batch_size"),
    ],
    ids=["softsign", "bicubic", "recomputing"],
)
def test_layers_without_second_derivative_are_named_with_the_cure(make_layers, message):
    assert_refused(stacked(keras.Input((2,)), *make_layers()), X, message)


def test_forward_accumulation_names_layers_without_second_derivative_too():
    soft = layers.Dense(3, "softsign", name="soft")
    model = stacked(keras.Input((2,)), soft, curvature=GaussNewton(ForwardAccumulation()))
    assert_refused(model, X, "Layer 'soft' has no second derivative")


def test_wrong_second_derivatives_of_tensorflow_are_refused():
    # TensorFlow 2.21: the second derivative of bilinear resizing is not the transpose of its first.
    stack = [layers.Conv2D(3, 2, activation="tanh"), upsampling("bilinear"), layers.Flatten()]
    message = "products.*are wrong.*Layer 'up': use `interpolation=\"nearest\".*check_products"
    assert_refused(stacked(keras.Input((4, 4, 2)), *stack), IMAGES, message)


def test_recurrent_layers_run_without_fused_kernels_in_training_only():
    seen = []

    class Looking(layers.LSTM):
        def call(self, sequences, initial_state=None, mask=None, training=False):
            seen.append(self.use_cudnn)
            return super().call(sequences, initial_state, mask, training)

    layer, x = Looking(2), np.zeros((15, 4, 2), "float32")
    model = stacked(keras.Input((4, 2)), layer)
    objective = model.objective(x, TARGETS)
    seen.clear()
    objective.loss_at(objective.weights)
    assert set(seen) == {False}
    model.predict(x, verbose=0)
    assert seen[-1] == "auto" and layer.use_cudnn == "auto"


@pytest.mark.slow
def test_negative_curvature_warns_once_with_the_alternative(float64):
    def not_convex(y, y_pred):
        return tf.reduce_mean((y - tf.sin(3 * y_pred)) ** 2, -1)

    model = make_model(loss=not_convex)
    with pytest.warns(
        UserWarning, match=r"negative curvature.*`DirectSolver\(\)`.*cut after the nonlinearity"
    ) as record:
        history = fit(model, inputs(), TARGETS, epochs=4, shuffle=True)
    assert sum(history["negative_curvature"]) > 0
    assert len([w for w in record if "negative curvature" in str(w.message)]) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Training has converged to rounding")
def test_negative_curvature_that_rounding_makes_of_a_convex_loss_is_no_cause_to_warn():
    x = normal(60, 4, dtype="float32")
    stack = [layers.Dense(8, "tanh"), layers.Dense(3, "softmax")]
    settings = {"preconditioner": Identity(), "stopping": RelativeProgress(1e-6), "max_iterations": 250}
    model = compiled(
        keras.Sequential([keras.Input((4,)), *stack]),
        "sparse_categorical_crossentropy",
        optimizer=hessian_free(seed=0, growing_batch=None, **settings),
    )
    # Labels that can be told apart: the loss goes to zero, and the damping below the rounding error of the products. A warning would be an error.
    history = fit(model, x, x[:, :3].argmax(1), epochs=40, shuffle=True)
    assert sum(history["negative_curvature"]) > 0
