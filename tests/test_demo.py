"""What the demo promises: two acts of the length stated, by settings that were tuned on another seed, with a table and a figure each."""

import keras
import pytest

from examples import autoencoder, demo, pinn
from examples import pinn_problems as problems


def test_the_acts_take_less_than_four_minutes_of_training_and_show_seed_0():
    acts = pinn.parse(demo.POISSON.split()), autoencoder.parse(demo.CURVES.split())
    assert [args.seed for args in acts] == [0, 0]
    assert (
        sum(args.seconds * len(methods) for args, methods in zip(acts, (acts[0].methods, acts[1].method), strict=True))
        < 200
    )


def test_no_rate_is_tried_on_the_seed_that_is_shown():
    assert len(pinn.parse(demo.POISSON.split()).rates) == 1
    assert demo.__doc__.count("--seed 1") == 2


@pytest.mark.slow
def test_the_demo_plays_both_acts_at_toy_size(tmp_path, capsys, monkeypatch):
    problem = problems.poisson()
    terms = {name: term._replace(num_points=16) for name, term in problem.terms.items()}
    monkeypatch.setitem(problems.PROBLEMS, "poisson", lambda: problem._replace(units=(4, 1), terms=terms))
    monkeypatch.setitem(autoencoder.SETTINGS, ("curves", "demo"), autoencoder.Setting((8, 3), 50, None))
    for name in ("POISSON", "CURVES"):
        monkeypatch.setattr(demo, name, f"{getattr(demo, name)} --updates 2 --seconds 60")
    demo.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")]
    methods = [name for name in rows if name not in ("method", "---")]
    first, second = methods[:3], methods[3:]
    assert (first[0], first[2]) == ("Hessian-free (keras_hf)", "L-BFGS") and first[1].startswith("Adam, rate ")
    assert second == ["Hessian-free (keras_hf)", "Adam", "Nesterov momentum"]
    for name in ("poisson-seed0.png", "autoencoder/errors.png", "autoencoder/reconstructions.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert keras.config.floatx() == "float32"
