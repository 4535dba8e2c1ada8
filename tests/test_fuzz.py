"""Ten fixed draws of the fuzzer, so that it does not rot, and that its oracles share nothing with the package."""

import ast
import random
from pathlib import Path

import pytest
from fuzz import oracles
from fuzz.draw import Program
from fuzz.properties import loss_gradient_and_product, update
from fuzz.run import outcome_of, script_of


@pytest.mark.parametrize("seed", [0, 1, 3, 4, 5, 7, 8, 9, 11, 13])
def test_products_of_a_drawn_network_are_those_of_dense_matrices(seed, float64):
    outcome = outcome_of(Program(random.Random(seed).choice), [loss_gradient_and_product])
    assert outcome.kind == "ok", outcome.signature


def test_a_wrong_loss_fails_by_a_script_that_compiles_and_names_the_property(float64):
    program = Program(random.Random(0).choice)
    # The model's loss, and not the oracle's.
    program.source += "\nmodel.compile(loss=lambda y, p: tf.reduce_sum(tf.abs(p) + 7.0, -1))"
    outcome = outcome_of(program, [loss_gradient_and_product])
    assert outcome.kind == "failed" and outcome.signature.startswith(
        "loss_gradient_and_product: AssertionError: loss: off"
    )
    compile(outcome.script, "script", "exec")
    assert "fuzz" not in script_of(program, update)


def test_oracles_import_nothing_of_the_package_and_stay_short():
    text = Path(oracles.__file__).read_text()
    imported = {
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert (
        imported == {"contextlib", "keras", "numpy", "tensorflow"}
        and "from " not in text.split('"""')[2].split("def ")[0]
    )
    assert len(text.splitlines()) <= 250
