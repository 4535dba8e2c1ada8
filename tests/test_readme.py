"""What the README promises: its workflow runs as printed."""

import re
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_workflow_runs_as_printed(tmp_path, monkeypatch):
    readme = Path(__file__).parents[1] / "README.md"
    (block,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert Path("run.keras").exists() and Path("serving", "saved_model.pb").exists()
