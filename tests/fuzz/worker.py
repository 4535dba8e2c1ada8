"""One process of `make fuzz`: a few draws by hypothesis, each reported as a line of JSON, and a failure made small."""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import keras
import tensorflow as tf
from hypothesis import HealthCheck, Phase, assume, given, seed, settings, strategies

from fuzz.draw import Invalid, Program
from fuzz.run import outcome_of

FOLDER = Path("runs/fuzz")
DRAWS, SHRINKING_SECONDS, MOST_BYTES = 30, 90, 8 * 2**30


class Failed(AssertionError):
    """A property that does not hold."""


class Worker:
    """Draws, and remembers what failed."""

    def __init__(self, place, end):
        self._current, self._end = FOLDER / f"current_{place}.py", end
        self._known = set(json.loads((FOLDER / f"known_{place}.json").read_text()))
        self._outcomes, self._first_failure, self.smallest = {}, None, None

    def check(self, data):
        """Draws one program and checks it; raises an error where it fails."""
        if self._first_failure and time.time() > self._first_failure + SHRINKING_SECONDS:
            # Hypothesis would go on for minutes.
            self.finish()
            os._exit(0)
        try:
            program = Program(lambda options: data.draw(strategies.sampled_from(options)))
        except Invalid:
            assume(False)
        outcome = self._outcomes.get(program.source)
        if outcome is None:
            if time.time() > self._end and self._first_failure is None:
                return
            self._current.write_text(program.source)
            outcome = self._outcomes[program.source] = outcome_of(program)
            if self._first_failure is None:
                self.report(outcome, sorted(program.features))
        if outcome.kind == "failed" and outcome.signature not in self._known:
            self._first_failure = self._first_failure or time.time()
            if self.smallest is None or len(outcome.script) <= len(self.smallest[0].script):
                self.smallest = outcome, sorted(program.features)
            raise Failed(outcome.signature)

    def finish(self):
        """Reports the smallest program that failed, once."""
        if self.smallest:
            outcome, features = self.smallest
            self.report(outcome._replace(kind="smaller"), features, outcome.script)
            self._known.add(outcome.signature)
            self._first_failure = self.smallest = None

    def report(self, outcome, features, script=""):
        """One line of JSON; the script comes when it is small."""
        print(json.dumps({**outcome._asdict(), "features": features, "script": script}), flush=True)


def main(number, place, end):
    """Draws, makes what fails small, and reports it."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    devices = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    keras.config.disable_traceback_filtering()
    worker = Worker(place, end)

    for draw_number in range(DRAWS):
        # Of more examples hypothesis would make most by small changes of those before. The first is always the simplest, which is checked once.
        @seed(DRAWS * number + draw_number)
        @settings(
            max_examples=2,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(strategies.data())
        def draw(data):
            worker.check(data)

        # Hypothesis raises what was reported, or says that it is flaky.
        with contextlib.suppress(Exception):
            draw()
        worker.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
