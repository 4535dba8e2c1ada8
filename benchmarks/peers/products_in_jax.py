"""Times Gauss-Newton products in JAX; see `benchmarks.peers.products`, which runs this."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import handover, timings

ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "linear": lambda x: x}


def measure(layers, arrays, rounds):
    """Yields the timings of the one way that there is; see `timings.main`."""
    x, y, v = (jnp.asarray(arrays[name]) for name in ("x", "y", "v"))
    is_logistic = str(arrays["loss"]) == "cross-entropy"

    def outputs(weights):
        a = x
        for (kernel, bias), layer in zip(handover.split(weights, layers), layers, strict=True):
            z = a @ kernel + bias
            a = ACTIVATIONS[layer.activation](z)
        return z

    def loss(weights):
        z = outputs(weights)
        of_cases = jnp.logaddexp(z, 0) - y * z if is_logistic else jnp.square(z - y)
        return jnp.sum(of_cases) / len(x)

    @jax.jit
    def products(weights, v, scale, count):
        """The last of `count` products, each with the one before, times `scale`."""
        z, jacobian = jax.linearize(outputs, weights)
        transposed = jax.vjp(outputs, weights)[1]
        p = jax.nn.sigmoid(z)
        second = (p * (1 - p) if is_logistic else jnp.full_like(z, 2.0)) / len(x)
        return jax.lax.fori_loop(0, count, lambda _, v: scale * transposed(second * jacobian(v))[0], v)

    weights, gradient = jnp.asarray(handover.flat(layers)), jax.jit(jax.grad(loss))

    def repeated(count):
        return timings.seconds_of(lambda: products(weights, v, 1e-3, count).block_until_ready())

    difference = np.linalg.norm(products(weights, v, 1.0, 1) - arrays["product"]) / np.linalg.norm(arrays["product"])
    gradient(weights), repeated(1)
    seconds = [
        (
            timings.seconds_of(lambda: gradient(weights).block_until_ready()),
            (repeated(timings.REPEATS) - repeated(0)) / timings.REPEATS,
        )
        for _ in range(rounds)
    ]
    yield "JAX", *np.median(seconds, 0), difference


if __name__ == "__main__":
    timings.main(measure)
