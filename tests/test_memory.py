"""What memory promises: it is bounded by a piece, not by the batch."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import keras, numpy as np
from keras_hf import ConjugateGradient, ConstantDamping, HessianFree, HFModel
num_cases = int(sys.argv[1])
keras.utils.set_random_seed(0)
layers = [keras.layers.Dense(300, "tanh") for _ in range(6)]
model = HFModel(keras.Sequential([keras.Input((20,)), *layers, keras.layers.Dense(1)]))
model.compile(optimizer=HessianFree(growing_batch=None, micro_batch_size=1000, solver=ConjugateGradient(max_iterations=5)), loss="mse")
x = np.random.default_rng(0).normal(size=(num_cases, 20)).astype("float32")
model.fit(x, x[:, :1], epochs=2, callbacks=[ConstantDamping()], verbose=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_mebibytes(num_cases):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(num_cases)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return float(run.stdout.split()[-1])


@pytest.mark.slow
def test_four_times_the_cases_take_the_memory_of_their_data_only():
    small, large = peak_mebibytes(5_000), peak_mebibytes(20_000)
    # 15,000 more cases of 84 bytes are 1.3 MB, a few copies of which Keras makes. Their activations would be 15,000 * 6 * 300 * 4 bytes = 108 MB
    # for one pass and some three times that for a kept linearization. The allocator's own noise is about 20 MB.
    assert large - small < 60, (small, large)
