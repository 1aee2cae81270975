"""Costs and speed-ups measured on this device, and the search for what runs fastest on it."""

from .autotune import tune as tune
from .autotune import tune_tile as tune_tile
from .costs import device_name as device_name
from .costs import measure_costs as measure_costs
from .costs import measure_steadily as measure_steadily
from .costs import time_interleaved as time_interleaved
from .costs import time_turns as time_turns
from .costs import unsteady as unsteady
from .speed import Speed as Speed
from .speed import expected_ms as expected_ms
from .speed import measure_batches as measure_batches
from .speed import measure_speed as measure_speed
from .speed import stages_ms as stages_ms
from .tuned_cascade import Tile as Tile
from .tuned_cascade import TunedCascade as TunedCascade
from .tuned_cascade import Tuning as Tuning
from .tuned_cascade import tuned_cache as tuned_cache
from .tuned_cascade import tuned_cascade as tuned_cascade
from .tuned_cascade import tuned_chain as tuned_chain
