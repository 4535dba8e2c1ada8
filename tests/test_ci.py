"""What CI promises: the targets that a contributor runs, on every version of Python that the package names."""

import configparser
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_runs_the_targets_of_ci():
    (targets,) = re.findall(r"^for target in (.*); do$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert targets.split() == ["lint", "docs", "test", "test-slow"]
    of_jobs = [command for job in WORKFLOW["jobs"].values() for command in commands(job)]
    assert sorted(of_jobs) == sorted(f"make {target}" for target in targets.split())
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(targets.split()) <= set(phony)


def test_the_tests_run_on_every_python_that_setup_cfg_names():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    job = WORKFLOW["jobs"]["tests"]
    # Strings: the number 3.10 would be 3.1.
    assert job["strategy"]["matrix"]["python"] == named and len(named) == 3


def test_every_job_sets_up_the_python_that_it_asks_for_and_has_a_limit():
    for job in WORKFLOW["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest" and job["timeout-minutes"] <= 360
        checkout, setup, *rest = job["steps"]
        assert checkout["uses"].startswith("actions/checkout@v")
        assert setup["uses"].startswith("actions/setup-python@v")
        assert setup["with"]["python-version"] in ("3.13", "${{ matrix.python }}")
        assert [set(step) for step in rest] == [{"run"}] * len(commands(job))
