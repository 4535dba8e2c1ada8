"""What every test starts from: quiet TensorFlow, fixed seeds, and the data where there are any."""

import gc
import logging
import math
import os
import random
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Read once, when TensorFlow is imported.

import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow.python.eager.context import context as tensorflow_context  # noqa: E402

from examples.precision import precision  # noqa: E402

# TensorFlow's graph optimizer takes a sixth of an update's first call, and changes results by rounding alone. It stays on in `make test-lowest`, and
# in processes of their own: notebooks, the wheel, a cluster of three workers.
if not os.environ.get("KERAS_HF_OPTIMIZE_GRAPHS"):
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
# Two devices for the tests of replicas; the rest run on the first.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
keras.utils.set_random_seed(1234)


def pytest_collection_finish():
    """Has the garbage collector look seldom, and never at what was imported: graphs are made of many objects, most of which stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(autouse=True, scope="module")
def kernels_of_other_modules_are_freed():
    """By setting TensorFlow's seed, after their models have gone, where the process holds 3 GiB: to look for them all takes seconds."""
    statistics = Path("/proc/self/statm")
    pages = int(statistics.read_text().split()[1]) if statistics.exists() else math.inf
    if pages * 4096 > 3 * 2**30:
        gc.collect()
        keras.utils.set_random_seed(1234)


@pytest.fixture(autouse=True)
def fixed_seed():
    """As `keras.utils.set_random_seed`, which also clears TensorFlow's kernels: each compiled function that tests share would take a second again."""
    random.seed(1234)
    np.random.seed(1234)
    context = tensorflow_context()
    context._seed, context._rng = 1234, random.Random(1234)


@pytest.fixture(autouse=True)
def no_caching_device_is_left():
    """TensorFlow's loops leave one in the scope of the whole process where their function raises: the test that did it fails, not the next."""
    yield
    scope = tf.compat.v1.get_variable_scope()
    left, scope._caching_device = scope.caching_device, None
    assert left is None


@pytest.fixture
def tensorflow_log():
    """The messages that TensorFlow logs in a test, a list that grows."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    tf.get_logger().addHandler(handler)
    yield messages
    tf.get_logger().removeHandler(handler)


@pytest.fixture(scope="session")
def data_dir():
    """Folder of `mnist.npz` and `olivettifaces.mat`."""
    folder = os.environ.get("KERAS_HF_DATA")
    if not folder:
        pytest.skip("KERAS_HF_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture
def float64():
    """Makes float64 Keras' default."""
    with precision("float64"):
        yield
