"""Hessian-free optimization for Keras: deep and ill-conditioned networks trained by curvature through `model.fit`."""

import keras as _keras

if _keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_hf needs Keras' TensorFlow backend, whose tapes it differentiates with. "
        f"Received: backend={_keras.backend.backend()!r}. Set the environment variable KERAS_BACKEND=tensorflow before importing keras."
    )

from keras_hf.callbacks.damping import ArcStepDamping as ArcStepDamping
from keras_hf.callbacks.damping import ConstantDamping as ConstantDamping
from keras_hf.callbacks.damping import DampingCallback as DampingCallback
from keras_hf.callbacks.damping import LevenbergMarquardt as LevenbergMarquardt
from keras_hf.callbacks.evidence import EvidenceRegularization as EvidenceRegularization
from keras_hf.callbacks.recorder import UpdateRecorder as UpdateRecorder
from keras_hf.callbacks.recorder import read_updates as read_updates
from keras_hf.differentiation.curvature import EmpiricalFisher as EmpiricalFisher
from keras_hf.differentiation.curvature import FiniteDifferenceHessian as FiniteDifferenceHessian
from keras_hf.differentiation.curvature import GaussNewton as GaussNewton
from keras_hf.differentiation.curvature import Hessian as Hessian
from keras_hf.differentiation.linearization import DoubleBackward as DoubleBackward
from keras_hf.differentiation.linearization import ForwardAccumulation as ForwardAccumulation
from keras_hf.differentiation.structural_damping import StructuralDamping as StructuralDamping
from keras_hf.initializers import SparseNormal as SparseNormal
from keras_hf.loss_function import LossFunction as LossFunction
from keras_hf.losses import Cauchy as Cauchy
from keras_hf.model import HFModel as HFModel
from keras_hf.optimizer import HessianFree as HessianFree
from keras_hf.posterior.covariance import ParameterCovariance as ParameterCovariance
from keras_hf.posterior.laplace import ClassPrediction as ClassPrediction
from keras_hf.posterior.laplace import Laplace as Laplace
from keras_hf.posterior.laplace import Prediction as Prediction
from keras_hf.problem.batching import GrowingBatch as GrowingBatch
from keras_hf.problem.constraints import Box as Box
from keras_hf.recurrent import InitialState as InitialState
from keras_hf.solvers.cg import CGResult as CGResult
from keras_hf.solvers.cg import CGStop as CGStop
from keras_hf.solvers.cg import conjugate_gradient as conjugate_gradient
from keras_hf.solvers.direct import DirectSolver as DirectSolver
from keras_hf.solvers.kronecker import KroneckerFactored as KroneckerFactored
from keras_hf.solvers.momentum import PreconditionedMomentum as PreconditionedMomentum
from keras_hf.solvers.nystrom import Nystrom as Nystrom
from keras_hf.solvers.preconditioners import EmpiricalFisherDiagonal as EmpiricalFisherDiagonal
from keras_hf.solvers.preconditioners import Identity as Identity
from keras_hf.solvers.stopping import RelativeProgress as RelativeProgress
from keras_hf.solvers.stopping import ResidualTolerance as ResidualTolerance
from keras_hf.solvers.truncated_cg import ConjugateGradient as ConjugateGradient
from keras_hf.solvers.truncated_cg import recipe_of_2010 as recipe_of_2010
from keras_hf.training.workers import multi_worker_strategy as multi_worker_strategy

__version__ = "0.3.0"
