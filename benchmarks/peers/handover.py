"""Hands a network and its cases over to libraries in other environments, as one NPZ file, and starts them there. Needs NumPy alone.

Arrays of a file: of each `Dense` layer, from the inputs on, `kernel_0` `(inputs, units)`, `bias_0` `(units,)` and `activation_0`, a string; and
whatever else is given. A flat vector of weights has kernel, bias, kernel, bias, ..., each row by row.
"""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np

ENVIRONMENTS = Path(".venv-peers")
FOLDER = Path("runs", "peers")


class Layer(NamedTuple):
    """A layer `activation(x @ kernel + bias)`.

    Attributes:
        kernel: Array `(inputs, units)`.
        bias: Array `(units,)`.
        activation: String, Keras' name of it.
    """

    kernel: np.ndarray
    bias: np.ndarray
    activation: str


def save(path, layers, **arrays):
    """Writes a file.

    Args:
        path: Path of the NPZ file; its folder is made.
        layers: List of `keras.layers.Dense`, built, each with a bias.
        **arrays: What else is handed over: arrays, strings or numbers.
    """
    for number, layer in enumerate(layers):
        arrays[f"kernel_{number}"], arrays[f"bias_{number}"] = layer.get_weights()
        arrays[f"activation_{number}"] = layer.activation.__name__
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def load(path):
    """Returns the layers of a file, a list of `Layer`s, and a dict of its other arrays."""
    with np.load(path) as file:
        arrays = dict(file)
    layers = []
    while f"kernel_{len(layers)}" in arrays:
        kernel, bias, activation = (arrays.pop(f"{name}_{len(layers)}") for name in Layer._fields)
        layers.append(Layer(kernel, bias, str(activation)))
    return layers, arrays


def flat(layers):
    """Returns the weights of layers as one vector `(n,)`."""
    return np.concatenate([array.ravel() for layer in layers for array in layer[:2]])


def split(vector, layers):
    """Returns the parts of a vector `(n,)`, an array of NumPy or of a peer: for each layer a pair in the shapes of its kernel and its bias."""
    parts, start = [], 0
    for kernel, bias, _ in layers:
        middle, end = start + kernel.size, start + kernel.size + bias.size
        parts.append((vector[start:middle].reshape(kernel.shape), vector[middle:end]))
        start = end
    return parts


def run_all(runs):
    """Runs modules in the environments of peers, in sequence. A peer that is not installed is left out, with a message.

    Args:
        runs: Iterable of tuples: the folder in `.venv-peers`, which `make peers` fills, a module of this package, and what stands on its command
            line.

    Raises:
        SystemExit: If a run failed, with the names of all that did, once the others have ended.
    """
    failed = [module for environment, module, *arguments in runs if not _run(environment, module, arguments)]
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


def _run(environment, module, arguments):
    """Runs a module; returns whether it did not fail."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        print(f"{module}: no {python}; `make peers` makes it.", flush=True)
        return True
    command = [str(python), "-m", f"benchmarks.peers.{module}", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}).returncode == 0
