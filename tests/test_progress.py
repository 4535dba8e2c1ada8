"""What the progress bar of `fit` promises: few numbers, in words; all of them in `History`, and where `verbose` asks for them."""

import re
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from problems import compiled
from training import small_network

from keras_hf import ConjugateGradient, ConstantDamping, DirectSolver, LevenbergMarquardt, PreconditionedMomentum
from keras_hf.callbacks import progress
from keras_hf.callbacks.progress import UpdateProgress
from keras_hf.training import workers

X = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
Y = np.sin(2 * X[:, :2])
SHORT = ["loss", "mae", "damping", "reduction_ratio", "cg_iterations"]
LOGS = {
    "cg_iterations": 18.0,
    "cg_stop": 0.0,
    "converged": 0.0,
    "damping": 45.0,
    "loss": 0.25,
    "my_metric": 0.5,
    "num_cases": 60000.0,
    "reduction_ratio": 0.87654,
    "step_size": 1.0,
    "val_loss": 0.125,
}


@pytest.fixture(scope="module")
def model():
    """One model, traced once."""
    made = compiled(small_network(2, num_inputs=3, units=6), metrics=["mae"])
    made.fit(X, Y, callbacks=[ConstantDamping()], verbose=0)
    return made


def shown(capsys):
    """The names and texts in the last line."""
    return numbers(lines(capsys.readouterr().out)[-1])


def lines(text):
    """What stands on the screen in the end: of each line only what was written last, without colours and the spaces that cover longer text."""
    # Not `splitlines`, which splits at "\r", too.
    return [re.sub(r"\x1b\[\d*m", "", line).split("\r")[-1].rstrip() for line in text.removesuffix("\n").split("\n")]


def numbers(line):
    """The names and texts after the bar, as pairs."""
    return [tuple(entry.split(": ")) for entry in line.split(" - ") if ": " in entry]


def bar(capsys, *batches, shows_all=False, verbose=1):
    """The names and texts in the last line of a bar that gets these logs."""
    callback = UpdateProgress(shows_all)
    callback.set_model(SimpleNamespace(solver=ConjugateGradient(), stop_training=False))
    callback.set_params({"verbose": verbose, "epochs": 1, "steps": len(batches)})
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    for batch, logs in enumerate(batches):
        callback.on_train_batch_end(batch, logs)
    callback.on_epoch_end(0, batches[-1])
    return shown(capsys)


def test_a_bar_shows_loss_metrics_what_one_steers_by_and_validation_in_this_order(capsys):
    assert bar(capsys, LOGS) == [
        ("loss", "0.2500"),
        ("my_metric", "0.5000"),
        ("damping", "45"),
        ("reduction_ratio", "0.877"),
        ("cg_iterations", "18"),
        ("val_loss", "0.1250"),
    ]


def test_integers_are_shown_as_integers_where_all_is_shown(capsys):
    found = dict(bar(capsys, LOGS, shows_all=True))
    assert set(found) == set(LOGS)
    whole = {name: found[name] for name in ("cg_iterations", "cg_stop", "converged", "num_cases", "step_size")}
    assert whole == {"cg_iterations": "18", "cg_stop": "0", "converged": "0", "num_cases": "60000", "step_size": "1"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"step_size": 0.0, "reduction_ratio": -np.inf}, "-inf (rejected)"),
        ({"step_size": 0.0, "reduction_ratio": np.nan, "converged": 1.0}, "nan (converged)"),
        ({"step_size": 0.32768, "reduction_ratio": 0.1}, "0.1 (step_size 0.328)"),
        ({"step_size": 1.0, "reduction_ratio": 1.0}, "1"),
    ],
)
def test_the_ratio_says_what_became_of_the_update(changes, text, capsys):
    assert dict(bar(capsys, {**LOGS, **changes}))["reduction_ratio"] == text


def test_the_numbers_are_those_of_the_last_batch_and_no_means(capsys):
    first = {**LOGS, "damping": 1.0, "loss": 3.0, "step_size": 0.0}
    for verbose in (1, 2):
        found = dict(bar(capsys, first, LOGS, verbose=verbose))
        assert (found["damping"], found["loss"], found["reduction_ratio"]) == ("45", "0.2500", "0.877")


def test_no_mean_over_batches_is_shown_in_between(capsys):
    callback = UpdateProgress()
    callback.set_model(SimpleNamespace(solver=ConjugateGradient(), stop_training=False))
    callback.set_params({"verbose": 1, "epochs": 1, "steps": 3})
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callback.progbar.interval = 0
    for batch, damping in enumerate((1.0, 3.0)):
        callback.on_train_batch_end(batch, {**LOGS, "damping": damping})
        assert dict(shown(capsys))["damping"] == f"{damping:.0f}"


def test_every_number_in_the_page_on_logs_is_one_that_the_bar_knows():
    page = (Path(__file__).parents[1] / "docs" / "reading-the-logs.md").read_text()
    table = page.partition("| key |")[2].partition("\n\n")[0]
    keys = {key for line in table.splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1])}
    solvers = [
        name
        for solver in (ConjugateGradient, DirectSolver, PreconditionedMomentum)
        for name in solver.steered_by + solver.other_logs
    ]
    assert keys == {"loss", *progress._STEERED_BY, *progress._OTHERS, *solvers}


def test_fit_shows_few_numbers_and_history_holds_all(model, capsys):
    history = model.fit(X, Y, epochs=2, validation_data=(X[:9], Y[:9]), callbacks=[LevenbergMarquardt()]).history
    found = [[name for name, _ in numbers(line)] for line in lines(capsys.readouterr().out)]
    assert [names for names in found if names] == [[*SHORT, "val_loss", "val_mae"]] * 2
    assert {*SHORT, "val_loss", "num_cases", "cg_step", "cg_stop", "negative_curvature", "converged"} < set(history)
    known = {"loss", *progress._STEERED_BY, *progress._OTHERS, "cg_iterations", *ConjugateGradient.other_logs}
    assert set(history) - {"mae", "val_loss", "val_mae"} <= known


def test_fit_shows_one_line_an_epoch_or_all_numbers_or_nothing_as_verbose_says(model, capsys):
    def names(verbose):
        history = model.fit(X, Y, epochs=2, callbacks=[ConstantDamping()], verbose=verbose).history
        text = capsys.readouterr().out
        return [{name for name, _ in numbers(line)} for line in lines(text) if numbers(line)], set(history), text

    found, _, text = names(2)
    assert found == [set(SHORT)] * 2 and len(text.splitlines()) == 4
    found, logged, _ = names(3)
    assert found == [logged] * 2
    assert names(0)[2] == ""


@pytest.mark.parametrize("last", [150, pytest.param(120, marks=pytest.mark.slow)])
def test_many_epochs_of_one_update_are_one_line_which_ends_with_the_last(model, last, capsys):
    stopping = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch + 1 == last)
    )
    history = model.fit(
        X, Y, epochs=150, validation_data=(X[:9], Y[:9]), callbacks=[ConstantDamping(), stopping]
    ).history
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "Epoch" not in text
    assert lines(text)[0].startswith(f"{last}/{last} ")
    found = dict(numbers(lines(text)[0]))
    assert list(found) == [*SHORT, "val_loss", "val_mae"]
    assert float(found["val_loss"]) == pytest.approx(history["val_loss"][-1], rel=1e-2)


def test_before_the_first_update_fit_says_that_it_traces_and_which_solver_and_why(model, capsys):
    said = "Tracing the first update: ConjugateGradient, as `HessianFree` was told"
    for verbose in (1, 2, 0):
        model.train_function.is_first_update = True
        model.fit(X, Y, callbacks=[ConstantDamping()], verbose=verbose)
        text = capsys.readouterr().out
        assert text.count(said) == (verbose > 0)
        # The bar takes its place, and it does not come again.
        assert (said in lines(text)) == (verbose == 2)
    model.fit(X, Y, callbacks=[ConstantDamping()])
    assert "Tracing" not in capsys.readouterr().out


def test_fit_shows_a_rejected_update_and_what_a_callback_adds_to_the_logs(model, capsys):
    # Another dtype of the same numbers would be another trace.
    bad = np.full_like(X, np.nan)
    add = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(wave=7.0))
    with pytest.warns(UserWarning, match="60 of the cases of the batch"):
        model.fit(bad, Y, callbacks=[add, ConstantDamping()])
    assert {("reduction_ratio", "nan (rejected)"), ("wave", "7.0000")} < set(shown(capsys))


def test_a_users_own_bar_or_list_of_callbacks_is_left_as_it_is(model, capsys):
    arguments = {"model": model, "epochs": 1, "steps": 1, "verbose": 1, "add_history": True}
    for callbacks in (
        [ConstantDamping(), keras.callbacks.ProgbarLogger()],
        keras.callbacks.CallbackList([ConstantDamping()], add_progbar=True, **arguments),
    ):
        model.fit(X, Y, callbacks=callbacks)
        assert ("num_cases", "60.0000") in shown(capsys)
    model.fit(X, Y, callbacks=keras.callbacks.CallbackList([ConstantDamping()], **arguments))
    assert capsys.readouterr().out == ""


def test_evaluate_shows_loss_and_metrics_and_workers_other_than_the_chief_no_bar_unless_they_are_told_to(
    model, capsys, monkeypatch
):
    model.evaluate(X, Y)
    assert [name for name, _ in shown(capsys)] == ["loss", "mae"]
    monkeypatch.setattr(workers, "is_chief", lambda strategy: False)
    model.fit(X, Y, callbacks=[ConstantDamping()])
    model.evaluate(X, Y)
    model.predict(X)
    assert capsys.readouterr().out == ""
    model.evaluate(X, Y, verbose=1)
    assert [name for name, _ in shown(capsys)] == ["loss", "mae"]
