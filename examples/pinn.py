"""Physics-informed networks by exact Gauss-Newton steps and, for the same time from the same weights, by Adam, L-BFGS and SciPy's least squares.

Run from the root of the repository:

    python -m examples.pinn --problem poisson
    python -m examples.pinn --problem burgers --seconds 300 --methods hf
    python -m examples.pinn --problem poisson --methods

`examples/pinn_problems.py` and `examples/pinn_systems.py` hold the problems. Methods: `hf` is `HessianFree(solver=DirectSolver())` with
`LevenbergMarquardt()`, or the rule of `--band`, its arc of the order of `--order`; `cg` has `ConjugateGradient` in its place, for networks of which a
factorization takes too long; `adam` is the best, by the loss in the end, of the rates of `--rates`, each of which gets the whole time and decays
along a cosine; `adam+lbfgs` is L-BFGS after the best of them, which get a fifth of the time; `lbfgs` keeps 50 pairs; `least-squares` is the
trust-region method of `scipy.optimize.least_squares`.

A run writes `PROBLEM/METHOD-seedSEED.csv` as it goes. A row has the seconds of training (the clock stands still while errors are measured, and while
functions are compiled, in the first update), the loss, and the error: the relative L2 error at points that are not trained on. In the end all files
of the problem and seed, those of earlier runs too, are tabled and drawn: without methods nothing else is done.
"""

import argparse
import math
from pathlib import Path

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from scipy import optimize

from examples import origins
from examples import pinn_problems as problems
from examples import pinn_systems as systems
from examples.baselines import LABELS, LossAndGradient, Recorder, minimize_by_scipy
from examples.precision import precision
from examples.tables import read_rows
from keras_hf import ArcStepDamping, ConjugateGradient, DirectSolver, HessianFree, HFModel, LevenbergMarquardt, Nystrom

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

METHODS = ("hf", "cg", "adam", "lbfgs", "adam+lbfgs", "least-squares")
RESULTS = Path("runs", "pinn")
# Adam's steps in one call: the work between calls would otherwise be as long as a step.
STEPS_PER_EXECUTION = 20
# Of the time of "adam+lbfgs".
ADAM_SHARE = 0.2
STEPS_PER_EPOCH = 1000
HF_LOGS = {
    "hf": ("damping", "arc_step", "acceleration", "step_size", "rejected"),
    "cg": ("damping", "cg_iterations", "reduction_ratio", "step_size", "rejected"),
}
NUM_ROWS = 60


def main(arguments=None):
    """Trains with each method, prints a table and draws the figure.

    Args:
        arguments: List of strings, as on the command line; None takes those.

    Returns:
        Dict from the labels of the runs to what each reached, the last row of its file.
    """
    args = parse(arguments)
    folder = args.results / args.problem
    folder.mkdir(parents=True, exist_ok=True)
    with precision("float64"):
        for method in args.methods:
            for rate in args.rates if method.startswith("adam") else [None]:
                name = method if rate is None else f"{method}-{rate:g}"
                print(f"\n{args.problem}, {label(name)}: {args.seconds:g} seconds", flush=True)
                path = folder / f"{name}-seed{args.seed}.csv"
                problem, limits = make(args.problem), (args.seconds, args.updates)
                train(problem, method, rate, path, args.seed, *limits, args.band, args.order)
        runs = best_runs(folder, args.seed)
        print_table(runs)
        path = args.results / f"{args.problem}-seed{args.seed}.png"
        plot(make(args.problem), runs, path)
    print(f"\nFigure: {path}")
    return {label(name): read_rows(file)[-1] for name, file in runs.items()}


def make(name):
    """Returns a problem by its name."""
    return {**problems.PROBLEMS, **systems.PROBLEMS}[name]()


def label(name):
    """Returns what tables and figures call a run: the method's label, and the learning rate if it has one."""
    method = max((method for method in METHODS if name.startswith(method)), key=len)
    rate = name.removeprefix(method).removeprefix("-")
    return f"{LABELS[method]}, rate {rate}" if rate else LABELS[method]


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=[*problems.PROBLEMS, *systems.PROBLEMS], default="poisson")
    parser.add_argument("--methods", choices=METHODS, nargs="*", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each method")
    parser.add_argument("--updates", type=int, default=10**9, help="after which training ends even earlier")
    parser.add_argument(
        "--band", type=float, nargs=3, metavar=("LOW", "HIGH", "FACTOR"), help="of hf's `ArcStepDamping`"
    )
    parser.add_argument("--order", type=int, default=4, help="of the arc of hf, 1 to 4; default: 4")
    parser.add_argument("--seed", type=int, default=0, help="of weights and points")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates of Adam")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder; default: {RESULTS}")
    return parser.parse_args(arguments)


def train(problem, method, rate, path, seed, seconds, max_updates=10**9, band=None, order=4):
    """Does what `run` does, writes beside the file what the figure shows of the solution, and returns the `ErrorRecorder`."""
    pinn, recorder = run(problem, method, rate, path, seed, seconds, max_updates, band, order)
    np.savez(path.with_suffix(".npz"), solution=pinn.solution(problems.grid_points(problem)).numpy())
    origins.note(path)
    return recorder


def run(problem, method, rate, path, seed, seconds, max_updates=10**9, band=None, order=4):
    """Trains a network by a method, for a given time, and writes the file.

    Args:
        problem: A `pinn_problems.Problem`, whose coefficients are trained from what they are.
        method: String, one of `METHODS`.
        rate: Float, the learning rate of Adam; None for methods without.
        path: Path of the CSV file.
        seed: Integer, of weights and points.
        seconds: Float, of training.
        max_updates: Integer, after which training ends even earlier.
        band: `low`, `high` and `factor` of the `ArcStepDamping` of "hf"; `None` = its own.
        order: Integer in [1, 4], that of the arc of "hf".

    Returns:
        The `PINN` and the `ErrorRecorder`.
    """
    pinn = problems.build(problem, seed)
    x, y, sample_weight = problems.training_cases(problem, pinn, seed)
    model = HFModel(pinn)
    solver = ConjugateGradient(preconditioner=Nystrom(rank=60)) if method == "cg" else DirectSolver(order=order)
    model.compile(HessianFree(solver=solver, growing_batch=None, seed=seed), "mse")
    objective = model.objective(x, y, sample_weight)
    recorder = ErrorRecorder(problem, pinn, objective, path, seconds, max_updates, HF_LOGS.get(method, ()))
    if method in HF_LOGS:
        rule = LevenbergMarquardt() if band is None else ArcStepDamping(*band)
        fit(model, [rule, recorder], x=x, y=y, sample_weight=sample_weight, batch_size=len(y))
    elif method == "least-squares":
        fit_least_squares(objective, recorder)
    else:
        function = LossAndGradient(pinn, weighted_squares, x, (y, sample_weight), piece_size=len(y))
        if method == "adam+lbfgs":
            function(function.vector())  # Compiled before the clock starts.
        recorder.begin(pinn.variables)
        if method.startswith("adam"):
            fit_adam(pinn, (x, y, sample_weight), rate, recorder, 1.0 if method == "adam" else ADAM_SHARE)
        if method.endswith("lbfgs"):
            options = {"maxcor": 50, "maxfun": 10**9, "ftol": 0.0}
            minimize_by_scipy("L-BFGS-B", options, function, len(y), recorder)
    return pinn, recorder


def weighted_squares(y_true, y_pred):
    """Loss of each case, `(N,)`; `y_true` is a pair of targets and weights."""
    targets, weights = y_true
    return weights * tf.reduce_mean(tf.square(targets - y_pred), -1)


def fit(model, callbacks, **arguments):
    """Calls a model's `fit` until one of the callbacks stops it."""
    model.fit(**arguments, steps_per_epoch=STEPS_PER_EPOCH, epochs=10**9, callbacks=callbacks, verbose=0)


def fit_adam(pinn, cases, rate, recorder, share):
    """Trains by Keras' Adam, on all cases at once.

    Args:
        pinn: A `PINN`.
        cases: Inputs, targets and weights.
        rate: Float, the learning rate at the start; it falls along a cosine, or stays where Adam is only the beginning.
        recorder: An `ErrorRecorder`, which has begun.
        share: Float in (0, 1], that of the recorder's time.
    """
    optimizer = keras.optimizers.Adam(rate)

    def after_steps(batch, logs):
        if share == 1:
            optimizer.learning_rate = rate * recorder.cosine
        is_over = recorder.after_update(int(optimizer.iterations), logs)
        pinn.stop_training = is_over or recorder.seconds >= share * recorder.max_seconds

    pinn.compile(optimizer, "mse", steps_per_execution=STEPS_PER_EXECUTION)
    data = tf.data.Dataset.from_tensors(cases).repeat()
    fit(pinn, [keras.callbacks.LambdaCallback(on_train_batch_end=after_steps)], x=data, shuffle=False)
    recorder.finish(int(optimizer.iterations), {})


def fit_least_squares(objective, recorder):
    """Trains by the trust-region method of `scipy.optimize.least_squares`, until `recorder` ends it or no step is found.

    Args:
        objective: A `keras_hf.LossFunction`.
        recorder: An `ErrorRecorder`.
    """
    recorder.begin([])
    start = objective.weights
    for function in (objective.residuals, objective.jacobian):
        function(start)  # Compiled before the clock starts.
    updates = 0
    recorder.after_update(updates, {})

    def after_iteration(intermediate_result):
        nonlocal updates
        updates += 1
        objective.assign(intermediate_result.x)
        if recorder.after_update(updates, {}):
            raise StopIteration

    # SciPy wants one tolerance above rounding.
    tolerances = {"ftol": None, "xtol": 3e-16, "gtol": None, "max_nfev": 10**9}
    optimize.least_squares(objective.residuals, start, objective.jacobian, callback=after_iteration, **tolerances)
    recorder.finish(updates, {})


class ErrorRecorder(Recorder):
    """Records loss and error against time, shows them in a progress bar, and ends training when the time is up or it has converged.

    Args:
        problem: A `pinn_problems.Problem`.
        pinn: The `PINN` that is trained.
        objective: Its `LossFunction` on the training cases.
        path: Path of the CSV file.
        max_seconds: Float, the time of training.
        max_updates: Integer, the updates after which training ends even if time is left.
        log_names: Strings, training logs to put into each row; among them may be `rejected`, the number of rejected steps so far.
    """

    def __init__(self, problem, pinn, objective, path, max_seconds, max_updates, log_names=()):
        super().__init__(pinn, None, None, path, max_seconds, max_updates, max_seconds / NUM_ROWS, log_names)
        self._problem, self._objective = problem, objective
        self._points, self._values = problems.test_cases(problem)
        self._num_rejected = 0

    def totals(self, logs):
        self._num_rejected += int(logs["step_size"] == 0)
        return {"rejected": self._num_rejected}

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if logs["converged"]:
            self.finish(int(self.model.optimizer.iterations), {**logs, "rejected": self._num_rejected})
            self.model.stop_training = True

    def errors(self):
        coefficients = {
            f"{name}_error": abs(float(variable.numpy()) - true) / abs(true)
            for name, (variable, true) in self._problem.coefficients.items()
        }
        loss = self._objective.loss_at(self._objective.weights)
        return {"loss": loss, "error": relative_error(self.network, self._points, self._values), **coefficients}


def relative_error(pinn, points, values):
    """Returns the L2 norm of the error over that of the solution, a float: of its first outputs, as many as are given, where they are no NaN."""
    is_given = np.isfinite(values[:, 0])
    solution = pinn.solution(points[is_given]).numpy()[:, : values.shape[1]]
    return float(np.linalg.norm(solution - values[is_given]) / np.linalg.norm(values[is_given]))


def best_runs(folder, seed):
    """Returns each method's run of least loss in the end: dict from names, with Adam's rate, to the paths of CSV files, in the order of methods."""
    runs = {}
    for method in METHODS:
        paths = [*folder.glob(f"{method}-seed{seed}.csv"), *folder.glob(f"{method}-[0-9]*-seed{seed}.csv")]
        if paths:
            best = min(paths, key=_final_loss)
            runs[best.stem.removesuffix(f"-seed{seed}")] = best
    return runs


def _final_loss(path):
    loss = read_rows(path)[-1]["loss"]
    return loss if math.isfinite(loss) else math.inf


def print_table(runs):
    """Prints what each method reached, as Markdown.

    Args:
        runs: Dict from names to paths of CSV files.
    """
    last = {name: read_rows(path)[-1] for name, path in runs.items()}
    coefficients = [name for name in next(iter(last.values())) if name.endswith("_error")]
    print("\n| " + " | ".join(["method", "seconds", "updates", "loss", "relative L2 error", *coefficients]) + " |")
    print("| --- " * (5 + len(coefficients)) + "|")
    for name, row in last.items():
        errors = [f"{row[column]:.2e}" for column in ("loss", "error", *coefficients)]
        print("| " + " | ".join([label(name), f"{row['seconds']:.1f}", f"{row['update']:.0f}", *errors]) + " |")


def plot(problem, runs, path):
    """Draws the solution of the method of least error, its error, and the error of every method against time.

    Args:
        problem: A `pinn_problems.Problem`.
        runs: Dict from names to paths of CSV files.
        path: Path of the PNG file.
    """
    courses = {name: read_rows(file) for name, file in runs.items()}
    best = min(courses, key=lambda name: courses[name][-1]["error"])
    with np.load(runs[best].with_suffix(".npz")) as arrays:
        solution = arrays["solution"]
    solution = solution[:, 0]  # the first output
    error = np.abs(solution - problems.solution_on_grid(problem)[:, 0])
    figure, panels = pyplot.subplot_mosaic(
        [["course", "solution"], ["course", "error"]], figsize=(10, 4.8), width_ratios=(5, 3), layout="constrained"
    )
    extent = problem.low[0], problem.high[0], problem.low[1], problem.high[1]
    for name, title, values in (("solution", f"solution by {label(best)}", solution), ("error", "its error", error)):
        image = panels[name].imshow(values.reshape(problems.GRID).T, origin="lower", extent=extent, aspect="auto")
        figure.colorbar(image, ax=panels[name])
        panels[name].set_title(title)
    for name, rows in courses.items():
        panels["course"].semilogy(
            [row["seconds"] for row in rows], [row["error"] for row in rows], label=label(name), linewidth=2
        )
    panels["course"].set(title="relative error of the solution (L2)", xlabel="seconds of training")
    panels["course"].grid(alpha=0.3)
    panels["course"].legend()
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
