"""Times Gauss-Newton products in PyTorch; see `benchmarks.peers.products`, which runs this."""

import numpy as np
import torch
from backpack.hessianfree.ggnvp import ggn_vector_product
from curvlinops import GGNLinearOperator

from benchmarks.peers import handover, timings

ACTIVATIONS = {"sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh}


def network(layers):
    """Returns a `torch.nn.Sequential` whose outputs are the last layer's total inputs."""
    modules = []
    for layer in layers:
        linear = torch.nn.Linear(*layer.kernel.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(layer.kernel.T))
            linear.bias.copy_(torch.from_numpy(layer.bias))
        modules += [linear, ACTIVATIONS[layer.activation]()] if layer.activation in ACTIVATIONS else [linear]
    if layers[-1].activation in ACTIVATIONS:
        modules.pop()
    return torch.nn.Sequential(*modules)


def parameters(vector, layers):
    """Returns a flat vector in Keras' order as a list of tensors in the shapes, and the order, of PyTorch's parameters."""
    parts = handover.split(vector, layers)
    return [torch.tensor(array).contiguous() for kernel, bias in parts for array in (kernel.T, bias)]


def flat(tensors):
    """Returns tensors in the shapes of PyTorch's parameters as a flat vector in Keras' order, an array."""
    return np.concatenate([tensor.detach().numpy().T.ravel() for tensor in tensors])


def measure(layers, arrays, rounds):
    """Yields the timings of each library; see `timings.main`."""
    model, x, y = network(layers), torch.tensor(arrays["x"]), torch.tensor(arrays["y"])
    weights, v = list(model.parameters()), parameters(arrays["v"], layers)
    # The losses of PyTorch divide by the number of outputs, too.
    losses = {"squares": torch.nn.MSELoss, "cross-entropy": torch.nn.BCEWithLogitsLoss}
    loss, scale = losses[str(arrays["loss"])](), y.shape[1]

    def gradient():
        return torch.autograd.grad(loss(model(x), y), weights)

    operator = GGNLinearOperator(model, loss, weights, [(x, y)], check_deterministic=False)
    outputs = model(x)
    value, as_one = loss(outputs, y), torch.cat([part.ravel() for part in v])
    ways = {
        "PyTorch, curvlinops": lambda: operator @ as_one,
        "PyTorch, BackPACK": lambda: ggn_vector_product(value, outputs, model, v),
    }
    gradient()
    for name, product in ways.items():
        found = product()
        if isinstance(found, torch.Tensor):
            found = [
                part.view(w.shape) for part, w in zip(found.split([w.numel() for w in weights]), weights, strict=True)
            ]
        difference = np.linalg.norm(scale * flat(found) - arrays["product"]) / np.linalg.norm(arrays["product"])

        def repeated(product=product):
            for _ in range(timings.REPEATS):
                product()

        seconds = [
            (timings.seconds_of(gradient), timings.seconds_of(repeated) / timings.REPEATS) for _ in range(rounds)
        ]
        yield name, *np.median(seconds, 0), difference


if __name__ == "__main__":
    timings.main(measure)
