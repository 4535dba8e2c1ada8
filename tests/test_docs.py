"""What the pages of docs/ promise: their code runs as printed and prints what they show, and their links lead somewhere. `make docs` has the rest."""

import contextlib
import io
import itertools
import re
from pathlib import Path

import keras
import nbclient
import nbformat
import numpy as np
import pytest
import tensorflow as tf
import test_curvature
import test_damping
import test_preconditioners
import test_solver
import test_stopping
from problems import Problem, inputs, make_model, matrices, model_data, with_objective
from test_docstrings import REFERENCE

from benchmarks import gather
from benchmarks import rows as results
from docs import hooks
from examples import origins
from examples.precision import precision
from keras_hf import DoubleBackward, GaussNewton
from keras_hf.solvers.solver import LocalModel

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(name):
    """The Python blocks of a page, after as many empty lines as stand before them, so that errors name the page's lines."""
    text = PAGES[name].read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


# Pages that are notebooks, too, run as such.
AS_PRINTED = [name for name in PAGES if blocks(name) and name not in hooks.NOTEBOOKS]
# Pages that take less than a second.
QUICK = {"memory.md"}


# What stands below a block, as printed by it.
SHOWN = re.compile(r"\s*```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def run(name, codes):
    """Runs blocks of a page one after the other, and returns the names that they define. What they print is what the page shows."""
    namespace = {"__name__": "__main__"}
    text = PAGES[name].read_text(encoding="utf-8")
    for code in codes:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, PAGES[name], "exec"), namespace)
        _, block, below = text.partition(code.lstrip("\n") + "```\n")
        assert block
        assert_shown(below, printed.getvalue())
    return namespace


def assert_shown(below, printed):
    """Asserts that the output that a page shows below a block is what it printed: the same words, and numbers of the same size.

    Rounding differs between processors: numbers may differ by a factor of two, and of ten where a loss or a damping is nearly zero.
    """
    shown = SHOWN.match(below)
    if shown is None:
        return
    assert NUMBER.sub("0", printed).split() == NUMBER.sub("0", shown[1]).split()
    found, meant = ([float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (printed, shown[1]))
    for one, other in zip(found, meant, strict=True):
        factor = 2 if abs(other) > 0.01 else 10
        assert 1 / factor <= one / other <= factor if other else abs(one) < 0.1, (printed, shown[1])


@pytest.mark.parametrize(
    ("printed", "alike"),
    [
        ("loss 5e-17 of 61 weights", True),
        ("loss 5e-15 of 61 weights", False),
        ("loss 2e-17 of 100 weights", True),
        ("loss 2e-17 of 130 weights", False),
        ("loss 5e-17 of weights", False),
        ("losses 5e-17 of 61 weights", False),
    ],
)
def test_what_a_page_shows_is_told_from_other_output(printed, alike):
    with contextlib.nullcontext() if alike else pytest.raises(AssertionError):
        assert_shown("\n```text\nloss 2e-17 of 61 weights\n```\n", printed)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in AS_PRINTED]
)
def test_code_runs_as_printed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What a page sets ends with it.
    with precision("float32"):
        run(name, blocks(name))


def test_all_python_of_pages_is_run():
    assert len(AS_PRINTED) + len(hooks.NOTEBOOKS) > 10
    for name, path in PAGES.items():
        assert len(blocks(name)) == path.read_text(encoding="utf-8").count("```python"), name


def links(path):
    """Targets of a page's relative links, as pairs of a file and an anchor."""
    targets = re.findall(r"\]\(([^()\s]+)\)", path.read_text(encoding="utf-8"))
    relative = [target.partition("#") for target in targets if "://" not in target]
    return [(path.parent / file if file else path, anchor) for file, _, anchor in relative]


def anchors(path):
    """Anchors of a page's headings, as GitHub makes them, and of the names that it takes docstrings of."""
    text = path.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | set(
        re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    )


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *PAGES.values(), *REFERENCE], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_to_files_and_headings(path):
    for file, anchor in links(path):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), anchor


def test_the_index_names_every_page_and_the_readme_the_index():
    reference, *others = sorted(REFERENCE, key=lambda path: path.name != "README.md")
    named = {file.resolve() for file, _ in links(PAGES["README.md"]) if file.suffix == ".md"}
    assert named == {path for name, path in PAGES.items() if name != "README.md"} | {reference}
    assert PAGES["README.md"] in {file.resolve() for file, _ in links(ROOT / "README.md")}
    assert {file.resolve() for file, _ in links(reference)} == set(others)


def test_the_index_of_the_reference_links_every_name():
    index = next(path for path in REFERENCE if path.name == "README.md")
    linked = [(file.resolve(), anchor) for file, anchor in links(index) if anchor]
    assert sorted(linked) == sorted(
        (path, anchor) for path in REFERENCE for anchor in anchors(path) if anchor.startswith("keras_hf.")
    )


def test_the_architecture_names_every_module_and_program():
    text = PAGES["architecture.md"].read_text(encoding="utf-8")
    sections = re.split(r"^`(keras_hf/.*?|examples/)`", text, flags=re.MULTILINE)
    named = {
        folder.rstrip("/"): sorted(
            name for row in re.findall(r"^\| (`.*?) \|", rows, re.M) for name in re.findall(r"`(\w+\.py)`", row)
        )
        for folder, rows in zip(sections[1::2], sections[2::2], strict=True)
    }
    assert set(named) == {
        "keras_hf",
        *(str(path.parent.relative_to(ROOT)) for path in (ROOT / "keras_hf").glob("*/__init__.py")),
        "examples",
    }
    for folder, names in named.items():
        assert names == sorted(path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")


RESULTS = ROOT / "benchmarks" / "results"
_CITED = {
    (ROOT / path.rstrip("/.")).resolve()
    for page in [ROOT / "README.md", *PAGES.values()]
    for path in re.findall(r"benchmarks/results/[\w./-]+", page.read_text(encoding="utf-8"))
}


def test_cited_results_are_there():
    assert len(_CITED) > 10
    assert [path for path in _CITED if not path.exists()] == []


def test_every_result_is_cited_by_a_page():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert len(files) > 10 and [path for path in files if path not in _CITED] == []


def test_every_result_has_its_origin():
    assert {*origins.read(RESULTS)} == {str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.csv")}


@pytest.mark.parametrize("name", origins.read(RESULTS))
def test_origins_say_what_every_row_was_made_with(name):
    known, num_rows = origins.read(RESULTS)[name], len(results.read(RESULTS / name))
    assert all(re.match(r"20\d\d-\d\d-\d\d", origin["date"]) for origin in known)
    assert all(origin["command"] and origin["versions"] for origin in known)
    if "runs" in known[0]:
        runs = [gather.name_of(run) for run in results.read_runs(RESULTS / name)]
        assert sorted(run for origin in known for run in origin["runs"]) == sorted(runs)
    elif "rows" in known[0]:
        ranges = [part.split("-") for origin in known for part in origin["rows"].split(", ")]
        rows = [row for ends in ranges for row in range(int(ends[0]), int(ends[-1]) + 1)]
        assert sorted(rows) == [*range(1, num_rows + 1)]
    else:
        assert len(known) == 1


@pytest.mark.parametrize("name", hooks.NOTEBOOKS)
def test_a_notebook_runs_what_its_page_runs(name):
    cells = hooks.notebook(PAGES[name].read_text(encoding="utf-8")).cells
    assert [cell.source for cell in cells if cell.cell_type == "code"] == [code.strip() for code in blocks(name)]
    assert not any("](" in cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.slow
def test_notebooks_run_from_top_to_bottom(tmp_path):
    """In one kernel, each without the names of the one before, where a warning is an error as in the other tests."""
    cells = []
    for name in hooks.NOTEBOOKS:
        notebook = hooks.notebook(PAGES[name].read_text(encoding="utf-8"))
        start = nbformat.v4.new_code_cell("%reset -f\nimport warnings; warnings.simplefilter('error', UserWarning)")
        cells += [start, *notebook.cells]
    notebook.cells = cells
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, below in itertools.pairwise([*notebook.cells, nbformat.v4.new_markdown_cell()]):
        if cell.cell_type == "code":
            assert cell.execution_count
            assert_shown(
                below.source, "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            )


def test_prompts_of_docstrings_are_a_section_on_the_site():
    written = "Gives 2.\n\nExample:\n\n>>> f(1)\n2\n\nReferences:\n    Martens (2010)."
    assert hooks.with_examples(written) == (
        "Gives 2.\n\nExamples:\n    >>> f(1)\n    2\n\nReferences:\n    Martens (2010)."
    )
    assert hooks.with_examples("Example:\n\n>>> f(1)\n2") == "Examples:\n    >>> f(1)\n    2\n"


# The parts of writing-parts.md, held to the tests of the package's own.


@pytest.fixture(scope="module")
def parts():
    """The names that the page's files define."""
    files = [code for code in blocks("writing-parts.md") if code.lstrip().startswith('"""')]
    assert len(files) == 5
    return run("writing-parts.md", files)


def test_the_stopping_rule_keeps_to_its_tests(parts):
    rule = parts["NashSofer"](tolerance=0.25)
    test_stopping.test_configuration_survives_saving(rule)
    test_stopping.test_compiled_and_eager_answers_agree(rule)
    # Of a decrease by halves, iteration i wins i / (2^i - 1) of the average.
    values = [0.5**i - 1 for i in range(10)]
    assert [test_stopping.stops(rule, i, values) for i in range(1, 10)] == [
        i / (2**i - 1) <= 0.25 for i in range(1, 10)
    ]


def test_the_solver_keeps_to_its_tests(parts, float64):
    solver = parts["TrustRegion"](max_iterations=20, rtol=0.05)
    test_solver.test_configuration_survives_saving(solver, 1.0)
    test_solver.test_at_rest_the_step_is_zero(solver, 1.0)
    test_solver.test_an_update_lowers_the_loss_and_hands_on_a_state_of_the_same_form(solver, 1.0)


def test_the_solver_stops_at_the_border_of_its_region(parts, float64):
    model, data = test_solver.problem()
    solver = parts["TrustRegion"](max_iterations=100, rtol=1e-12)

    def path(objective, damping):
        local = LocalModel(
            objective, lambda: objective.product(GaussNewton(DoubleBackward())), objective.loss_and_gradient().gradient
        )
        return solver.solve(local, tf.constant(damping, tf.float64), {}).candidates[0]

    assert np.linalg.norm(with_objective(model, data, lambda o: path(o, 100.0))) == pytest.approx(0.01)


def test_the_preconditioner_keeps_to_its_tests(parts, float64):
    preconditioner = parts["HutchinsonDiagonal"](decay=0.5)
    test_preconditioners.test_config_round_trip(preconditioner)
    test_preconditioners.test_inverse_is_symmetric_positive_definite(preconditioner)


def test_the_curvature_keeps_to_its_tests(parts, float64):
    curvature = parts["PositiveGaussNewton"](DoubleBackward())
    test_curvature.test_config_round_trip(curvature)
    model = make_model(loss=cauchy)
    data = model_data(model, inputs(), 3 * np.random.default_rng(3).normal(size=(15, 3)))
    problem = Problem("linear", cauchy, None, positive_part)
    expected = test_curvature.gauss_newton_oracle(model, data, problem)
    both = lambda objective: matrices(objective, [curvature, GaussNewton(DoubleBackward())])  # noqa: E731
    for sizes in ({}, {"micro_batch_size": 4}):
        found, indefinite = with_objective(model, data, both, **sizes)
        np.testing.assert_allclose(found, expected, **test_curvature.EXACT)
        assert np.linalg.eigvalsh(indefinite)[0] < 0 < np.abs(expected).max()


def cauchy(y_true, y_pred):
    return keras.ops.mean(keras.ops.log1p(keras.ops.square(y_true - y_pred)), axis=-1)


def positive_part(z, y):
    """Second derivatives of `log(1 + r^2) / 3` in z where they are positive."""
    squares = (z - y) ** 2
    return tf.linalg.diag(tf.nn.relu(2 * (1 - squares) / (1 + squares) ** 2) / 3)


def test_the_curvature_refuses_losses_of_several_outputs_at_once(parts, float64):
    model = make_model("softmax", "categorical_crossentropy")
    data = model_data(model, inputs(), np.eye(3)[np.arange(15) % 3])
    curvature = parts["PositiveGaussNewton"](DoubleBackward())
    with pytest.raises(ValueError, match="sum over single outputs"):
        with_objective(model, data, lambda objective: matrices(objective, [curvature]))


@pytest.mark.parametrize(
    ("ratio", "factor"), [(-np.inf, 2), (np.nan, 1), (0.0, 2), (0.5, 1), (1.0, 1 / 3), (1e200, 1 / 3), (np.inf, 1 / 3)]
)
def test_the_damping_rule_keeps_to_its_table(parts, ratio, factor):
    rule = parts["Nielsen"]()
    assert rule.next_damping(6.0, test_damping.logs(ratio)) == pytest.approx(6 * factor)
    assert rule.next_damping(6.0, test_damping.logs(ratio, gradient_norm=0.0)) == 6.0


def test_the_damping_rule_moves_the_damping_of_fit(parts):
    model = test_damping.rested(0.75)
    run = test_damping.train(model, *test_damping.least_squares(), parts["Nielsen"](), epochs=3)
    np.testing.assert_allclose(run.dampings, 0.75 / 3.0 ** np.arange(4), rtol=1e-4)
    assert run.num_traces == 1
