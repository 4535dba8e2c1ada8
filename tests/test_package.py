"""What is installed: one version, a wheel whose metadata are right, and the README's workflow out of it."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import keras_hf

ROOT = Path(__file__).parents[1]


def test_the_version_is_everywhere_the_same():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changed = re.search(r"^## (\d.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited[1] == changed[1] == keras_hf.__version__


def test_public_names_are_documented():
    names = [name for name in vars(keras_hf) if not name.startswith("_") and name[0].isupper()]
    assert len(names) > 15
    assert [name for name in names if not getattr(keras_hf, name).__doc__] == []


# From the ground up; `keras_hf` stands for the modules outside of folders.
FLOORS = "common differentiation network problem solvers method training posterior callbacks keras_hf".split()


def _floor(path):
    return path.parent.name


def _imports(path):
    """The modules that a module imports, as paths."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "keras_hf":
            parts = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = [ROOT.joinpath(*part.split(".")).with_suffix(".py") for part in parts]
            yield from (file for file in files if file.exists())


def test_imports_point_downwards():
    modules = [path for path in (ROOT / "keras_hf").rglob("*.py") if path.name != "__init__.py"]
    imports = [(module, imported) for module in modules for imported in _imports(module)]
    assert len(imports) > 100
    upwards = [pair for pair in imports if FLOORS.index(_floor(pair[1])) > FLOORS.index(_floor(pair[0]))]
    assert upwards == []
    assert [module for module, imported in imports if imported.name == "model.py"] == []


def test_what_moved_since_0_3_is_where_it_was():
    from keras_hf import recorder
    from keras_hf.problem import curvature, linearization

    assert issubclass(keras_hf.GaussNewton, curvature.Curvature) and curvature.loss_hessian
    assert issubclass(keras_hf.DoubleBackward, linearization.Linearization)
    assert recorder.UpdateRecorder is keras_hf.UpdateRecorder and recorder.update_cost


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(pip, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_is_pure_holds_the_package_alone_and_requires_what_that_imports(wheel):
    assert wheel.name == f"keras_hf-{keras_hf.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(f"keras_hf-{keras_hf.__version__}.dist-info/METADATA").decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "keras_hf").rglob("*.py")} | {"keras_hf/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == modules
    # Without an extra.
    required = set(re.findall(r"^Requires-Dist: (\w+)>=[\d.]+$", metadata, re.MULTILINE))
    assert required == _imported_packages() == {"keras", "numpy", "tensorflow"}
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", wheel], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def _imported_packages():
    """What the package imports of others when it is imported."""
    statements = [node for path in (ROOT / "keras_hf").rglob("*.py") for node in ast.parse(path.read_text()).body]
    modules = [node.module for node in statements if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names]
    return {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"keras_hf"}


@pytest.mark.slow
def test_the_readmes_workflow_runs_as_printed_out_of_the_wheel(wheel, tmp_path):
    """Outside of the repository, with the requirements of this environment, and warnings as errors as in the other tests."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 15
    installed, workplace = tmp_path / "installed", tmp_path / "workplace"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, wheel]
    subprocess.run(pip, check=True)
    workplace.mkdir()
    where = "\nimport keras_hf; print(keras_hf.__file__)"
    strict = "import warnings; warnings.simplefilter('error', UserWarning)\n"
    done = subprocess.run(
        [sys.executable, "-c", strict + code + where],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(installed)
    assert (workplace / "run.keras").exists() and (workplace / "serving" / "saved_model.pb").exists()
