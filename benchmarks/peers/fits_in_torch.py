"""Fits by PyTorch's L-BFGS; see `benchmarks.peers.fits`, which runs this."""

import torch

from benchmarks.peers import handover, small_problems


def fits(layers, problem):
    """Returns the one method; see `small_problems.main`."""
    arrays = {name: torch.tensor(array) for name, array in problem.items()}
    weights = torch.tensor(handover.flat(layers), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights],
        history_size=50,
        max_eval=10**9,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = torch.sum(small_problems.residuals(torch, weights, layers, arrays) ** 2)
        loss.backward()
        return loss

    def advance(count):
        optimizer.param_groups[0]["max_iter"] = count
        optimizer.step(closure)
        return weights.detach().numpy().copy()

    return {"torch-lbfgs": advance}


if __name__ == "__main__":
    small_problems.main(fits)
