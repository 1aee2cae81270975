"""Cascades made runnable: replay, one pure step, its drivers, measured costs."""

from .cascade import Cascade as Cascade
from .cascade import CascadeState as CascadeState
from .cascade import Prediction as Prediction
from .cascade import begin as begin
from .cascade import check_cascade as check_cascade
from .cascade import finish as finish
from .cascade import step as step
from .drivers import predict_batch as predict_batch
from .drivers import predict_one as predict_one
from .drivers import predict_stepwise as predict_stepwise
from .measure import device_name as device_name
from .measure import measure_costs as measure_costs
from .measure import time_interleaved as time_interleaved
from .replay import origin as origin
from .replay import replay as replay
from .search import tune as tune
from .speed import Speed as Speed
from .speed import expected_ms as expected_ms
from .speed import measure_batches as measure_batches
from .speed import measure_speed as measure_speed
from .tuned import TunedCascade as TunedCascade
from .tuning import Tile as Tile
from .tuning import Tuning as Tuning
from .tuning import tuned_cache as tuned_cache
from .tuning import tuned_cascade as tuned_cascade
from .tuning import tuned_chain as tuned_chain
