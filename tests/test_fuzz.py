"""Ten fixed draws of the fuzzer, so that it does not rot, and that its oracles share nothing with the package."""

import ast
import random
from pathlib import Path

import keras
import pytest
from fuzz import oracles
from fuzz.draw import Program
from fuzz.run import outcome_of

from examples.precision import precision


@pytest.fixture(autouse=True)
def dtype_of_programs():
    """Programs set Keras' types."""
    with precision(keras.config.floatx()):
        yield


@pytest.mark.parametrize("seed", [1, 23, 30, 36, 38, 49, 54, 58, 71, 73])
def test_drawn_programs_have_the_properties_that_dense_oracles_know(seed):
    outcome = outcome_of(Program(random.Random(seed).choice))
    assert outcome.kind == "ok", outcome.signature


def test_a_wrong_loss_fails_by_a_script_that_compiles_and_names_the_property():
    program = Program(random.Random(1).choice)
    # The model's loss, and not the oracle's.
    wrong = "model.compile(loss=lambda y, p: tf.reduce_sum(tf.abs(p) + 7.0, -1))"
    program.source = program.source.replace("    return types", f"    {wrong}\n    return types")
    outcome = outcome_of(program, ["loss_gradient_and_product"])
    assert outcome.kind == "failed" and outcome.signature.startswith(
        "loss_gradient_and_product: AssertionError: loss: off"
    )
    compile(outcome.script, "script", "exec")
    assert "fuzz." not in outcome.script and "def compare_products(" in outcome.script


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
