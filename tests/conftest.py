"""What every test starts from: quiet TensorFlow, fixed seeds, and the data where there are any."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Read once, when TensorFlow is imported.

import keras  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(1234)


@pytest.fixture(scope="session")
def data_dir():
    """Folder of `mnist.npz` and `olivettifaces.mat`."""
    folder = os.environ.get("KERAS_HF_DATA")
    if not folder:
        pytest.skip("KERAS_HF_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture
def float64():
    """Makes float64 Keras' default: for layers and, which no layer's dtype does, for losses."""
    before = keras.backend.floatx()
    keras.backend.set_floatx("float64")
    yield
    keras.backend.set_floatx(before)
