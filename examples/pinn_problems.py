"""Physics-informed problems in the sizes of the literature: equations and conditions, points, hard constraints, and the true solution.

    from examples.pinn_problems import PROBLEMS, build
    problem = PROBLEMS["poisson"]()
    pinn = build(problem, seed=0)
    x, y, sample_weight = training_cases(problem, pinn, seed=0)

Raissi et al. (2019): Burgers, Allen-Cahn. Krishnapriyan et al. (2021), Rathore et al. (2024): convection, reaction, wave. Mueller & Zeinhofer (2023):
Poisson, heat. Dangel, Mueller & Zeinhofer (2024): the wide networks. Wang, Teng & Perdikaris (2021): Helmholtz. Everything is float64.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from scipy.stats import qmc

from keras_hf.pinn import PINN, derivatives

PI = math.pi
# Of pictures, and where a numerical reference is known: values of the first coordinate, and of the second.
GRID = 101, 256
NUM_TEST_POINTS = 20_000


class Term(NamedTuple):
    """A residual and the points at which it is to vanish.

    Attributes:
        residual: Callable `(u, points) -> (N, m)`; see `PINN`.
        draw: Callable `(num_points, seed) -> (N, d)`, the points.
        num_points: Integer.
        values: Callable `points -> (N, m)`, what the term is to have instead of zero; `None` = zero.
        weight: Float, that of its mean square in the loss.
    """

    residual: Callable
    draw: Callable
    num_points: int
    values: Callable | None = None
    weight: float = 1.0


class Problem(NamedTuple):
    """A problem, and the network that solves it.

    Attributes:
        units: Tuple of integers, the widths of the network's layers; all but the last are tanh.
        low: Tuple of floats, the lower corner of the domain. Of problems in time, the first coordinate is time.
        high: Tuple of floats, the upper corner.
        terms: Dict from names to `Term`s.
        exact: Callable `(N, d) -> (N, 1)` of tensors, the solution; `None` where it is known by `reference` alone.
        reference: Callable without arguments: the solution on `grid_points`, an array `(N, 1)`.
        features: See `PINN`.
        transform: See `PINN`.
        coefficients: Dict from names to pairs of a `keras.Variable` that is trained, and its true value.
    """

    units: tuple
    low: tuple
    high: tuple
    terms: dict
    exact: Callable | None = None
    reference: Callable | None = None
    features: Callable | None = None
    transform: Callable | None = None
    coefficients: dict = {}


def build(problem, seed):
    """Makes the network of a problem, its weights drawn by a seed.

    Args:
        problem: A `Problem`.
        seed: Integer.

    Returns:
        A `PINN`.
    """
    corner = np.array([problem.low], "float64")
    inputs = corner.shape[1] if problem.features is None else problem.features(tf.constant(corner)).shape[1]
    initializer = keras.initializers.GlorotNormal(seed=keras.random.SeedGenerator(seed))
    network = keras.Sequential([keras.Input((inputs,))])
    for layer, units in enumerate(problem.units):
        is_last = layer == len(problem.units) - 1
        network.add(keras.layers.Dense(units, None if is_last else "tanh", kernel_initializer=initializer))
    terms = {name: term.residual for name, term in problem.terms.items()}
    unknown = [variable for variable, _ in problem.coefficients.values()]
    return PINN(network, terms, problem.features, problem.transform, unknown)


def training_points(problem, seed):
    """Returns the points of every term, and their values where a term has some: the first argument of `PINN.cases`."""
    drawn = {name: term.draw(term.num_points, seed) for name, term in problem.terms.items()}
    valued = {name: term.values for name, term in problem.terms.items() if term.values}
    return {name: (points, valued[name](points)) if name in valued else points for name, points in drawn.items()}


def training_cases(problem, pinn, seed):
    """Returns `x`, `y` and `sample_weight` for `fit`."""
    return pinn.cases(training_points(problem, seed), {name: term.weight for name, term in problem.terms.items()})


def test_cases(problem):
    """Returns points that are not trained on, `(N, d)`, and the solution there, `(N, 1)`."""
    if problem.exact is None:
        return grid_points(problem), problem.reference()
    points = np.random.default_rng(2**31).uniform(problem.low, problem.high, (NUM_TEST_POINTS, len(problem.low)))
    return points, problem.exact(tf.constant(points)).numpy()


def grid_points(problem):
    """Returns a grid `(101 * 256, d)` of the first two coordinates; the others are in the middle of the domain."""
    points = np.tile((np.array(problem.low) + problem.high) / 2, (math.prod(GRID), 1))
    axes = [np.linspace(problem.low[i], problem.high[i], GRID[i]) for i in (0, 1)]
    points[:, :2] = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    return points


def solution_on_grid(problem):
    """Returns the true solution on `grid_points`, `(N, 1)`."""
    return problem.reference() if problem.exact is None else problem.exact(tf.constant(grid_points(problem))).numpy()


# Points.


def evenly_random(low, high):
    """Returns what draws quasi-random points (Halton) of a box; of width zero along a coordinate is a side of one."""

    def draw(num_points, seed):
        return np.array(low) + qmc.Halton(len(low), rng=seed).random(num_points) * np.subtract(high, low)

    return draw


def denser_around_zero(low, high):
    """Returns what draws quasi-random points whose last coordinate is cubed, so that a third of them are in the 27th part of the box around zero."""

    def draw(num_points, seed):
        points = evenly_random(low, high)(num_points, seed)
        points[:, -1] **= 3
        return points

    return draw


def partly_denser_at_ends(low, high):
    """Returns what draws quasi-random points; a third of them are denser at both ends of the last coordinate, by the cube."""

    def draw(num_points, seed):
        points = evenly_random(low, high)(num_points, seed)
        # Not every third one: Halton's second coordinate is a number in base 3.
        part, width = points[-(num_points // 3) :, -1], high[-1] - low[-1]
        part[:] = low[-1] + width * ((2 * (part - low[-1]) / width - 1) ** 3 / 2 % 1)
        return points

    return draw


def grid(low, high):
    """Returns what draws the grid that has the greatest square number of points up to the number wanted, without the sides of the box."""

    def draw(num_points, seed):
        del seed
        side = np.linspace(0, 1, math.isqrt(num_points) + 2)[1:-1]
        return np.array(low) + np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2) * np.subtract(
            high, low
        )

    return draw


def sides(low, high, axes=None):
    """Returns what draws quasi-random points of the two sides of a box across each of some axes, by default of all."""
    axes = range(len(low)) if axes is None else axes

    def draw(num_points, seed):
        points = evenly_random(low, high)(num_points, seed)
        # Not in turn: the even and the odd points of a Halton sequence are on different halves of the box.
        parts = np.array_split(points, 2 * len(axes))
        for part, (axis, end) in zip(parts, itertools.product(axes, (low, high)), strict=True):
            part[:, axis] = end[axis]
        return points

    return draw


def even_sides(low, high, sides_of_box):
    """Returns what draws evenly spaced points of some sides of a rectangle, pairs of an axis and 0 (low) or 1 (high)."""

    def draw(num_points, seed):
        del seed
        along = np.linspace(0, 1, num_points // len(sides_of_box))
        parts = [
            np.stack([np.full_like(along, end), along][:: 1 if axis == 0 else -1], 1) for axis, end in sides_of_box
        ]
        return np.array(low) + np.concatenate(parts) * np.subtract(high, low)

    return draw


# Problems.


def value(u, points):
    """The residual of a condition u = 0, or of data."""
    return u(points)


def equals(solution):
    """Returns the residual of a condition u = solution."""
    return lambda u, points: u(points) - solution(points)


def poisson(units=(32, 1)):
    """-u_xx - u_yy = 2 pi^2 sin(pi x) sin(pi y) on the unit square, 0 on its boundary."""

    def exact(p):
        return tf.sin(PI * p[:, :1]) * tf.sin(PI * p[:, 1:])

    def equation(u, p):
        u_xx, u_yy = derivatives(u, p, "xy", "u_xx", "u_yy")
        return u_xx + u_yy + 2 * PI**2 * exact(p)

    low, high = (0, 0), (1, 1)
    on_boundary = even_sides(low, high, [(0, 0), (0, 1), (1, 0), (1, 1)])
    terms = {"equation": Term(equation, grid(low, high), 900), "boundary": Term(value, on_boundary, 120)}
    return Problem(units, low, high, terms, exact)


def heat():
    """u_t = u_xx / 4, u = sin(pi x) at the start, 0 at the sides."""
    exact, low, high = _heat_solution, (0, 0), (1, 1)

    def equation(u, p):
        u_t, u_xx = derivatives(u, p, "tx", "u_t", "u_xx")
        return u_t - u_xx / 4

    conditions = even_sides(low, high, [(0, 0), (1, 0), (1, 1)])
    terms = {"equation": Term(equation, grid(low, high), 900), "conditions": Term(equals(exact), conditions, 90)}
    return Problem((32, 1), low, high, terms, exact)


def _heat_solution(p):
    return tf.exp(-(PI**2) * p[:, :1] / 4) * tf.sin(PI * p[:, 1:])


def poisson5d(units=(64, 1)):
    """The negative Laplacian of u is pi^2 times the sum of sin(pi x_i) on the unit cube in five dimensions, u given on its boundary."""
    low, high = (0,) * 5, (1,) * 5

    def exact(p):
        return tf.reduce_sum(tf.sin(PI * p), 1, keepdims=True)

    def equation(u, p):
        return tf.add_n(derivatives(u, p, "abcde", *(f"u_{x}{x}" for x in "abcde"))) + PI**2 * exact(p)

    terms = {
        "equation": Term(equation, evenly_random(low, high), 3000),
        "boundary": Term(equals(exact), sides(low, high), 500),
    }
    return Problem(units, low, high, terms, exact)


def periodic(p):
    """Features of a function of t and x that has the period 2 pi in x."""
    return tf.concat([p[:, :1], tf.cos(p[:, 1:]), tf.sin(p[:, 1:])], 1)


def convection():
    """u_t + 40 u_x = 0, u = sin x at the start, periodic by features."""
    low, high = (0, 0), (1, 2 * PI)

    def exact(p):
        return tf.sin(p[:, 1:] - 40 * p[:, :1])

    def equation(u, p):
        u_t, u_x = derivatives(u, p, "tx", "u_t", "u_x")
        return u_t + 40 * u_x

    terms = {
        "equation": Term(equation, evenly_random(low, high), 5000),
        "initial": Term(equals(exact), evenly_random(low, (0, 2 * PI)), 250),
    }
    return Problem((20, 20, 20, 1), low, high, terms, exact, features=periodic)


def reaction():
    """u_t = 5 u (1 - u), a bell at the start, periodic by features.

    The true solution has a kink at x = 0, the end of the period: u_x jumps there by 3e-3 at the start, and by 0.46 in the end. Points are denser
    there: what evenly spread ones leave open around the kink is an error of 2e-5 to 8e-5.
    """
    low, high = (0, 0), (1, 2 * PI)

    def exact(p):
        bell = tf.exp(-((p[:, 1:] - PI) ** 2) / (2 * (PI / 4) ** 2))
        grown = bell * tf.exp(5 * p[:, :1])
        return grown / (grown + 1 - bell)

    def equation(u, p):
        value, u_t = derivatives(u, p, "tx", "u", "u_t")
        return u_t - 5 * value * (1 - value)

    terms = {
        "equation": Term(equation, partly_denser_at_ends(low, high), 1800),
        "initial": Term(equals(exact), partly_denser_at_ends(low, (0, 2 * PI)), 200),
    }
    return Problem((20, 20, 20, 1), low, high, terms, exact, features=periodic)


def wave():
    """u_tt = 4 u_xx, two standing waves at rest at the start, 0 at the sides."""
    low, high = (0, 0), (1, 1)

    def exact(p):
        t, x = p[:, :1], p[:, 1:]
        return tf.sin(PI * x) * tf.cos(2 * PI * t) + tf.sin(5 * PI * x) * tf.cos(10 * PI * t) / 2

    def equation(u, p):
        u_tt, u_xx = derivatives(u, p, "tx", "u_tt", "u_xx")
        return u_tt - 4 * u_xx

    at_start = evenly_random(low, (0, 1))
    terms = {
        "equation": Term(equation, evenly_random(low, high), 3000),
        "initial": Term(equals(exact), at_start, 200, weight=100.0),
        "velocity": Term(lambda u, p: derivatives(u, p, "tx", "u_t"), at_start, 200),
        "sides": Term(value, sides(low, high, axes=[1]), 200, weight=100.0),
    }
    return Problem((20, 20, 20, 1), low, high, terms, exact)


BURGERS_VISCOSITY = 0.01 / PI


def burgers():
    """u_t + u u_x = 0.01 / pi u_xx, u = -sin(pi x) at the start, 0 at the sides; start and sides are met exactly.

    Points are denser where the shock comes to stand: on as many evenly spread ones every residual can vanish with the shock in a gap between points,
    at the wrong place.
    """

    def equation(u, p):
        value, u_t, u_x, u_xx = derivatives(u, p, "tx", "u", "u_t", "u_x", "u_xx")
        return u_t + value * u_x - BURGERS_VISCOSITY * u_xx

    def transform(p, output):
        t, x = p[:, :1], p[:, 1:]
        return -tf.sin(PI * x) + t * (1 - x**2) * output

    low, high = (0, -1), (1, 1)
    terms = {"equation": Term(equation, denser_around_zero(low, high), 3000)}
    return Problem((20, 20, 20, 1), low, high, terms, reference=_burgers_on_grid, transform=transform)


@functools.cache
def _burgers_on_grid():
    return burgers_solution(grid_points(burgers()))


def burgers_solution(points, num_nodes=200):
    """Returns the solution of `burgers` by the transform of Cole (1951) and Hopf (1950), its integrals by Gauss-Hermite quadrature.

        u = -E[sin(pi y) f(y)] / E[f(y)],  f(y) = exp(-cos(pi y) / (2 pi viscosity)),  y normal with mean x and variance 2 viscosity t

    Args:
        points: Array `(N, 2)` of t and x.
        num_nodes: Integer, of the quadrature.

    Returns:
        Array `(N, 1)`.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(num_nodes)
    t, x = points[:, :1], points[:, 1:]
    y = x - nodes * np.sqrt(4 * BURGERS_VISCOSITY * t)
    exponents = -np.cos(PI * y) / (2 * PI * BURGERS_VISCOSITY)
    f = weights * np.exp(exponents - exponents.max(1, keepdims=True))
    return -np.sum(f * np.sin(PI * y), 1, keepdims=True) / f.sum(1, keepdims=True)


ALLEN_CAHN_DIFFUSIVITY = 1e-4


def allen_cahn():
    """u_t = 1e-4 u_xx + 5 (u - u^3), u = x^2 cos(pi x) at the start, met exactly; periodic by features.

    Continued with the period 2, the start has a kink at x = 1, which diffusion rounds off at once and the reaction damps (by exp(-10 t), as it does
    any small deviation from -1). A constraint `start + t * output` would keep the kink for all times: a source, which ends at an error of 3.6e-4.
    Here it evolves.
    """

    def equation(u, p):
        value, u_t, u_xx = derivatives(u, p, "tx", "u", "u_t", "u_xx")
        return u_t - ALLEN_CAHN_DIFFUSIVITY * u_xx - 5 * (value - value**3)

    def features(p):
        return periodic(tf.concat([p[:, :1], PI * p[:, 1:]], 1))

    def transform(p, output):
        t, x = p[:, :1], p[:, 1:]
        to_end = 2 / PI * tf.cos(PI * x / 2)  # In absolute value it has the kink of slope 1 at x = 1, and no other.
        # Seconds of 1e-16 keep the square root's derivative finite; they change the start by 1e-10.
        width = tf.sqrt(4 * ALLEN_CAHN_DIFFUSIVITY * (t + 1e-16))
        rounded = to_end * tf.math.erf(to_end / width) + width / math.sqrt(PI) * tf.exp(-((to_end / width) ** 2))
        return x**2 * tf.cos(PI * x) + 2 * (tf.exp(-10 * t) * rounded - tf.abs(to_end)) + t * output

    low, high = (0, -1), (1, 1)
    terms = {"equation": Term(equation, evenly_random(low, high), 3000)}
    return Problem((30, 30, 30, 1), low, high, terms, None, _allen_cahn_on_grid, features, transform)


@functools.cache
def _allen_cahn_on_grid():
    return allen_cahn_solution().reshape(-1, 1)


def allen_cahn_solution(num_points=255 * 16, steps_per_row=10):
    """Returns the solution of `allen_cahn` by Fourier modes in x and exponential Runge-Kutta steps in t.

    The start has a kink at x = 1: its modes are those of a grid 64 times as fine, since they would otherwise be wrong by what the omitted ones add
    to them.

    Args:
        num_points: Integer, points along x, a multiple of 255: the grid has 255 spaces.
        steps_per_row: Integer, steps for a hundredth of the time.

    Returns:
        Array `(101, 256)`.
    """

    def reaction_of(modes):
        u = np.fft.irfft(modes, num_points)
        return np.fft.rfft(5 * (u - u**3))

    x = -1 + 2 * np.arange(64 * num_points) / (64 * num_points)
    start = x**2 * np.cos(PI * x)
    modes = np.fft.rfft(start)[: num_points // 2 + 1] / 64
    linear = -ALLEN_CAHN_DIFFUSIVITY * (PI * np.arange(len(modes))) ** 2
    later = exponential_steps(linear, reaction_of, modes, 0.01 / steps_per_row, 100 * steps_per_row)
    rows = [start[::64], *(np.fft.irfft(v, num_points) for v in later[steps_per_row - 1 :: steps_per_row])]
    rows = np.array(rows)[:, :: num_points // 255]
    return np.concatenate([rows, rows[:, :1]], 1)


def exponential_steps(linear, nonlinear, v, step, num_steps):
    """Returns the list of v after each step of v_t = linear v + nonlinear(v): what is linear and diagonal is integrated exactly.

    ETDRK4 of Cox & Matthews (2002); its coefficients by means over a circle, Kassam & Trefethen (2005).

    Args:
        linear: Array `(k,)` of floats.
        nonlinear: Callable `(k,) -> (k,)`.
        v: Array `(k,)`, the start.
        step: Float.
        num_steps: Integer.
    """
    z = step * linear[:, None] + np.exp(1j * PI * (np.arange(32) + 0.5) / 16)
    half, whole = np.exp(step * linear / 2), np.exp(step * linear)

    def mean(values):
        return step * np.real(values).mean(1)

    stage = mean((np.exp(z / 2) - 1) / z)
    first = mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3)
    middle = mean((2 + z + np.exp(z) * (z - 2)) / z**3)
    last = mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3)
    found = []
    for _ in range(num_steps):
        at_v = nonlinear(v)
        a = half * v + stage * at_v
        at_a = nonlinear(a)
        at_b = nonlinear(half * v + stage * at_a)
        at_c = nonlinear(half * a + stage * (2 * at_b - at_v))
        v = whole * v + first * at_v + 2 * middle * (at_a + at_b) + last * at_c
        found.append(v)
    return found


def helmholtz():
    """u_xx + u_yy + u = q with u = sin(pi x) sin(4 pi y) on [-1, 1]^2; 0 on the boundary is met exactly."""
    low, high = (-1, -1), (1, 1)

    def exact(p):
        return tf.sin(PI * p[:, :1]) * tf.sin(4 * PI * p[:, 1:])

    def equation(u, p):
        value, u_xx, u_yy = derivatives(u, p, "xy", "u", "u_xx", "u_yy")
        return u_xx + u_yy + value - (1 - 17 * PI**2) * exact(p)

    def transform(p, output):
        return tf.reduce_prod(1 - p**2, 1, keepdims=True) * output

    terms = {"equation": Term(equation, evenly_random(low, high), 3000)}
    return Problem((30, 30, 30, 1), low, high, terms, exact, transform=transform)


def inverse():
    """u_t = c u_xx with the solution known at 200 points: c, 1 at the start of training, is 1/4."""
    low, high = (0, 0), (1, 1)
    diffusivity = keras.Variable(1.0, dtype="float64", name="diffusivity")

    def equation(u, p):
        u_t, u_xx = derivatives(u, p, "tx", "u_t", "u_xx")
        return u_t - diffusivity * u_xx

    terms = {
        "equation": Term(equation, grid(low, high), 900),
        "data": Term(value, evenly_random(low, high), 200, values=lambda p: _heat_solution(p).numpy()),
    }
    return Problem((32, 1), low, high, terms, _heat_solution, coefficients={"diffusivity": (diffusivity, 0.25)})


PROBLEMS = {
    "poisson": poisson,
    "poisson-wide": functools.partial(poisson, units=(256, 256, 128, 128, 1)),
    "heat": heat,
    "poisson5d": poisson5d,
    "poisson5d-wide": functools.partial(poisson5d, units=(64, 64, 48, 48, 1)),
    "convection": convection,
    "reaction": reaction,
    "wave": wave,
    "burgers": burgers,
    "allen-cahn": allen_cahn,
    "helmholtz": helmholtz,
    "inverse": inverse,
}
