"""Fits by optimistix, jaxopt and ssbroyden-optimistix; see `benchmarks.peers.fits`, which runs this."""

import jax

jax.config.update("jax_enable_x64", True)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxopt  # noqa: E402
import numpy as np  # noqa: E402
import optimistix  # noqa: E402
import ssbroyden_optimistix  # noqa: E402

from benchmarks.peers import handover, small_problems  # noqa: E402


def fits(layers, problem):
    """Returns the methods; see `small_problems.main`."""
    arrays = {name: jnp.asarray(array) for name, array in problem.items()}

    def residuals(weights, args=None):
        return small_problems.residuals(jnp, weights, layers, arrays)

    def loss(weights, args=None):
        return jnp.sum(residuals(weights) ** 2)

    start = jnp.asarray(handover.flat(layers))
    # Not with `geodesic=True`, which forms the second derivatives of all residuals: an update of Poisson's equation then takes four seconds.
    by_jaxopt = {f"jaxopt-lm-{solver}": {"solver": solver} for solver in ("cholesky", "qr")}
    return {
        "optimistix-lm": of_optimistix(optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0), residuals, start),
        **{name: of_jaxopt(residuals, start, **settings) for name, settings in by_jaxopt.items()},
        "ssbroyden": of_optimistix(ssbroyden_optimistix.SSBroyden(rtol=0.0, atol=0.0), loss, start),
    }


def of_optimistix(solver, function, start):
    """Returns the updates of a solver of optimistix as `small_problems.main` wants them; an evaluation of a line search counts as an update."""

    def with_aux(weights, args):
        return function(weights), None

    tags = frozenset()
    structure = jax.eval_shape(function, start)
    state = eqx.filter_jit(solver.init)(with_aux, start, None, {}, structure, None, tags)
    dynamic, static = eqx.partition(state, eqx.is_array)

    @jax.jit
    def advance(weights, dynamic, count):
        def update(_, carry):
            weights, state, _ = solver.step(with_aux, carry[0], None, {}, eqx.combine(carry[1], static), tags)
            return weights, eqx.partition(state, eqx.is_array)[0]

        return jax.lax.fori_loop(0, count, update, (weights, dynamic))

    return _stepper(advance, start, dynamic)


def of_jaxopt(function, start, **settings):
    """Returns the updates of jaxopt's Levenberg-Marquardt as `small_problems.main` wants them."""
    solver = jaxopt.LevenbergMarquardt(function, maxiter=10**9, tol=0.0, materialize_jac=True, **settings)
    update = jax.jit(solver.update)

    def advance(weights, state, count):
        for _ in range(int(count)):
            weights, state = update(weights, state)
        return weights, state

    return _stepper(advance, start, solver.init_state(start))


def _stepper(advance, weights, state):
    """Compiles, and returns a function that goes on where its last call ended."""
    # Twice: of jaxopt the second update has another state than the first.
    jax.block_until_ready(advance(*advance(weights, state, 1), 1))

    def step(count):
        nonlocal weights, state
        weights, state = advance(weights, state, count)
        return np.asarray(weights)

    return step


if __name__ == "__main__":
    small_problems.main(fits)
