"""What memory promises: it is bounded by a micro-batch, not by the batch."""

import os
import subprocess
import sys

import pytest

# Batches of any size are one trace, after which the process has no reason to grow but the cases.
SCRIPT = """
import resource
import keras, numpy as np, tensorflow as tf
from keras_hf import ConjugateGradient, ConstantDamping, HessianFree, HFModel, Identity
layers = [keras.layers.Dense(50, "tanh") for _ in range(6)]
model = HFModel(keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)]))
solver = ConjugateGradient(Identity(), max_iterations=3)
model.compile(HessianFree(0.1, solver, growing_batch=None, micro_batch_size=5_000), "mse")
for num_cases in (10_000, 60_000):
    x = np.random.default_rng(0).normal(size=(num_cases, 4)).astype("float32")
    spec = tf.TensorSpec([None, 4]), tf.TensorSpec([None, 1])
    batches = tf.data.Dataset.from_generator(lambda: iter([(x, x[:, :1])]), output_signature=spec)
    model.fit(batches, callbacks=[ConstantDamping()], verbose=0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_six_times_the_cases_take_the_memory_of_their_data_only():
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    small, large = map(float, run.stdout.split())
    # 50,000 more cases of 20 bytes are 1 MB, a few copies of which Keras makes. Their activations would be 50,000 * 6 * 50 * 4 bytes = 60 MB
    # for one pass and some three times that for a kept linearization: with micro-batches of 60,000 the peak rises by 320 MB. The allocator's own
    # noise is about 20 MB.
    assert large - small < 50, (small, large)
