"""What the physics-informed example promises: right problems and references, the same start for every method, and files that tell the course."""

import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.integrate import solve_ivp
from training import Clock, assert_equal

from examples import baselines, pinn
from examples import pinn_problems as problems
from examples import pinn_systems as systems
from examples.precision import precision
from examples.tables import read_rows, write_rows
from keras_hf import HFModel
from keras_hf.pinn import derivatives

pytestmark = pytest.mark.usefixtures("float64")


def toy(make):
    """A problem with few points and a tiny network."""
    problem = make()
    terms = {name: term._replace(num_points=16) for name, term in problem.terms.items()}
    return problem._replace(units=(4, 1), terms=terms)


# Problems.


# The data of the other one are noisy.
@pytest.mark.parametrize("name", [*problems.PROBLEMS, "cavity", "schroedinger", "bratu", "holes"])
def test_the_true_solution_satisfies_every_term_at_as_many_points_as_stated(name):
    problem = pinn.make(name)
    for coefficient, true in problem.coefficients.values():
        coefficient.assign(true)
    for term, points in problems.training_points(problem, seed=0).items():
        points, values = points if isinstance(points, tuple) else (points, 0.0)
        assert points.shape == (problem.terms[term].num_points, len(problem.low))
        assert np.all((points >= problem.low) & (points <= problem.high))
        if problem.exact:
            residual = problem.terms[term].residual(problem.exact, tf.constant(points))
            np.testing.assert_allclose(residual, np.broadcast_to(values, residual.shape), atol=1e-8)


def test_the_flow_in_the_cavity_has_the_extreme_velocities_of_the_literature():
    """Marchi, Suero & Araki (2009) for Re = 100, along both middle lines."""
    line = np.linspace(0, 1, 501)
    middle = np.full_like(line, 0.5)
    coarse, fine = (systems.cavity_solution(num_spaces) for num_spaces in (32, 64))

    def velocity(x, y):
        points = np.stack([x, y], 1)
        return (4 * fine(points) - coarse(points)) / 3

    u, v = velocity(middle, line)[:, 0], velocity(line, middle)[:, 1]
    assert [u.min(), v.max(), v.min()] == pytest.approx([-0.21404, 0.17957, -0.25380], abs=3e-4)
    walls = np.array([[0.3, 1.0], [0.0, 0.3], [1.0, 0.7], [0.6, 0.0]])
    np.testing.assert_allclose(fine(walls), [[1, 0], [0, 0], [0, 0], [0, 0]], atol=1e-12)


def test_the_potential_around_holes_is_that_of_its_boundary():
    angles = np.linspace(0, 2 * math.pi, 77)
    rims = [systems.RADIUS * np.stack([np.cos(angles), np.sin(angles)], 1) + center for center in systems.HOLES]
    np.testing.assert_allclose(systems.holes_solution(np.concatenate(rims)), 0, atol=1e-7)
    side = np.stack([np.linspace(-0.5, 0.5, 77), np.full(77, -0.5)], 1)
    np.testing.assert_allclose(systems.holes_solution(side), 1, atol=1e-7)
    points = problems.training_points(systems.holes(), seed=0)["equation"]
    distances = [np.hypot(*(points - center).T).min() for center in systems.HOLES]
    assert min(distances) >= systems.RADIUS and max(distances) < 1.01 * systems.RADIUS


def test_errors_are_of_the_outputs_and_points_that_are_known():
    solution = SimpleNamespace(solution=lambda p: tf.concat([p, 9 + p], 1))
    points, values = np.array([[3.0], [4.0], [5.0]]), np.array([[3.0], [3.0], [np.nan]])
    assert pinn.relative_error(solution, points, values) == pytest.approx(1 / math.hypot(3, 3))


def test_conditions_are_on_the_sides_where_they_hold():
    points = problems.training_points(problems.heat(), seed=0)["conditions"]
    counts = [np.sum(points[:, axis] == end) for axis, end in ((0, 0), (1, 0), (1, 1), (0, 1))]
    # 30 on each side; the start shares its two corners with the sides, whose last points are corners at the end.
    assert counts == [32, 31, 31, 2]
    points = problems.training_points(problems.wave(), seed=0)
    assert np.all(points["initial"][:, 0] == 0)
    assert [np.sum(points["sides"][:, 1] == end) for end in (0, 1)] == [100, 100]
    for end in (0, 1):  # All along the side.
        times = np.sort(points["sides"][points["sides"][:, 1] == end, 0])
        assert np.diff(times, prepend=0, append=1).max() < 0.03
    boundary = problems.training_points(problems.poisson5d(), seed=0)["boundary"]
    assert [[np.sum(boundary[:, axis] == end) for end in (0, 1)] for axis in range(5)] == [[50, 50]] * 5


def test_points_are_denser_at_the_reactions_kink_and_the_shock_of_burgers():
    for points in problems.training_points(problems.reaction(), seed=0).values():
        from_kink = np.minimum(points[:, 1], 2 * math.pi - points[:, 1])
        assert from_kink.min() >= 0
        # Of a third, (1 / 8)^(1/3) are in an eighth of the period, an eighth of the others.
        assert np.mean(from_kink < math.pi / 8) == pytest.approx(1 / 3 / 2 + 2 / 3 / 8, abs=0.01)
    points = problems.training_points(problems.burgers(), seed=0)["equation"]
    assert np.mean(np.abs(points[:, 1]) < 1 / 27) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("name", ["burgers", "helmholtz"])
def test_hard_constraints_hold_for_any_network(name):
    problem = problems.PROBLEMS[name]()
    network = problems.build(problem, seed=0)
    points = problems.grid_points(problem)
    is_given = (np.abs(points[:, 1]) == 1) | (points[:, 0] == 0 if name == "burgers" else np.abs(points[:, 0]) == 1)
    expected = -np.sin(np.pi * points[:, 1:]) * (points[:, :1] == 0) if name == "burgers" else np.zeros_like(points)
    np.testing.assert_allclose(network.solution(points[is_given]), expected[is_given, :1], atol=1e-14)


def test_allen_cahns_start_is_met_and_its_kink_rounded_off():
    network = problems.build(problems.allen_cahn(), seed=0)
    x = np.linspace(-1, 1, 41)[:, None]
    np.testing.assert_allclose(network.solution(np.hstack([0 * x, x])), x**2 * np.cos(np.pi * x), atol=1e-9)
    ends = tf.constant([[t, x] for x in (-1.0, 1.0) for t in (1e-3, 0.05)], "float64")
    left, right = np.split(derivatives(network.solution, ends, "tx", "u_x").numpy(), 2)
    np.testing.assert_allclose(left, right, atol=1e-9)


def test_allen_cahns_constraint_leaves_no_kink_to_the_network():
    problem, solution = problems.allen_cahn(), allen_cahn_solution()
    points = problems.grid_points(problem)
    constraint = problem.transform(tf.constant(points), tf.zeros([len(points), 1], "float64")).numpy()
    # Between the first two points of the grid, at the kink; all is even in x.
    for row in (1, 10, 50):
        by_start, by_constraint = (
            np.diff((solution - known)[row, :2]).item() for known in (solution[0], constraint.reshape(solution.shape))
        )
        assert abs(by_constraint) < 0.05 * abs(by_start)


@pytest.mark.parametrize("name", ["convection", "reaction", "allen-cahn"])
def test_features_make_the_solution_periodic(name):
    problem = problems.PROBLEMS[name]()
    network = problems.build(problem, seed=0)
    ends = [np.array([[0.3, end]]) for end in (problem.low[1], problem.high[1])]
    np.testing.assert_allclose(network.solution(ends[0]), network.solution(ends[1]), atol=1e-14)
    assert abs(network.solution(ends[0] + [[0, 0.1]]) - network.solution(ends[0])) > 1e-6


def test_a_seed_fixes_weights_and_points():
    problem = problems.wave()
    first, same, other = (
        [problems.training_points(problem, seed)["equation"], *problems.build(problem, seed).get_weights()]
        for seed in (0, 0, 1)
    )
    assert_equal(first, same)
    assert np.any(first[0] != other[0]) and np.any(first[1] != other[1])


# References.


def test_burgers_solution_is_exact_to_rounding_and_its_slope_the_published_one():
    points = problems.grid_points(problems.burgers())
    solution = problems.burgers_solution(points)
    np.testing.assert_allclose(problems.burgers_solution(points, 100), solution, atol=1e-13)
    start = slice(problems.GRID[1])
    np.testing.assert_allclose(solution[start, 0], -np.sin(np.pi * points[start, 1]), atol=1e-13)
    # Basdevant et al. (1986): 152.00516 at pi t = 1.6037, where it is greatest.
    step = 1e-6
    before, after = problems.burgers_solution(np.array([[1.6037 / np.pi, -step], [1.6037 / np.pi, step]]))[:, 0]
    assert (before - after) / (2 * step) == pytest.approx(152.00516, rel=1e-6)


def allen_cahn_solution():
    """What is computed once and kept, `(101, 256)`."""
    return problems.solution_on_grid(problems.allen_cahn()).reshape(problems.GRID)


def test_allen_cahn_solution_converges():
    solution = allen_cahn_solution()
    np.testing.assert_allclose(problems.allen_cahn_solution(255 * 8, 5), solution, atol=3e-8)
    x = np.linspace(-1, 1, 256)
    np.testing.assert_allclose(solution[0], x**2 * np.cos(np.pi * x), atol=1e-14)
    np.testing.assert_allclose(solution, solution[:, ::-1], atol=1e-9)  # It is even, as the start is.


def allen_cahn_by_finite_differences(times, slope_at_end=0.0):
    """The solution on [0, 1], `(len(times), N)`, by its slope at 1: 0, since it is even with the period 2. Second order, 8 points to a layer."""
    x = np.linspace(0, 1, 1 + 255 * 8)
    step = x[1]

    def rate(t, u):
        second = np.diff(u, 2, prepend=u[1], append=u[-2] + 2 * step * slope_at_end) / step**2
        return 1e-4 * second + 5 * (u - u**3)

    start, span = x**2 * np.cos(np.pi * x), (0, times[-1])
    return solve_ivp(rate, span, start, "LSODA", times, rtol=1e-8, atol=1e-8, lband=1, uband=1).y.T


def test_allen_cahn_solution_is_that_of_finite_differences():
    found = allen_cahn_by_finite_differences([0.2])[-1]
    np.testing.assert_allclose(found[8::16], allen_cahn_solution()[20, 128:], atol=1e-4)


def test_a_constraint_that_kept_allen_cahns_kink_would_end_far_from_the_solution():
    times = np.linspace(0, 1, 21)
    solution, with_kink = (allen_cahn_by_finite_differences(times, slope) for slope in (0.0, -2.0))
    assert np.linalg.norm(with_kink - solution) / np.linalg.norm(solution) == pytest.approx(3.6e-4, rel=0.1)


# Training.


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A second passes whenever a recorder looks at the clock: a run has the same updates on every machine."""
    monkeypatch.setattr(baselines, "time", Clock(step=1.0))


def train(name, method, path, updates, rate=None, seconds=60.0, **options):
    problem = toy(problems.PROBLEMS[name])
    return pinn.train(problem, method, rate, path, seed=0, seconds=seconds, max_updates=updates, **options).rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("wave", {}), ("allen-cahn", {}), ("heat", {"band": (0.001, 0.002, 100.0), "order": 1})]
)
def test_three_updates_lower_the_loss_as_told_and_are_written(name, options, tmp_path):
    path = tmp_path / "hf-seed0.csv"
    rows = train(name, "hf", path, 3, **options)
    assert [rows[0]["update"], rows[-1]["update"]] == [0, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(math.isfinite(row["error"]) for row in rows)
    assert read_rows(path)[-1] == rows[-1]
    with np.load(tmp_path / "hf-seed0.npz") as arrays:
        assert arrays["solution"].shape == (math.prod(problems.GRID), 1)
    # An arc of first order has no acceleration; and no step is so short that this band does not lower the damping.
    assert (rows[-1]["acceleration"] == 0) == ("order" in options)
    assert (rows[-1]["damping"] < 1e-3 * rows[1]["damping"]) == ("band" in options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["poisson", "poisson5d", "convection", "reaction", "burgers", "helmholtz"])
def test_a_damped_gauss_newton_step_lowers_the_loss_of_the_other_problems(name):
    problem = toy(problems.PROBLEMS[name])
    network = problems.build(problem, seed=0)
    model = HFModel(network)
    model.compile(loss="mse")
    objective = model.objective(*problems.training_cases(problem, network, seed=0))
    weights = objective.weights
    residuals, jacobian = objective.residuals(weights), objective.jacobian(weights)
    matrix = jacobian.T @ jacobian
    largest = np.diag(matrix).max() * np.eye(len(weights))
    steps = [np.linalg.solve(matrix + share * largest, jacobian.T @ residuals) for share in (0.01, 0.1, 1.0, 10.0)]
    norms = [np.linalg.norm(objective.residuals(weights - step)) for step in steps]
    assert min(norms) < np.linalg.norm(residuals)
    points, values = problems.test_cases(problem)
    assert math.isfinite(pinn.relative_error(network, points, values))


@pytest.mark.slow
def test_every_other_method_starts_from_the_same_weights_and_lowers_the_loss(tmp_path):
    starts = []
    for method, updates in (("cg", 2), ("least-squares", 2), ("adam+lbfgs", pinn.STEPS_PER_EXECUTION + 3)):
        # A fifth of ten seconds is the time of Adam's first steps.
        rows = train("inverse", method, tmp_path / "run.csv", updates, 1e-3 if "adam" in method else None, 10.0)
        starts.append((rows[0]["error"], rows[0]["diffusivity_error"]))
        assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["update"] == updates
    assert starts == 3 * [(rows[0]["error"], 3.0)]
    # The last goes on where Adam ended.
    assert [row["update"] for row in rows][1] == pinn.STEPS_PER_EXECUTION
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_the_example_writes_its_files_table_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(problems.PROBLEMS, "inverse", lambda: toy(problems.inverse))
    arguments = f"--problem inverse --seconds 60 --updates 2 --rates 1e-3 1e-2 --results {tmp_path}"
    pinn.main([*arguments.split(), "--methods", "hf", "adam"])
    printed = capsys.readouterr().out
    paths = sorted((tmp_path / "inverse").glob("*.csv"))
    assert [path.name for path in paths] == ["adam-0.001-seed0.csv", "adam-0.01-seed0.csv", "hf-seed0.csv"]
    courses = [[row["loss"] for row in read_rows(path)] for path in paths]
    assert len({course[0] for course in courses}) == 1 and all(course[-1] < course[0] for course in courses)
    pinn.main([*arguments.split(), "--methods"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table == [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| Hessian-free (keras_hf)", "| Adam, rate 0.01"]
    assert table[0].endswith("| diffusivity_error |")
    assert (tmp_path / "inverse-seed0.png").stat().st_size > 0


def test_training_ends_where_it_has_converged(tmp_path):
    problem = toy(problems.poisson)
    objective = SimpleNamespace(weights=None, loss_at=lambda w: 1.0)
    network = problems.build(problem, seed=0)
    recorder = pinn.ErrorRecorder(problem, network, objective, tmp_path / "run.csv", math.inf, 100, ["rejected"])
    recorder.set_model(SimpleNamespace(optimizer=SimpleNamespace(iterations=0), stop_training=False))
    recorder.begin([])
    for converged in (0.0, 1.0):
        assert not recorder.model.stop_training
        recorder.model.optimizer.iterations += 1
        recorder.on_train_batch_end(0, {"step_size": 0.0, "converged": converged})
    assert recorder.model.stop_training
    assert [(row["update"], row["rejected"]) for row in recorder.rows[1:]] == [(2, 2)]


def test_float64_ends_with_the_run():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    with precision("float64"):
        assert keras.layers.Dense(1).dtype == keras.config.floatx() == "float64"
    assert keras.layers.Dense(1).dtype == keras.config.floatx() == "float32"


def test_a_run_is_named_by_its_method_and_rate():
    assert [pinn.label(name) for name in ("hf", "adam-0.003", "adam+lbfgs-1e-05", "least-squares")] == [
        "Hessian-free (keras_hf)",
        "Adam, rate 0.003",
        "Adam, then L-BFGS, rate 1e-05",
        "SciPy's least_squares",
    ]


def test_the_best_rate_has_the_least_loss_in_the_end(tmp_path):
    for name, losses in {
        "adam-0.001": (1.0, 3.0),
        "adam-0.01": (9.0, 2.0),
        "adam-0.1": (1.0, math.nan),
        "hf": (1.0, 1.0),
    }.items():
        write_rows(tmp_path / f"{name}-seed0.csv", [{"loss": loss} for loss in losses])
    write_rows(tmp_path / "hf-seed1.csv", [{"loss": 0.0}])
    write_rows(tmp_path / "adam+lbfgs-0.001-seed0.csv", [{"loss": 0.0}])
    assert list(pinn.best_runs(tmp_path, 0)) == ["hf", "adam-0.01", "adam+lbfgs-0.001"]
    assert list(pinn.best_runs(tmp_path, 1).values()) == [tmp_path / "hf-seed1.csv"]
