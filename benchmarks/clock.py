"""The clock of benchmarks that compare solvers by what they reach in the same time."""

import time

import keras


class Clock(keras.callbacks.Callback):
    """Looks at what was reached, ever more rarely, and ends training when its time is over or the run has converged.

    It counts seconds of the processor, so that other work on the machine makes little difference, starts after the first update, which is traced, and
    stands still while it looks.

    Args:
        max_seconds: Float, the time of training.
        look: Callable without arguments that returns a tuple of floats.

    Attributes:
        num_updates: Integer.
        seconds: Float, of training.
        looks: List of tuples: seconds, and what `look` returned.
    """

    def __init__(self, max_seconds, look):
        super().__init__()
        self.max_seconds, self._look = max_seconds, look
        self.num_updates, self.seconds, self.looks = 0, 0.0, []

    def on_train_batch_begin(self, batch, logs=None):
        self._begun_at = time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        self.num_updates += 1
        if self.num_updates > 1:
            self.seconds += time.process_time() - self._begun_at
        is_over = self.seconds > self.max_seconds or bool(logs.get("converged"))
        if is_over or not self.looks or self.seconds > max(1.15 * self.looks[-1][0], self.looks[-1][0] + 0.1):
            self.looks.append((self.seconds, *self._look()))
        self.model.stop_training = is_over
