"""What the demo promises: three acts of the length stated, by settings that were tuned on another seed, with a table and a figure each."""

import math

import keras
import pytest

from examples import autoencoder, demo, pinn, recurrent
from examples import pinn_problems as problems


def test_the_acts_show_what_they_say_on_seed_0_in_little_more_than_three_minutes_of_training():
    recurrent_runs = [recurrent.parse(run.split()) for run in (demo.MEMORY, demo.GATED)]
    acts = [pinn.parse(demo.POISSON.split()), *recurrent_runs, autoencoder.parse(demo.CURVES.split())]
    methods = [*(args.methods for args in acts[:3]), acts[3].method]
    assert methods == [["hf", "adam", "lbfgs"], ["hf", "adam"], ["gru"], ["hf", "adam", "nag"]]
    assert [args.seed for args in acts] == [0, 0, 0, 0]
    assert sum(args.seconds * len(names) for args, names in zip(acts, methods, strict=True)) < 200


def test_no_rate_is_tried_on_the_seed_that_is_shown():
    for rates in (
        pinn.parse(demo.POISSON.split()).rates,
        *(recurrent.parse(run.split()).rates for run in (demo.MEMORY, demo.GATED)),
    ):
        assert len(rates) == 1
    assert demo.__doc__.count("--seed 1") == 3


def test_what_is_said_of_the_errors_follows_from_them():
    runs = {"Adam": 4.18, "Hessian-free, defaults": 3.04, "Nesterov momentum": 2.78, "SGD": math.nan, "Muon": 3.041}
    said = demo.standing(
        {label: {"error": error} for label, error in runs.items()}, "error", lambda run: f"{run['error']:.2f}"
    )
    assert said == (
        "3.04 by Hessian-free, defaults: ahead of Adam (4.18) and SGD (nan), level with Muon (3.04), behind Nesterov momentum (2.78)."
    )


@pytest.mark.slow
def test_the_demo_plays_all_acts_at_toy_size(tmp_path, capsys, monkeypatch):
    problem = problems.poisson()
    terms = {name: term._replace(num_points=16) for name, term in problem.terms.items()}
    monkeypatch.setitem(problems.PROBLEMS, "poisson", lambda: problem._replace(units=(4, 1), terms=terms))
    monkeypatch.setitem(autoencoder.SETTINGS, ("curves", "demo"), autoencoder.Setting((8, 3), 50, None))
    # Ours is played in the tests of either example.
    for name, methods in {
        "POISSON": "--methods adam lbfgs",
        "MEMORY": "--methods adam --units 3 --length 10",
        "GATED": "--units 3 --length 10",
        "CURVES": "--method adam nag",
    }.items():
        monkeypatch.setattr(demo, name, f"{getattr(demo, name)} {methods} --updates 2 --seconds inf")
    monkeypatch.setattr(demo, "OURS", "Adam")
    demo.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")]
    methods = [name for name in rows if name not in ("method", "---")]
    assert methods == [
        "Adam, rate 0.1",
        "L-BFGS",
        "adam-0.0003",
        "adam-0.0003",
        "gru-0.01",
        "Adam",
        "Nesterov momentum",
    ]
    for said in ("Relative error", "Wrong sequences", "Training error", "Test error"):
        assert f"\n{said} " in printed
    for name in (
        "poisson-seed0.png",
        "recurrent/memory-5-10/seed0.png",
        "autoencoder/errors.png",
        "autoencoder/reconstructions.png",
    ):
        assert (tmp_path / name).stat().st_size > 0
    assert keras.config.floatx() == "float32"
