"""What a product costs: against a compiled gradient of the same loss on the same cases, and beside the update's work that is no pass over data.

Network: the CURVES autoencoder 784-400-200-100-50-25-6 and mirror, 842,340 weights, synthetic curves, one piece. Prints medians and ratios, all from
one process, and writes them as CSV.

    python -m benchmarks.product_cost --cases 5000
"""

import argparse
import csv
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from examples.autoencoder import autoencoder, summed_crossentropy
from examples.datasets import synthetic_curves
from keras_hf import EmpiricalFisherDiagonal, ForwardAccumulation, GaussNewton, HessianFree, HFModel, conjugate_gradient
from keras_hf.preconditioners import Preconditioner
