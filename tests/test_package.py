"""What is installed: one version, a wheel whose metadata are right, and the README's example out of it."""

import ast
import re
import subprocess
import sys
import venv
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


# From the ground up; `keras_hf` stands for the front.
FLOORS = ["common", "problem", "solvers", "keras_hf"]


def _floor(path):
    return path.parent.name


def _imports(path):
    """The rooms that a room imports, as paths."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "keras_hf":
            parts = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = [ROOT.joinpath(*part.split(".")).with_suffix(".py") for part in parts]
            yield from (file for file in files if file.exists())


def test_imports_point_downwards():
    rooms = [path for path in (ROOT / "keras_hf").rglob("*.py") if path.name != "__init__.py"]
    imports = [(room, imported) for room in rooms for imported in _imports(room)]
    assert len(imports) > 100
    upwards = [pair for pair in imports if FLOORS.index(_floor(pair[1])) > FLOORS.index(_floor(pair[0]))]
    assert upwards == []
    assert [room for room, imported in imports if imported.name == "model.py"] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(pip, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_is_pure_and_holds_the_package_alone(wheel):
    assert wheel.name == f"keras_hf-{keras_hf.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(f"keras_hf-{keras_hf.__version__}.dist-info/METADATA").decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "keras_hf").rglob("*.py")} | {"keras_hf/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert "Requires-Dist: tensorflow>=" in metadata and "Requires-Dist: keras>=" in metadata
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", wheel], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_the_readmes_example_runs_out_of_the_wheel(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    where = "\nimport keras_hf; print(keras_hf.__file__)"
    done = subprocess.run([python, "-c", block + where], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(tmp_path / "venv")
