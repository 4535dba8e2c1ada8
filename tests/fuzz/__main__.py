"""`make fuzz`: draws programs for some minutes in processes that may crash, and prints what was drawn and each failure once.

Environment: `MINUTES` (15), `SEED` (0), `PROCESSES` (2).
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

FOLDER = Path("runs/fuzz")
MINUTES, SEED, PROCESSES = (
    int(os.environ.get(name, n)) for name, n in {"MINUTES": 15, "SEED": 0, "PROCESSES": 2}.items()
)
# A draw takes seconds; shrinking one reports nothing for two minutes.
MOST_SECONDS = 600


class Tally:
    """What all processes have drawn."""

    def __init__(self):
        self.lock, self.begin = threading.Lock(), time.time()
        self.kinds, self.alone, self.pairs, self.refused = Counter(), Counter(), Counter(), Counter()
        self.scripts = {}

    def add(self, record):
        with self.lock:
            # A failure was counted as it was drawn; its script comes when it is small.
            is_new = record["kind"] != "smaller"
            if is_new:
                self.kinds[record["kind"]] += 1
                self.alone.update(record["features"])
                self.pairs.update(itertools.combinations(sorted(record["features"]), 2))
            if record["kind"] == "refused":
                self.refused[record["signature"]] += 1
            if record["script"] and record["signature"] not in self.scripts:
                self.scripts[record["signature"]] = record["script"]
                path = FOLDER / f"failure_{len(self.scripts)}.py"
                path.write_text(record["script"])
                print(f"FAILED: {record['signature']}\n{record['script']}\nIt is in {path}.", flush=True)
            if is_new and self.kinds.total() % 10 == 0:
                print(
                    f"{(time.time() - self.begin) / 60:.1f} minutes: {dict(self.kinds)}, {len(self.pairs)} pairs",
                    flush=True,
                )

    def summary(self):
        """Lines: outcomes, refusals, features by how often they were drawn, and how many pairs never met."""
        names = sorted(self.alone)
        never = sum(pair not in self.pairs for pair in itertools.combinations(names, 2))
        yield f"{self.kinds.total()} draws: {dict(self.kinds)}; failures of {len(self.scripts)} kinds"
        yield f"{len(self.pairs)} pairs of {len(names)} features met, {never} never"
        yield from (f"refused {number} times: {signature}" for signature, number in self.refused.most_common())
        for name in sorted(names, key=self.alone.get):
            met = sum(name in pair for pair in self.pairs)
            yield f"{self.alone[name]:6d} times, with {met} of {len(names) - 1} others: {name}"


def keep_drawing(place, tally):
    """Starts one process after the other, each with a seed of its own, and reads what it reports."""
    end = tally.begin + 60 * MINUTES
    for number in itertools.count():
        if time.time() > end:
            return
        current = FOLDER / f"current_{place}.py"
        current.unlink(missing_ok=True)
        (FOLDER / f"known_{place}.json").write_text(json.dumps(list(tally.scripts)))
        seed = SEED * 1_000_000 + place * 100_000 + number
        command = [sys.executable, "-m", "fuzz.worker", str(seed), str(place), str(end)]
        with open(FOLDER / f"errors_{place}.txt", "w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            watch = threading.Timer(MOST_SECONDS + max(0, end - time.time()), process.kill)
            watch.start()
            for line in process.stdout:
                if line.startswith("{"):
                    tally.add(json.loads(line))
            watch.cancel()
        if process.wait() != 0 and current.exists():
            name = signal.Signals(-process.returncode).name if process.returncode < 0 else process.returncode
            script = current.read_text() + f"\n# The process ended with {name}.\n"
            tally.add({"kind": "crashed", "features": [], "signature": f"crash: {name}", "script": script})


def main():
    """Draws until the time is over; ends with 1 if anything failed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    threads = [threading.Thread(target=keep_drawing, args=(place, tally)) for place in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = "\n".join(tally.summary())
    (FOLDER / "summary.txt").write_text(summary + "\n")
    print(summary)
    sys.exit(bool(tally.scripts))


if __name__ == "__main__":
    main()
