"""What comes back, and what is kept: files, checkpoints, crashes."""

import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import saved_runs
import tensorflow as tf
from saved_runs import WAYS, X, fit, make, three_more, three_updates, values

from keras_hf import (
    ConjugateGradient,
    ConstantDamping,
    DirectSolver,
    GrowingBatch,
    HessianFree,
    HFModel,
    Identity,
    KroneckerFactored,
    PreconditionedMomentum,
)


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def six_updates(tmp_path_factory):
    """Where three updates were kept, and what three more of the same model leave."""
    folder = str(tmp_path_factory.mktemp("saving"))
    keras.utils.set_random_seed(11)
    model = make()
    three_updates(folder, model)
    history = model.history.history
    # Else the order of cases and the damping would have nothing to bring back.
    assert history["num_cases"][0] == 40 and len(set(history["damping"])) > 1
    fit(model, 3)
    return folder, values(model)


@pytest.mark.slow
def test_six_updates_on_end_are_three_and_three(six_updates):
    _, expected = six_updates
    keras.utils.set_random_seed(11)
    model = make()
    fit(model, 6)
    assert_same(values(model), expected)


@pytest.mark.parametrize(
    "way", [way if way == "weights" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_three_updates_and_three_are_six(six_updates, way):
    folder, expected = six_updates
    assert_same(values(three_more(folder, way)), expected)


@pytest.mark.slow
def test_three_updates_and_three_are_six_in_a_process_of_their_own(six_updates, tmp_path):
    folder, expected = six_updates
    subprocess.run([sys.executable, saved_runs.__file__, folder, tmp_path], check=True, cwd=Path(__file__).parents[1])
    for way in WAYS:
        with np.load(tmp_path / f"{way}.npz") as arrays:
            assert_same(list(arrays.values()), expected)


# Solvers that keep something from one update to the next.
OPTIMIZERS = {
    "inverses": lambda: HessianFree(solver=ConjugateGradient(KroneckerFactored(interval=3), max_iterations=3)),
    "momentum": lambda: HessianFree(
        solver=PreconditionedMomentum(KroneckerFactored(0.5, interval=3, decay=0.9)), growing_batch=GrowingBatch(40)
    ),
    "direct": lambda: HessianFree(solver=DirectSolver()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_model_goes_on_bit_equally(name, float64, tmp_path):
    model = HFModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(2)]))
    model.compile(OPTIMIZERS[name](), "mse")
    # The first update after loading uses inverses of an update before saving.
    fit(model, 5)
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert again.optimizer.solver.get_config() == model.optimizer.solver.get_config()
    histories = [fit(one, 4).history for one in (model, again)]
    assert histories[0] == histories[1]
    assert_same(values(again), values(model))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["executions of two steps", "two replicas"])
def test_a_run_brought_back_sees_its_cases_in_the_order_of_the_seed_that_was_saved(tmp_path, way):
    two_replicas = way == "two replicas"
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) if two_replicas else tf.distribute.get_strategy()

    def run(seed=None, callbacks=()):
        with strategy.scope():
            dense = keras.layers.Dense(2, kernel_initializer="ones", use_bias=False)
            model = HFModel(keras.Sequential([keras.Input((3,)), dense]))
            solver = ConjugateGradient(Identity(), max_iterations=2)
            # The curvature of half of the cases: an update depends on which come first.
            optimizer = HessianFree(0.1, solver, growing_batch=None, curvature_batch_size=60, seed=seed)
            model.compile(optimizer, loss="mse", steps_per_execution=1 if two_replicas else 2)
        model.fit(X, saved_runs.Y, epochs=5, callbacks=[*callbacks, ConstantDamping()], verbose=0)
        return model

    backup = lambda: keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[backup(), saved_runs.Crash()])
    resumed = run(callbacks=[backup()])
    whole = run(seed=int(resumed.optimizer.seed.numpy()))
    assert int(resumed.optimizer.iterations.numpy()) == 5
    assert_same(resumed.get_weights(), whole.get_weights())


def test_what_a_callback_saves_is_the_damping_of_the_next_update(tmp_path):
    model = make()
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "a.weights.h5", save_weights_only=True, save_freq=1)
    fit(model, 1, [saving])
    other = make()
    other.load_weights(tmp_path / "a.weights.h5")
    assert float(other.optimizer.damping) == float(model.optimizer.damping) != 7.0


def test_configurations_make_the_same_model():
    model = make()
    x = np.ones((2, 3), "float32")
    for copy in (
        keras.models.clone_model(model),
        HFModel.from_config(model.get_config()),
        keras.models.model_from_json(model.to_json()),
    ):
        assert isinstance(copy, HFModel)
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(copy.predict(x, verbose=0), model.predict(x, verbose=0))


def test_the_network_is_a_plain_keras_file(tmp_path):
    model = make()
    model.network.save(tmp_path / "network.keras")
    with zipfile.ZipFile(tmp_path / "network.keras") as file:
        assert b"keras_hf" not in file.read("config.json")
    network = keras.models.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(network.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.slow
def test_an_export_has_the_signature_of_the_networks_own(tmp_path):
    model = make()
    model.export(tmp_path / "model", verbose=False)
    model.network.export(tmp_path / "network", verbose=False)
    tf.saved_model.save(model.network, tmp_path / "plain")
    served = {name: tf.saved_model.load(tmp_path / name) for name in ("model", "network", "plain")}
    one, other = (served[name].signatures["serve"] for name in ("model", "network"))
    shapes = lambda function: [(spec.shape, spec.dtype) for spec in tf.nest.flatten(function.structured_outputs)]  # noqa: E731
    assert shapes(one) == shapes(other)
    assert one.structured_input_signature == other.structured_input_signature
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(served["model"].serve(X), expected, rtol=1e-5, atol=1e-6)
    plain = served["plain"].signatures["serving_default"](inputs=tf.constant(X))["output_0"]
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_process_without_the_package_is_told_of_it(tmp_path):
    make().save(tmp_path / "run.keras")
    script = (
        f"import sys; sys.modules['keras_hf'] = None\nimport keras; keras.models.load_model('{tmp_path}/run.keras')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "keras_hf" in done.stderr.splitlines()[-1] + done.stderr[-2000:]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = make()
    for name, save in (("run.keras", model.save), ("run.weights.h5", model.save_weights)):
        save(tmp_path / name)
        before = (tmp_path / name).read_bytes()

        def fail(*args, **kwargs):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(HessianFree, "save_own_variables", fail)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
        save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.keras", "run.weights.h5"]


def test_a_truncated_file_is_refused(tmp_path):
    model = make()
    model.save(tmp_path / "run.keras")
    whole = (tmp_path / "run.keras").read_bytes()
    (tmp_path / "run.keras").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, zipfile.BadZipFile), match="(?i)zip|not a valid"):
        keras.models.load_model(tmp_path / "run.keras")
    (tmp_path / "run.weights.h5").write_bytes(b"something else")
    before = values(model)
    with pytest.raises(OSError, match="file signature not found"):
        model.load_weights(tmp_path / "run.weights.h5")
    assert_same(values(model), before)


def test_weights_of_another_shape_are_refused(tmp_path):
    make().save_weights(tmp_path / "run.weights.h5")
    # The first layer fits.
    stack = [keras.layers.Dense(6), keras.layers.Dropout(0.1), keras.layers.Dense(4)]
    other = HFModel(keras.Sequential([keras.Input((3,)), *stack]))
    other.compile(loss="mse")
    before = values(other)
    with pytest.raises(
        ValueError, match=r"does not hold the weights of this model.*\(3, 6\), \(6,\), \(6, 4\), \(4,\)"
    ):
        other.load_weights(tmp_path / "run.weights.h5")
    assert_same(values(other), before)


def test_weights_for_an_unbuilt_network_are_refused(tmp_path):
    make().save_weights(tmp_path / "run.weights.h5")
    unbuilt = HFModel(keras.Sequential([keras.layers.Dense(6), keras.layers.Dense(2)]))
    unbuilt.compile(loss="mse")
    with pytest.raises(ValueError, match="does not hold the weights of this model.*none yet: build it first"):
        unbuilt.load_weights(tmp_path / "run.weights.h5")


def test_an_unknown_key_of_a_configuration_is_named():
    config = {**HessianFree().get_config(), "curvature_size": 3}
    with pytest.raises(ValueError, match="curvature_size"):
        HessianFree.from_config(config)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_a_damping_that_is_none_is_refused_and_nothing_lost(six_updates, damping):
    folder, _ = six_updates
    model = keras.models.load_model(folder + "/run.keras")
    before = values(model)
    good = float(model.optimizer.damping)
    model.optimizer.damping.assign(damping)
    with pytest.raises(ValueError, match="damping must be a finite number >= 0. Received: optimizer.damping="):
        fit(model, 1)
    model.optimizer.damping.assign(good)
    assert_same(values(model), before)
