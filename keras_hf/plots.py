"""Figures: the logs of a run's updates against updates, cost or time, solutions of equations, and error bars. Needs matplotlib."""

import keras
import numpy as np

from keras_hf.callbacks.recorder import read_updates

# Points along each side of a picture.
_GRID = 101
# Standard deviations on either side that hold 95 % of a normal distribution.
_WIDTH = 1.96
_LABELS = {"update": "update", "cost": "cost, gradients of one case", "seconds": "seconds"}


def plot_updates(updates, x="update", path=None):
    """Draws loss, damping, reduction ratio, CG iterations and step size of a run.

    The validation loss, if there is one, is drawn with the training loss, at the epochs that were validated. Reduction ratios are drawn from -0.5 to
    1.5; a red mark at the edge is a ratio outside that range, or a loss that rose. In the grey band `LevenbergMarquardt()` keeps the damping.
    Rejected steps are crosses. Records of several solvers may be mixed.

    Args:
        updates: Path of a file written by `UpdateRecorder`, the list of dicts returned by `read_updates`, or a `keras.callbacks.History` (if an epoch
            is one update).
        x: String, the unit of the horizontal axis: "update", "cost" or "seconds". A history has only "update".
        path: Path of the image to write, or `None`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no updates, or they do not contain `x`.
    """
    columns = _columns(updates)
    if x not in _LABELS or x not in columns:
        known = [name for name in _LABELS if name in columns]
        raise ValueError(f"`x` must be one of {known} for these updates. Received: x={x!r}.")
    places = np.cumsum(columns[x]) if x == "cost" else columns[x]

    figure = _figure(figsize=(8, 11))
    axes = figure.subplots(5, sharex=True)
    axes[0].plot(places, columns["loss"], label="loss")
    if "val_loss" in columns:
        known = ~np.isnan(columns["val_loss"])
        axes[0].plot(places[known], columns["val_loss"][known], label="val_loss")
    axes[0].set(ylabel="loss")
    if np.min(columns["loss"], initial=np.inf, where=~np.isnan(columns["loss"])) > 0:
        axes[0].set_yscale("log")
    axes[0].legend()

    axes[1].plot(places, columns["damping"])
    axes[1].set(ylabel="damping")
    if np.min(columns["damping"]) > 0:
        axes[1].set_yscale("log")

    ratios = columns["reduction_ratio"]
    axes[2].axhspan(0.25, 0.9, color="0.92", zorder=0)
    axes[2].plot(places, np.clip(ratios, -0.5, 1.5), ".-", linewidth=0.5)
    beyond = (ratios < -0.5) | (ratios > 1.5)
    if np.any(beyond):  # Marks that are not clipped, and none of them, would break the layout.
        axes[2].plot(places[beyond], np.clip(ratios, -0.5, 1.5)[beyond], "rv", clip_on=False)
    axes[2].set(ylabel="reduction ratio", ylim=(-0.5, 1.5))

    if "cg_iterations" in columns:
        axes[3].plot(places, columns["cg_iterations"], label="run")
        axes[3].plot(places, columns["cg_step"], ".", label="chosen")
        axes[3].set(ylabel="CG iterations", ylim=(0, None))
        axes[3].legend()
    else:
        axes[3].remove()

    sizes = columns["step_size"]
    axes[4].plot(places, sizes, ".-", linewidth=0.5)
    axes[4].plot(places[sizes == 0], sizes[sizes == 0], "rx", label="rejected")
    axes[4].set(ylabel="step size", xlabel=_LABELS[x], ylim=(-0.05, 1.05))
    if np.any(sizes == 0):
        axes[4].legend()
    for each in axes:
        each.grid(alpha=0.3)
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure


def plot_solution(solution, low, high, exact=None, coordinates="xy", path=None):
    """Draws a function on a rectangle, and its error beside it where the true values are known: each output in a row of its own.

    Args:
        solution: Callable `(N, 2) -> (N, k)`, such as `PINN.solution`.
        low: Pair of floats, the lower corner of the rectangle.
        high: Pair of floats, the upper corner.
        exact: Callable `(N, 2) -> (N, k')` of arrays, the true values of the first k' outputs; NaN where none are known, which leaves a gap. `None` =
            no errors are drawn.
        coordinates: String of two letters: of the horizontal axis, the first column of the points, and of the vertical one.
        path: Path of the image to write, or `None`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the corners are not pairs, or `coordinates` not two letters.
    """
    if len(low) != 2 or len(high) != 2 or len(coordinates) != 2:
        raise ValueError(
            "`low` and `high` must be corners of a rectangle, pairs of floats, and `coordinates` two letters. "
            f"Received: low={low}, high={high}, coordinates={coordinates!r}."
        )
    axes = [np.linspace(*ends, _GRID) for ends in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    values = keras.ops.convert_to_numpy(solution(points))
    true = None if exact is None else np.asarray(exact(points))
    num_outputs, num_columns = values.shape[1], 1 if true is None else 2
    figure = _figure(figsize=(4.2 * num_columns, 3.2 * num_outputs))
    panels = figure.subplots(num_outputs, num_columns, squeeze=False)
    for k, row in enumerate(panels):
        shown = [("solution", values[:, k])]
        if true is not None and k < true.shape[1]:
            shown[0] = "solution", np.where(np.isnan(true[:, k]), np.nan, values[:, k])
            shown.append(("absolute error", np.abs(values[:, k] - true[:, k])))
        for panel, (title, drawn) in zip(row, shown, strict=False):
            extent = low[0], high[0], low[1], high[1]
            image = panel.imshow(drawn.reshape(_GRID, _GRID).T, origin="lower", extent=extent, aspect="auto")
            figure.colorbar(image, ax=panel)
            panel.set(
                title=title if num_outputs == 1 else f"{title}, output {k}",
                xlabel=coordinates[0],
                ylabel=coordinates[1],
            )
        for panel in row[len(shown) :]:
            panel.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def plot_prediction(x, prediction, cases=None, exact=None, path=None):
    """Draws a prediction of one variable with its 95 % intervals: of the function, dark, and of new observations, light.

    Args:
        x: Array `(N, 1)` or `(N,)`, at which was predicted, in rising order.
        prediction: `keras_hf.Prediction` of one output, from `Laplace.predict(x)`.
        cases: Pair of arrays, inputs and targets that were fitted, drawn as points; `None` = none.
        exact: Array of N true values; `None` = none are drawn.
        path: Path of the image to write, or `None`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the prediction has not one output at each of the points.
    """
    x = np.ravel(x)
    if prediction.mean.size != x.size:
        raise ValueError(
            "`prediction` must have one output at each point of `x`. "
            f"Received: a prediction of shape {prediction.mean.shape} for {x.size} points."
        )
    mean, std, of_new = (np.ravel(part) for part in prediction[:3])
    figure = _figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.fill_between(
        x, mean - _WIDTH * of_new, mean + _WIDTH * of_new, color="C0", alpha=0.15, label="95 % of observations"
    )
    axes.fill_between(
        x, mean - _WIDTH * std, mean + _WIDTH * std, color="C0", alpha=0.35, label="95 % interval of the function"
    )
    axes.plot(x, mean, color="C0", label="prediction")
    if exact is not None:
        axes.plot(x, np.ravel(exact), "k--", linewidth=1, label="true function")
    if cases is not None:
        axes.plot(np.ravel(cases[0]), np.ravel(cases[1]), "k.", markersize=4, label="cases")
    axes.set(xlabel="x", ylabel="y")
    axes.legend()
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _figure(**settings):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`keras_hf.plots` draws with matplotlib, which is not installed: `pip install keras_hf[examples]`."
        ) from error
    return Figure(layout="constrained", **settings)


def _columns(updates):
    """Returns a dict of arrays with one number per update, NaN where an update has none: other solvers log other names."""
    if isinstance(updates, keras.callbacks.History):
        columns = _columns_of_history(updates)
    else:
        records = updates if isinstance(updates, (list, tuple)) else read_updates(updates)
        names = dict.fromkeys(name for record in records for name in record if name != "trace")
        columns = {name: np.asarray([record.get(name, np.nan) for record in records], float) for name in names}
    if not len(columns.get("reduction_ratio", ())):
        raise ValueError(
            "`updates` must hold updates of an `HFModel`: the file of an `UpdateRecorder`, what `read_updates` gives, or a `History`. "
            f"Received: {type(updates).__name__} with {sorted(columns) or 'nothing'}."
        )
    return columns


def _columns_of_history(history):
    columns = {name: np.asarray(values, float) for name, values in history.history.items()}
    num_updates = len(columns.get("loss", ()))
    validated = _validated(history)
    for name, values in list(columns.items()):
        if len(values) != num_updates:
            del columns[name]
            if len(validated) == num_updates and np.sum(validated) == len(values):
                columns[name] = np.full(num_updates, np.nan)
                columns[name][validated] = values
    return {**columns, "update": np.arange(1, num_updates + 1)} if columns else {}


def _validated(history):
    """Returns for each epoch whether it was validated, as `validation_freq` of its `fit` says."""
    chosen = (history.params or {}).get("validation_freq", 1)
    epochs = 1 + np.asarray(getattr(history, "epoch", ()), int)
    return epochs % chosen == 0 if isinstance(chosen, int) else np.isin(epochs, chosen)
