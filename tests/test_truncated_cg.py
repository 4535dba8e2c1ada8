"""What the solver by conjugate gradients promises of its settings; what its steps promise, test_update.py lists."""

import math

import keras
import numpy as np
import pytest

from keras_hf import (
    ConjugateGradient,
    EmpiricalFisherDiagonal,
    GaussNewton,
    Identity,
    RelativeProgress,
    ResidualTolerance,
    recipe_of_2010,
)

NUMBER_ERRORS = [
    ("warm_start_decay", [-0.1, 1.5, math.nan, "0.95", None, False], r"a finite number in \[0, 1\]"),
    ("max_iterations", [0, -3, 2.5, 250.0, "250", None, True], "an integer >= 1"),
    ("max_kept_iterates", [0, -3, 2.5, "all", True], "an integer >= 1 or `None`"),
]


@pytest.mark.parametrize(("name", "values", "rule"), NUMBER_ERRORS)
def test_numbers_out_of_range_are_refused(name, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be {rule}. Received: {name}="):
            ConjugateGradient(**{name: value})


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    for arguments in ({"warm_start_decay": 0}, {"warm_start_decay": 1}, {"max_iterations": np.int64(1)}):
        config = ConjugateGradient(**arguments).get_config()
        assert {name: config[name] for name in arguments} == arguments
        assert {type(config["max_iterations"]), type(config["warm_start_decay"])} == {int, float}


@pytest.mark.parametrize(
    ("name", "kind", "example", "other"),
    [
        ("preconditioner", "Preconditioner", r"KroneckerFactored\(\)", RelativeProgress()),
        ("stopping", "StoppingRule", r"RelativeProgress\(\)", GaussNewton()),
    ],
)
def test_parts_that_are_not_objects_of_their_kind_are_refused(name, kind, example, other):
    message = f"`{name}` must be a `{kind}` object, such as `{example}`. Received: {name}="
    for value in ("identity", Identity, 0.5, other, False):
        with pytest.raises(TypeError, match=message):
            ConjugateGradient(**{name: value})


@pytest.mark.parametrize(
    "solver", [ConjugateGradient(), recipe_of_2010(), ConjugateGradient(Identity(), ResidualTolerance(0.1), 7, 0.5, 3)]
)
def test_configuration_survives_saving(solver):
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(solver))
    assert type(restored) is ConjugateGradient
    assert restored.get_config() == solver.get_config()


def test_the_recipe_has_the_constants_of_the_paper():
    recipe = recipe_of_2010()
    assert type(recipe.preconditioner) is EmpiricalFisherDiagonal and recipe.preconditioner.exponent == 0.75
    assert type(recipe.stopping) is RelativeProgress and recipe.stopping.tolerance == 5e-4
    assert (recipe.max_iterations, recipe.warm_start_decay) == (250, 0.95)
