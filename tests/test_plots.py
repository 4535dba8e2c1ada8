import warnings

import keras
import numpy as np
import pytest

from keras_hf import ConjugateGradient, HessianFree, HFModel, Prediction, plots

RECORDS = [
    {
        "update": i + 1,
        "seconds": 0.5 * i,
        "cost": 100.0 * (i + 1),
        "loss": 2.0**-i,
        "damping": 1.0,
        "reduction_ratio": ratio,
        "cg_iterations": 10 + i,
        "cg_step": 7,
        "step_size": size,
        "trace": {"losses": [0.0]},
    }
    for i, (ratio, size) in enumerate([(0.5, 1.0), (-np.inf, 0.0), (np.nan, 0.0), (3.0, 0.64)])
]


def lines(figure, panel):
    return {line.get_label(): line for line in figure.axes[panel].lines}


@pytest.mark.parametrize(
    "x, expected", [("update", [1, 2, 3, 4]), ("seconds", [0, 0.5, 1, 1.5]), ("cost", [100, 300, 600, 1000])]
)
def test_panels_hold_what_the_updates_say(x, expected):
    figure = plots.plot_updates(RECORDS, x)
    losses = lines(figure, 0)["loss"]
    np.testing.assert_array_equal(losses.get_xdata(), expected)
    np.testing.assert_array_equal(losses.get_ydata(), [1, 0.5, 0.25, 0.125])
    np.testing.assert_array_equal(lines(figure, 3)["run"].get_ydata(), [10, 11, 12, 13])
    np.testing.assert_array_equal(lines(figure, 4)["rejected"].get_xdata(), expected[1:3])


def test_ratios_beyond_the_panel_are_marked_at_its_edge():
    _, marks = plots.plot_updates(RECORDS).axes[2].lines
    np.testing.assert_array_equal(marks.get_xdata(), [2, 4])
    np.testing.assert_array_equal(marks.get_ydata(), [-0.5, 1.5])


def test_panels_are_of_one_height_also_where_no_ratio_is_beyond():
    figure = plots.plot_updates([{**record, "reduction_ratio": 0.5} for record in RECORDS])
    figure.draw_without_rendering()
    heights = [panel.get_position().height for panel in figure.axes]
    assert min(heights) > 0.1 and max(heights) < 1.2 * min(heights)


def test_a_history_is_drawn_with_the_loss_of_validation(tmp_path):
    history = keras.callbacks.History()
    logged = set(RECORDS[0]) - {"update", "trace", "seconds", "cost"}
    history.history = {key: [record[key] for record in RECORDS] for key in logged}
    history.history["val_loss"] = [3.0, 2.0, 1.0, 1.5]
    figure = plots.plot_updates(history, path=tmp_path / "run.png")
    assert set(lines(figure, 0)) == {"loss", "val_loss"}
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"`x` must be one of \['update'\] for these updates. Received: x='seconds'"):
        plots.plot_updates(history, x="seconds")


def test_validation_losses_are_drawn_at_the_epochs_that_were_validated():
    x = np.linspace(-1, 1, 8)[:, None]
    model = HFModel(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
    model.compile(HessianFree(solver=ConjugateGradient()), loss="mse")
    for chosen, expected in [(2, [2, 4]), ([1, 4], [1, 4])]:
        history = model.fit(x, x, epochs=4, validation_data=(x, x), validation_freq=chosen, verbose=0)
        validation = lines(plots.plot_updates(history), 0)["val_loss"]
        np.testing.assert_array_equal(validation.get_xdata(), expected)
        np.testing.assert_array_equal(validation.get_ydata(), history.history["val_loss"])


def test_records_of_two_solvers_share_a_figure():
    without = {name: value for name, value in RECORDS[0].items() if not name.startswith("cg_")}
    figure = plots.plot_updates([*RECORDS[:2], {**without, "update": 3, "arc_step": 1.0}])
    np.testing.assert_array_equal(lines(figure, 0)["loss"].get_ydata(), [1, 0.5, 1])
    np.testing.assert_array_equal(lines(figure, 3)["run"].get_ydata(), [10, 11, np.nan])


def test_losses_that_are_all_nan_are_drawn_without_warnings():
    with warnings.catch_warnings(action="error"):
        figure = plots.plot_updates([{**record, "loss": np.nan} for record in RECORDS])
        figure.draw_without_rendering()
    assert np.isnan(lines(figure, 0)["loss"].get_ydata()).all()


@pytest.mark.parametrize("kind", [list, keras.callbacks.History])
def test_updates_that_are_none_are_refused(kind):
    with pytest.raises(ValueError, match="must hold updates of an `HFModel`.*with nothing"):
        plots.plot_updates(kind())


def test_a_solution_and_its_error_are_drawn_where_they_are(tmp_path):
    """Two outputs x and y, the first known but at x > 1, and wrong by 0.25."""
    known = lambda p: np.where(p[:, :1] > 1, np.nan, p[:, :1] + 0.25)  # noqa: E731
    figure = plots.plot_solution(lambda p: p, (0, -1), (2, 1), known, "tx", tmp_path / "solution.png")
    first, error, second = (axis.images[0].get_array() for axis in figure.axes if axis.images)
    np.testing.assert_allclose(first[:, 25], 0.5)  # t = 0.5 at a quarter of the width, for every x
    np.testing.assert_allclose(second[75], 0.5)
    np.testing.assert_allclose(error[:, :51], 0.25)
    assert np.ma.getmaskarray(error)[:, 51:].all() and np.ma.getmaskarray(first)[:, 51:].all()
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "solution, output 0",
        "absolute error, output 0",
        "solution, output 1",
        "",
    ]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("t", "x")
    assert (tmp_path / "solution.png").stat().st_size > 1000
    alone = plots.plot_solution(lambda p: p[:, :1], (0, 0), (1, 1))
    assert [axis.get_title() for axis in alone.axes if axis.images] == ["solution"]


@pytest.mark.parametrize("low, coordinates", [((0,), "xy"), ((0, 0), "x")])
def test_a_solution_of_other_than_two_coordinates_is_refused(low, coordinates):
    with pytest.raises(
        ValueError, match="must be corners of a rectangle, pairs of floats, and `coordinates` two letters"
    ):
        plots.plot_solution(lambda p: p, low, (1, 1), coordinates=coordinates)


def test_a_prediction_is_drawn_with_its_intervals_cases_and_the_truth(tmp_path):
    x, mean = np.linspace(-1, 1, 5)[:, None], np.arange(5.0)[:, None]
    prediction = Prediction(mean, 0 * mean + 0.5, 0 * mean + 1, np.full((5, 1, 1), 0.25))
    figure = plots.plot_prediction(x, prediction, (x[:2], mean[:2]), mean, tmp_path / "bars.png")
    observations, function = figure.axes[0].collections
    for band, width in ((observations, 1.96), (function, 0.98)):
        edges = band.get_paths()[0].vertices
        assert edges[:, 1].max() == pytest.approx(4 + width) and edges[:, 1].min() == pytest.approx(-width)
    assert set(lines(figure, 0)) == {"prediction", "true function", "cases"}
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_prediction_of_other_points_or_of_two_outputs_is_refused():
    two = np.zeros((5, 2))
    with pytest.raises(ValueError, match="one output at each point.*shape \\(5, 2\\) for 5 points"):
        plots.plot_prediction(np.arange(5.0), Prediction(two, two, two, np.zeros((5, 2, 2))))
