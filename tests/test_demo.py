"""What the demo promises: two acts of the length stated, by settings that were tuned on another seed, with a table and a figure each."""

import keras
import pytest

from examples import autoencoder, demo, pinn
from examples import pinn_problems as problems


def test_the_acts_show_what_they_say_on_seed_0_in_less_than_four_minutes_of_training():
    acts = pinn.parse(demo.POISSON.split()), autoencoder.parse(demo.CURVES.split())
    methods = acts[0].methods, acts[1].method
    assert methods == (["hf", "adam", "lbfgs"], ["hf", "adam", "nag"])
    assert [args.seed for args in acts] == [0, 0]
    assert sum(args.seconds * len(names) for args, names in zip(acts, methods, strict=True)) < 200


def test_no_rate_is_tried_on_the_seed_that_is_shown():
    assert len(pinn.parse(demo.POISSON.split()).rates) == 1
    assert demo.__doc__.count("--seed 1") == 2


@pytest.mark.slow
def test_the_demo_plays_both_acts_at_toy_size(tmp_path, capsys, monkeypatch):
    problem = problems.poisson()
    terms = {name: term._replace(num_points=16) for name, term in problem.terms.items()}
    monkeypatch.setitem(problems.PROBLEMS, "poisson", lambda: problem._replace(units=(4, 1), terms=terms))
    monkeypatch.setitem(autoencoder.SETTINGS, ("curves", "demo"), autoencoder.Setting((8, 3), 50, None))
    # Ours is played in the tests of either example.
    for name, methods in {"POISSON": "--methods adam lbfgs", "CURVES": "--method adam nag"}.items():
        monkeypatch.setattr(demo, name, f"{getattr(demo, name)} {methods} --updates 2 --seconds inf")
    demo.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")]
    methods = [name for name in rows if name not in ("method", "---")]
    assert methods == ["Adam, rate 0.1", "L-BFGS", "Adam", "Nesterov momentum"]
    for name in ("poisson-seed0.png", "autoencoder/errors.png", "autoencoder/reconstructions.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert keras.config.floatx() == "float32"
