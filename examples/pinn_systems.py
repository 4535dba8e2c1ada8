"""More problems for `examples.pinn`: systems, higher derivatives, three dimensions, a domain with holes, and noisy data.

Every reference is exact, or computed here to an error that its docstring says.
"""

import functools
import math

import keras
import numpy as np
import tensorflow as tf
from scipy import interpolate, sparse
from scipy.sparse import linalg

from examples.pinn_problems import (
    Problem,
    Term,
    equals,
    evenly_random,
    exponential_steps,
    grid,
    grid_points,
    periodic,
    sides,
    value,
)
from keras_hf.pinn import derivatives

PI = math.pi


# Systems.

REYNOLDS = 100.0
# Around the upper corners, where the velocities jump: left out of errors.
CORNER = 0.1


def cavity(units=(30, 30, 30, 3)):
    """The steady flow of a viscous fluid in the unit square under a moving lid, Re = 100: two velocities and the pressure, 0 in a corner.

    The lid's velocity jumps at the upper corners, where the pressure is infinite: a third of the points are near them.
    """

    def equation(w, p):
        value, x, y, xx, yy = derivatives(w, p, "xy", "u", "u_x", "u_y", "u_xx", "u_yy")
        u, v = value[:, :1], value[:, 1:2]
        inertia = u * x[:, :2] + v * y[:, :2]
        slope = tf.concat([x[:, 2:], y[:, 2:]], 1)
        return tf.concat([inertia + slope - (xx + yy)[:, :2] / REYNOLDS, x[:, :1] + y[:, 1:2]], 1)

    def inner(num_points, seed):
        points = evenly_random((0, 0), (1, 1))(num_points, seed)
        near = points[-(num_points // 3) :]
        # Towards 1 along y, and towards both ends along x, by the square.
        near[:, 1] = 1 - near[:, 1] ** 2
        near[:, 0] = np.where(near[:, 0] < 0.5, 2 * near[:, 0] ** 2, 1 - 2 * (1 - near[:, 0]) ** 2)
        return points

    def velocity_is(*velocity):
        return lambda w, p: w(p)[:, :2] - tf.constant([velocity], p.dtype)

    corner = lambda num_points, seed: np.zeros((num_points, 2))  # noqa: E731
    walls = lambda n, seed: np.concatenate(  # noqa: E731
        [evenly_random((0, 0), (1, 0))(n // 3, seed), sides((0, 0), (1, 1), axes=[0])(n - n // 3, seed)]
    )
    terms = {
        "equation": Term(equation, inner, 2400),
        "lid": Term(velocity_is(1.0, 0.0), evenly_random((0, 1), (1, 1)), 150, weight=5.0),
        "walls": Term(velocity_is(0.0, 0.0), walls, 300, weight=5.0),
        "pressure": Term(lambda w, p: w(p)[:, 2:], corner, 1),
    }
    return Problem(units, (0, 0), (1, 1), terms, reference=_cavity_on_grid)


@functools.cache
def _cavity_on_grid():
    points = grid_points(cavity())
    # By extrapolation to spaces of zero. Near the upper corners differences do not converge.
    coarse, fine = (cavity_solution(num_spaces)(points) for num_spaces in (64, 128))
    is_near = np.hypot(np.minimum(points[:, 0], 1 - points[:, 0]), 1 - points[:, 1]) < CORNER
    return np.where(is_near[:, None], np.nan, (4 * fine - coarse) / 3)


def cavity_solution(num_spaces):
    """Returns a function of points `(N, 2)`, the velocities `(N, 2)` of `cavity`, by differences of the stream function and Newton's method.

    u = s_y, v = -s_x, and s_y (Laplace s)_x - s_x (Laplace s)_y = (Laplace)^2 s / Re. The differences have second order.

    Args:
        num_spaces: Integer, of the grid along each coordinate.
    """
    h, inner = 1 / num_spaces, num_spaces - 1
    one = np.ones(inner)
    identity = sparse.identity(inner)
    first = sparse.diags([-one[1:], one[1:]], [-1, 1]) / (2 * h)
    second = sparse.diags([one[1:], -2 * one, one[1:]], [-1, 0, 1]) / h**2
    # Ghost points mirror the first inner ones; the lid's slope adds 2 h at the top.
    at_walls = 6 * one
    at_walls[[0, -1]] = 7
    fourth = sparse.diags([one[2:], -4 * one[1:], at_walls, -4 * one[1:], one[2:]], [-2, -1, 0, 1, 2]) / h**4
    along_x, along_y = (lambda a: sparse.kron(a, identity, "csr")), (lambda a: sparse.kron(identity, a, "csr"))
    s_x, s_y = along_x(first), along_y(first)
    biharmonic = along_x(fourth) + along_y(fourth) + 2 * along_x(second) @ along_y(second)
    # Of the Laplacian: its slopes by values at inner points and, at walls, by what it is there.
    of_third = _third_difference(inner, h)
    laplace_x = along_x(of_third) + s_x @ along_y(second)
    laplace_y = along_y(of_third) + s_y @ along_x(second)
    lid = np.zeros((inner, inner))
    lid[:, -1] = 2 * h
    by_lid = {"biharmonic": (lid / h**4).ravel(), "laplace_y": (lid / (2 * h**3)).ravel()}
    s = np.zeros(inner**2)
    for _ in range(12):
        u, v = s_y @ s, -(s_x @ s)
        w_x, w_y = laplace_x @ s, laplace_y @ s + by_lid["laplace_y"]
        residual = u * w_x + v * w_y - (biharmonic @ s + by_lid["biharmonic"]) / REYNOLDS
        matrix = (
            sparse.diags(u) @ laplace_x
            + sparse.diags(w_x) @ s_y
            + sparse.diags(v) @ laplace_y
            - sparse.diags(w_y) @ s_x
            - biharmonic / REYNOLDS
        )
        step = linalg.spsolve(matrix.tocsc(), residual)
        s = s - step
        if np.abs(step).max() < 1e-13:
            break
    nodes, padded = np.linspace(0, 1, num_spaces + 1), np.zeros((num_spaces + 1,) * 2)
    padded[1:-1, 1:-1] = s.reshape(inner, inner)
    spline = interpolate.RectBivariateSpline(nodes, nodes, padded)

    def velocities(points):
        x, y = points[:, 0], points[:, 1]
        u, v = spline.ev(x, y, dy=1), -spline.ev(x, y, dx=1)
        on_lid, on_wall = y == 1, (x == 0) | (x == 1) | (y == 0)
        u = np.where(on_lid, 1.0, np.where(on_wall, 0.0, u))
        return np.stack([u, np.where(on_lid | on_wall, 0.0, v)], 1)

    return velocities


def _third_difference(size, h):
    """The third difference along a line of inner points, zero at its ends, whose ghost points mirror the first inner ones."""
    one = np.ones(size)
    matrix = sparse.lil_matrix(sparse.diags([-one[2:], 2 * one[1:], -2 * one[1:], one[2:]], [-2, -1, 1, 2]))
    matrix[0, 0], matrix[-1, -1] = -1, 1
    return matrix.tocsr() / (2 * h**3)


def schroedinger(units=(30, 30, 30, 2)):
    """The equation i h_t + h_xx / 2 + |h|^2 h = 0 from 2 / cosh x, real and imaginary part; the start is met exactly.

    The solution is the bound state of two solitons (Satsuma & Yajima, 1974), given at both ends in place of a period: that would have a kink there.
    """
    low, high = (0, -5), (PI / 2, 5)

    def exact(p):
        t, x = p[:, :1], p[:, 1:]
        common = tf.cosh(4 * x) + 4 * tf.cosh(2 * x) + 3 * tf.cos(4 * t)
        real, imaginary = tf.cosh(3 * x) + 3 * tf.cos(4 * t) * tf.cosh(x), 3 * tf.sin(4 * t) * tf.cosh(x)
        c, s = tf.cos(t / 2), tf.sin(t / 2)
        return 4 * tf.concat([real * c - imaginary * s, real * s + imaginary * c], 1) / common

    def equation(h, p):
        value, h_t, h_xx = derivatives(h, p, "tx", "u", "u_t", "u_xx")
        size = tf.reduce_sum(value**2, 1, keepdims=True)
        rest = h_xx / 2 + size * value
        return tf.concat([h_t[:, :1] + rest[:, 1:], rest[:, :1] - h_t[:, 1:]], 1)

    def transform(p, output):
        t, x = p[:, :1], p[:, 1:]
        return tf.concat([2 / tf.cosh(x), tf.zeros_like(x)], 1) + t * output

    def inner(num_points, seed):
        points = evenly_random(low, high)(num_points, seed)
        # Denser where the solitons are.
        points[::2, 1] *= np.abs(points[::2, 1]) / 5
        return points

    terms = {
        "equation": Term(equation, inner, 3000),
        "ends": Term(equals(exact), sides(low, high, axes=[1]), 200, weight=10.0),
    }
    return Problem(units, low, high, terms, exact, transform=transform)


# A fourth derivative.

SPREAD = 100 / 16  # The period of 2 pi stands for one of 32 pi, and the times for 100 times as long.
KURAMOTO_SIVASHINSKY_END = 0.1


def kuramoto_sivashinsky(units=(30, 30, 30, 1)):
    """u_t + (100/16) u u_x + (100/16^2) u_xx + (100/16^4) u_xxxx = 0, u = cos x (1 + sin x) at the start, met exactly; periodic by features.

    Waves steepen to fronts, where the second derivative feeds what the fourth one damps. Later the solution is chaotic.
    """

    def equation(u, p):
        value, t, x, xx, xxxx = derivatives(u, p, "tx", "u", "u_t", "u_x", "u_xx", "u_xxxx")
        return t + SPREAD * value * x + SPREAD / 16 * xx + SPREAD / 16**3 * xxxx

    def transform(p, output):
        x = p[:, 1:]
        return tf.cos(x) * (1 + tf.sin(x)) + p[:, :1] * output

    low, high = (0, 0), (KURAMOTO_SIVASHINSKY_END, 2 * PI)
    terms = {"equation": Term(equation, evenly_random(low, high), 4000)}
    return Problem(units, low, high, terms, None, _kuramoto_sivashinsky_on_grid, periodic, transform)


@functools.cache
def _kuramoto_sivashinsky_on_grid():
    return kuramoto_sivashinsky_solution().reshape(-1, 1)


def kuramoto_sivashinsky_solution(num_points=255 * 4, steps_per_row=10):
    """Returns the solution of `kuramoto_sivashinsky` by Fourier modes in x and exponential Runge-Kutta steps in t.

    Args:
        num_points: Integer, points along x, a multiple of 255: the grid has 255 spaces.
        steps_per_row: Integer, steps for a hundredth of the time.

    Returns:
        Array `(101, 256)`.
    """
    k = np.arange(num_points // 2 + 1)
    linear = SPREAD / 16 * k**2 - SPREAD / 16**3 * k**4

    def transport_of(modes):
        return -SPREAD / 2 * 1j * k * np.fft.rfft(np.fft.irfft(modes, num_points) ** 2)

    x = 2 * PI * np.arange(num_points) / num_points
    start = np.cos(x) * (1 + np.sin(x))
    step = KURAMOTO_SIVASHINSKY_END / 100 / steps_per_row
    later = exponential_steps(linear, transport_of, np.fft.rfft(start), step, 100 * steps_per_row)
    rows = [start, *(np.fft.irfft(v, num_points) for v in later[steps_per_row - 1 :: steps_per_row])]
    rows = np.array(rows)[:, :: num_points // 255]
    return np.concatenate([rows, rows[:, :1]], 1)


# Three dimensions.


def bratu():
    """u_xx + u_yy + u_zz + exp u = q on the unit cube with u = sin(pi x) sin(pi y) sin(pi z); 0 on the boundary is met exactly."""
    low, high = (0,) * 3, (1,) * 3

    def exact(p):
        return tf.reduce_prod(tf.sin(PI * p), 1, keepdims=True)

    def equation(u, p):
        value, *second = derivatives(u, p, "xyz", "u", "u_xx", "u_yy", "u_zz")
        return tf.add_n(second) + tf.exp(value) - tf.exp(exact(p)) + 3 * PI**2 * exact(p)

    def transform(p, output):
        return 16 * tf.reduce_prod(p * (1 - p), 1, keepdims=True) * output

    terms = {"equation": Term(equation, evenly_random(low, high), 3000)}
    return Problem((30, 30, 1), low, high, terms, exact, transform=transform)


# Holes.

HOLES = ((0.3, 0.3), (-0.3, 0.3), (0.3, -0.3), (-0.3, -0.3))
RADIUS = 0.1


def holes(units=(30, 30, 30, 1)):
    """u_xx + u_yy = 0 on a square with four round holes, 1 on its sides and 0 on theirs; points by DeepXDE's geometry."""
    from keras_hf.deepxde import dde

    low, high = (-0.5, -0.5), (0.5, 0.5)
    square, disks = dde.geometry.Rectangle(low, high), [dde.geometry.Disk(center, RADIUS) for center in HOLES]
    domain = functools.reduce(dde.geometry.CSGDifference, disks, square)

    def equation(u, p):
        return tf.add_n(derivatives(u, p, "xy", "u_xx", "u_yy"))

    def inner(num_points, seed):
        np.random.seed(seed)  # noqa: NPY002 (DeepXDE's own)
        near = np.concatenate([_around(num_points // 12, seed + k, center) for k, center in enumerate(HOLES)])
        return np.concatenate([domain.random_points(num_points - len(near), "pseudo"), near])

    def rims(num_points, seed):
        angles = 2 * PI * np.arange(num_points // 4) / (num_points // 4)
        circle = RADIUS * np.stack([np.cos(angles), np.sin(angles)], 1)
        return np.concatenate([circle + center for center in HOLES])

    terms = {
        "equation": Term(equation, inner, 3000),
        "sides": Term(lambda u, p: u(p) - 1.0, sides(low, high), 200, weight=100.0),
        "rims": Term(value, rims, 240, weight=100.0),
    }
    return Problem(units, low, high, terms, exact=None, reference=_holes_on_grid)


def _around(num_points, seed, center):
    """Points around a hole, as far from its rim as its radius at most, denser towards it."""
    part = evenly_random((0, 0), (1, 2 * PI))(num_points, seed)
    radius = RADIUS * (1.0 + part[:, 0] ** 2)
    return np.stack([np.cos(part[:, 1]), np.sin(part[:, 1])], 1) * radius[:, None] + center


@functools.cache
def _holes_on_grid():
    points = grid_points(holes())
    found = holes_solution(points)
    inside = np.any([np.hypot(*(points - center).T) < RADIUS for center in HOLES], 0)
    return np.where(inside[:, None], np.nan, found)


def holes_solution(points, degree=16):
    """Returns the solution of `holes`, `(N, 1)`, a sum of harmonic functions fitted to the boundary by least squares, to about 1e-9.

    Powers up to `4 * degree` around the middle, and logarithms and negative powers around each hole; each scaled to be at most 1.

    Args:
        points: Array `(N, 2)`.
        degree: Integer.
    """

    def columns(p):
        z = p[:, 0] + 1j * p[:, 1]
        found = [np.ones(len(z))]
        for k in range(1, 4 * degree + 1):
            found += [((z / math.sqrt(0.5)) ** k).real, ((z / math.sqrt(0.5)) ** k).imag]
        for x, y in HOLES:
            away = (z - (x + 1j * y)) / RADIUS
            found.append(np.log(np.abs(away)))
            for k in range(1, degree + 1):
                found += [(away**-k).real, (away**-k).imag]
        return np.stack(found, 1)

    along = np.linspace(-0.5, 0.5, 400)
    side = np.stack([along, np.full(400, 0.5)], 1)
    square = np.concatenate([side, side * [1, -1], side[:, ::-1], side[:, ::-1] * [-1, 1]])
    angles = np.linspace(0, 2 * PI, 200, endpoint=False)
    circle = RADIUS * np.stack([np.cos(angles), np.sin(angles)], 1)
    rims = np.concatenate([circle + center for center in HOLES])
    given = np.concatenate([np.ones(len(square)), np.zeros(len(rims))])
    coefficients = np.linalg.lstsq(columns(np.concatenate([square, rims])), given, rcond=1e-14)[0]
    return (columns(points) @ coefficients)[:, None]


# Noisy data.


def inverse_noisy(noise=0.05):
    """`inverse` with data that carry normal noise, and the initial values unknown: the coefficient's error is then that of the data."""
    low, high = (0, 0), (1, 1)
    diffusivity = keras.Variable(1.0, dtype="float64", name="diffusivity")

    def exact(p):
        return tf.exp(-(PI**2) * p[:, :1] / 4) * tf.sin(PI * p[:, 1:])

    def equation(u, p):
        u_t, u_xx = derivatives(u, p, "tx", "u_t", "u_xx")
        return u_t - diffusivity * u_xx

    def measured(p):
        return exact(tf.constant(p)).numpy() + noise * np.random.default_rng(0).normal(size=(len(p), 1))

    terms = {
        "equation": Term(equation, grid(low, high), 900),
        "data": Term(value, evenly_random(low, high), 500, values=measured),
    }
    return Problem((32, 1), low, high, terms, exact, coefficients={"diffusivity": (diffusivity, 0.25)})


PROBLEMS = {
    "cavity": cavity,
    "schroedinger": schroedinger,
    "kuramoto-sivashinsky": kuramoto_sivashinsky,
    "bratu": bratu,
    "holes": holes,
    "inverse-noisy": inverse_noisy,
}
