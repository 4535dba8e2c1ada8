import math

import keras
import numpy as np
import pytest
from problems import compiled, sequential

from keras_hf.training.advice import Advice


def logs(**others):
    return {"step_size": 0.0, "num_cases": 300, "gradient_norm": 1.0, "converged": 0, **others}


@pytest.fixture
def advice():
    return Advice()


def test_the_same_advice_is_given_once(advice):
    with pytest.warns(UserWarning, match="no second derivative in the network"):
        advice.no_curvature()
    # Warnings of our own are errors.
    advice.no_curvature()
    # To this model's user: another's has not heard it.
    with pytest.warns(UserWarning, match="no second derivative in the network"):
        Advice().no_curvature()


def test_the_line_that_is_shown_is_the_models():
    def line_of_the_model():
        advice.no_curvature()

    advice = Advice()
    with pytest.warns(UserWarning, match="no second derivative") as record:
        line_of_the_model()
    assert record[0].filename == __file__


def test_an_exact_solver_needs_no_advice_but_where_the_loss_has_another_float_type(advice):
    for dtype in ("float64", "float32"):
        advice.float_types_of_exact_solver({dtype})
    with pytest.warns(
        UserWarning, match="Received: weights and losses of float32, float64. Before the network is made"
    ):
        advice.float_types_of_exact_solver({"float64", "float32"})


def test_small_batches_are_said_with_the_cure_for_how_the_cases_came():
    cures = {"arrays": "Raise `batch_size`", "dataset": "Batch the dataset by more cases", "batches": "Hand over more"}
    for source, cure in cures.items():
        advice = Advice()
        advice.cases_come_as(source)
        with pytest.warns(UserWarning, match=f"An update on 8 cases says little about others.*{cure}"):
            advice.small_batch({"num_cases": 8}, math.inf)


def test_a_small_remainder_has_a_cure_of_its_own(advice):
    advice.cases_come_as("dataset")
    for num_cases in (600, 151, 200, 64):  # not that small
        advice.small_batch({"num_cases": num_cases}, math.inf)
    with pytest.warns(UserWarning, match="An update on 63 cases.*Others held up to 600. Leave out the remainder, by"):
        advice.small_batch({"num_cases": 63}, math.inf)


def test_batches_that_are_small_enough_one_batch_of_all_cases_and_a_part_that_starts_small_need_no_advice(advice):
    advice.cases_come_as("dataset")
    for num_cases in (16, 12, 4):
        advice.small_batch({"num_cases": num_cases}, math.inf)
    advice.cases_come_as("dataset")
    advice.small_batch({"num_cases": 8}, on_purpose=8)
    advice.cases_come_as(None)
    advice.small_batch({"num_cases": 8}, math.inf)


def test_updates_that_keep_fitting_noise_are_said_with_the_cure(advice):
    advice.cases_come_as("dataset")
    for optimism in [*[0.8] * 39, 0.75, *[0.8] * 39, math.nan, *[0.8] * 39]:
        advice.noise_is_fitted(optimism)
    with pytest.warns(
        UserWarning, match="For 40 updates.*next one: `optimism` in the logs is 0.81.*Batch the dataset by more cases"
    ):
        advice.noise_is_fitted(0.81)


def test_losses_without_curvature_are_named_with_their_smooth_cousin(advice):
    advice.loss_of_gauss_newton("mean_squared_error")
    advice.loss_of_gauss_newton(lambda y, y_pred: y)
    with pytest.warns(UserWarning, match="'hinge' has no curvature.*keras.losses.SquaredHinge"):
        advice.loss_of_gauss_newton("hinge")


def test_changed_weights_are_said_once_each(advice):
    advice.changed_weights([])
    with pytest.warns(UserWarning, match=r"\['dense/kernel'\] stay as they were then"):
        advice.changed_weights(["dense/kernel"])
    with pytest.warns(UserWarning, match=r"\['dense/bias'\]"):
        advice.changed_weights(["dense/bias"])
    advice.changed_weights(["dense/kernel"])


def test_negative_curvature_is_said_where_cg_met_it_beyond_rounding(advice):
    met = {"negative_curvature": 1, "damping": 1e-2}
    not_met, rounding = {**met, "negative_curvature": 0}, {**met, "damping": 1e-8}
    for found in (not_met, rounding):
        advice.negative_curvature(found, 1e-7)
    with pytest.warns(UserWarning, match="CG met negative curvature"):
        advice.negative_curvature(met, 1e-7)


NOT_IN_CASES = "The loss or its gradient is not finite, though the numbers in the cases are"


@pytest.mark.parametrize(
    ("found", "num_nonfinite", "num_updates", "message"),
    [
        ({"gradient_norm": math.nan}, 2, 5, "2 of the cases of the batch hold numbers that are not finite"),
        ({"gradient_norm": math.inf}, 0, 5, NOT_IN_CASES),
        ({"gradient_norm": 0.0}, 0, 1, "The gradient of the first update is zero"),
        ({"converged": 1}, 0, 5, "no step lowers the loss by more than float32 can tell"),
    ],
)
def test_a_rejected_step_is_explained(advice, found, num_nonfinite, num_updates, message):
    with pytest.warns(UserWarning, match=message):
        advice.no_progress(logs(**found), num_nonfinite, num_updates, "float32")


def test_what_overflows_in_float16_has_a_cure_of_its_own(advice):
    with pytest.warns(UserWarning, match='or bound what the layer takes. In float16.*`dtype="float32"`'):
        advice.no_progress(logs(gradient_norm=math.nan), 0, 5, "float16")
    with pytest.warns(UserWarning, match="or bound what the layer takes.$"):
        Advice().no_progress(logs(gradient_norm=math.nan), 0, 5, "float32")


def test_convergence_sends_to_float64_what_is_not_there_yet():
    for dtype, cure in {"float32": "Stop here, or go on in float64", "float64": r"Stop here\.$"}.items():
        with pytest.warns(UserWarning, match=f"more than {dtype} can tell.*updates leave the solver out. {cure}"):
            Advice().no_progress(logs(converged=1), 0, 9, dtype)


def test_a_zero_gradient_is_called_neither_convergence_nor_a_loss_that_rises(advice):
    with pytest.warns(UserWarning, match="zero") as record:
        for number in range(1, 40):
            advice.no_progress(logs(gradient_norm=0.0, converged=1), 0, number, "float32")
    assert len(record) == 1


def test_thirty_rejections_on_end_are_worth_a_word(advice):
    for number in range(29):
        advice.no_progress(logs(), 0, number + 1, "float32")
    advice.no_progress(logs(step_size=1.0), 0, 30, "float32")
    for number in range(29):
        advice.no_progress(logs(), 0, number + 31, "float32")
    with pytest.warns(UserWarning, match="30 updates in a row were rejected"):
        advice.no_progress(logs(), 0, 60, "float32")


def test_a_solution_that_holds_at_other_points_needs_no_advice(advice):
    for val_losses in ({}, {"val_loss": [500.0, 9.0]}, {"val_loss": [math.inf]}):
        advice.spurious_solution({"loss": [1.0, 0.1], **val_losses})


def test_a_solution_that_holds_at_its_points_alone_is_advised_on_with_both_numbers(advice):
    with pytest.warns(UserWarning, match=r"mean squares 2.0e-03 and 1.0e-06.*PINN.redrawn"):
        advice.spurious_solution({"loss": [1.0, 1e-6], "val_loss": [1.0, 2e-3]})


def test_a_validation_loss_that_has_risen_for_long_is_said_with_its_best(advice):
    falls, short = [*np.linspace(1, 0.5, 40)], [0.5, *[1.0] * 19]
    for losses in ([], falls, short, [0.5, *[0.59] * 40], [math.nan] * 40):
        advice.validation_rose({"val_loss": losses})
    with pytest.warns(UserWarning, match=r"was 0.5 after 1 of 21 epochs and is 1 now.*EarlyStopping"):
        advice.validation_rose({"val_loss": [0.5, *[1.0] * 20]})


@pytest.mark.parametrize("keeps", [True, False])
def test_fit_says_that_the_validation_loss_has_risen_unless_a_callback_watches_it(keeps, recwarn):
    x = np.linspace(-1, 1, 12)[:, None]
    # From zero, in short steps.
    model = compiled(sequential(keras.layers.Dense(1, kernel_initializer="zeros"), shape=(1,)))
    model.optimizer.damping.assign(3.0)
    callbacks = [keras.callbacks.EarlyStopping(patience=100)] if keeps else []
    # What is right for the ones is wrong for the others.
    model.fit(x, x, epochs=30, validation_data=(x, -x), callbacks=callbacks, verbose=0)
    assert any("EarlyStopping" in str(warning.message) for warning in recwarn) != keeps
