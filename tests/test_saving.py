"""What comes back, and what is kept: files, checkpoints, crashes."""

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import saved_runs
import tensorflow as tf
from problems import hessian_free
from saved_runs import WAYS, X, fit, make, three_more, three_updates, values
from training import assert_equal, renewed, small_network

from keras_hf import (
    ConstantDamping,
    DirectSolver,
    GrowingBatch,
    HessianFree,
    HFModel,
    Identity,
    KroneckerFactored,
    PreconditionedMomentum,
)


@pytest.fixture(scope="module")
def six_updates(tmp_path_factory):
    """Where three updates were kept, the damping of each, and what three more of the same model leave."""
    folder = str(tmp_path_factory.mktemp("saving"))
    model = renewed(make)
    three_updates(folder, model)
    history = model.history.history
    # Else the order of cases and the damping would have nothing to bring back.
    assert history["num_cases"][0] == 40 and len(set(history["damping"])) > 1
    fit(model, 3)
    return folder, history["damping"], values(model)


def test_three_updates_and_three_are_six_on_end(six_updates):
    folder, _, expected = six_updates
    model = renewed(make)
    fit(model, 6)
    assert_equal(values(model), expected)
    assert_equal(values(three_more(folder, "weights")), expected)


@pytest.mark.slow
def test_three_updates_and_three_are_six_in_a_process_of_their_own(six_updates, tmp_path):
    folder, _, expected = six_updates
    subprocess.run([sys.executable, saved_runs.__file__, folder, tmp_path], check=True, cwd=Path(__file__).parents[1])
    for way in WAYS:
        with np.load(tmp_path / f"{way}.npz") as arrays:
            assert_equal(list(arrays.values()), expected)


def test_a_callback_saves_what_is_there_after_the_update_with_the_damping_of_the_next(six_updates):
    folder, dampings, _ = six_updates
    by_callback, afterwards = (keras.models.load_model(f"{folder}/{name}.keras") for name in ("best", "run"))
    assert_equal(values(by_callback), values(afterwards))
    assert float(by_callback.optimizer.damping) != dampings[-1]


# Solvers that keep something from one update to the next.
OPTIMIZERS = {
    "momentum": lambda: HessianFree(
        solver=PreconditionedMomentum(KroneckerFactored(0.5, interval=3, decay=0.9)), growing_batch=GrowingBatch(40)
    ),
    "direct": lambda: HessianFree(solver=DirectSolver()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_model_goes_on_bit_equally(name, float64, tmp_path):
    model = HFModel(small_network(2, num_inputs=3, units=6))
    model.compile(OPTIMIZERS[name](), "mse")
    # The first update after loading uses inverses of an update before saving.
    fit(model, 5)
    model.save(tmp_path / "run.keras")
    again = keras.models.load_model(tmp_path / "run.keras")
    assert again.optimizer.solver.get_config() == model.optimizer.solver.get_config()
    assert fit(model, 4) == fit(again, 4)
    assert_equal(values(again), values(model))


def of_half_of_the_cases(num_replicas):
    """A model that sees half of the cases for its curvature: an update depends on which come first."""
    one, two = tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with (one if num_replicas == 1 else two).scope():
        dense = keras.layers.Dense(2, kernel_initializer="ones", use_bias=False)
        model = HFModel(keras.Sequential([keras.Input((3,)), dense]))
        optimizer = hessian_free(0.1, Identity(), max_iterations=2, growing_batch=None, curvature_batch_size=60)
        model.compile(optimizer, loss="mse", steps_per_execution=2 // num_replicas)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [1, 2], ids=["executions of two steps", "two replicas"])
def test_a_run_brought_back_sees_its_cases_in_the_order_of_the_seed_that_was_saved(tmp_path, num_replicas):
    def run(seed, *callbacks):
        model = renewed(of_half_of_the_cases, num_replicas)
        model.optimizer.seed.assign(seed)
        model.fit(X, saved_runs.Y, epochs=5, callbacks=[*callbacks, ConstantDamping()], verbose=0)
        assert int(model.optimizer.iterations.numpy()) == 5
        return model.get_weights()

    backup = lambda: keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        run(1, backup(), saved_runs.Crash())
    resumed, whole, other = run(2, backup()), run(1), run(2)
    assert_equal(resumed, whole)
    assert not np.array_equal(whole[0], other[0])


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


def test_who_does_not_have_the_package_is_told_of_it(tmp_path, monkeypatch):
    make().save(tmp_path / "run.keras")
    # What Keras and Python know of it.
    for known in (keras.saving.get_custom_objects(), sys.modules):
        for name in [name for name in known if name.startswith("keras_hf")]:
            monkeypatch.setitem(known, name, None)
    with pytest.raises(TypeError, match="keras_hf"):
        keras.models.load_model(tmp_path / "run.keras")


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
    assert_equal(values(model), before)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        # The first layer fits.
        (lambda: small_network(4, num_inputs=3, units=6), r"\(3, 6\), \(6,\), \(6, 4\), \(4,\)"),
        (lambda: keras.Sequential([keras.layers.Dense(6), keras.layers.Dense(2)]), "none yet: build it first"),
    ],
    ids=["of another shape", "unbuilt"],
)
def test_weights_that_do_not_fit_are_refused(network, told, tmp_path):
    make().save_weights(tmp_path / "run.weights.h5")
    other = HFModel(network())
    other.compile(loss="mse")
    before = values(other)
    with pytest.raises(ValueError, match=f"does not hold the weights of this model.*{told}"):
        other.load_weights(tmp_path / "run.weights.h5")
    assert_equal(values(other), before)


def test_an_unknown_key_of_a_configuration_is_named():
    config = {**HessianFree().get_config(), "curvature_size": 3}
    with pytest.raises(ValueError, match="curvature_size"):
        HessianFree.from_config(config)


def test_a_damping_that_is_none_is_refused_and_nothing_lost():
    model = renewed(make)
    before = values(model)
    good = float(model.optimizer.damping)
    # As after an update: before it, NaN says that it is to be found.
    model.optimizer.curvature_scale.assign(1.0)
    for damping in (-1.0, float("nan"), float("inf")):
        model.optimizer.damping.assign(damping)
        with pytest.raises(ValueError, match="damping must be a finite number >= 0. Received: optimizer.damping="):
            fit(model, 1)
    model.optimizer.damping.assign(good)
    model.optimizer.curvature_scale.assign(0.0)
    assert_equal(values(model), before)


@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
def test_a_run_that_0_3_saved_goes_on(file):
    folder = Path(__file__).with_name("saved_by_0_3")
    expected = json.loads((folder / "expected.json").read_text())
    model = keras.models.load_model(folder / "model.keras")
    if file != "model.keras":
        model = HFModel.from_config(model.get_config())
        model.compile(keras.saving.deserialize_keras_object(_config_of_optimizer(folder)), loss="mse")
        model.load_weights(folder / file)
    found = model.predict(np.array(expected["inputs"]), verbose=0)
    np.testing.assert_allclose(found, expected["outputs"], rtol=1e-5)
    np.testing.assert_allclose(model.optimizer.damping.numpy(), expected["damping"], rtol=1e-6)
    assert int(model.optimizer.iterations.numpy()) == expected["updates"]


def _config_of_optimizer(folder):
    with zipfile.ZipFile(folder / "model.keras") as archive:
        return json.loads(archive.read("config.json"))["compile_config"]["optimizer"]


@pytest.mark.parametrize(
    "path, name",
    [
        ("keras_hf.differentiation.curvature", "Curvature"),
        ("keras_hf.differentiation.linearization", "Linearization"),
        ("keras_hf.callbacks.recorder", "update_cost"),
        ("keras_hf.solvers.stopping", "StoppingRule"),
        ("keras_hf.solvers.solver", "Solver"),
        ("keras_hf.solvers.preconditioners", "Preconditioner"),
        ("keras_hf.common.part", "Part"),
        ("keras_hf.pinn", "derivatives"),
        ("keras_hf.plots", "plot_updates"),
    ],
)
def test_paths_of_0_3_are_importable(path, name):
    assert callable(getattr(importlib.import_module(path), name))
