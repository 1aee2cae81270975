"""Cascades ready to run: one pure step, and the drivers that repeat it for a request or a batch."""

from .cascade import Cascade as Cascade
from .cascade import CascadeState as CascadeState
from .cascade import CompilerOptions as CompilerOptions
from .cascade import Prediction as Prediction
from .cascade import begin as begin
from .cascade import check_cascade as check_cascade
from .cascade import compiled as compiled
from .cascade import finish as finish
from .cascade import predict_batch as predict_batch
from .cascade import predict_one as predict_one
from .cascade import predict_stepwise as predict_stepwise
from .cascade import step as step
