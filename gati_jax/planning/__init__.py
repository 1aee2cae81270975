"""Replay table and cost table to plan and certificate. NumPy and SciPy only: planning never runs a network."""

from .binomial import largest_passing as largest_passing
from .binomial import p_value as p_value
from .binomial import samples_needed as samples_needed
from .certificate import Certificate as Certificate
from .certificate import certify as certify
from .compose import Plan as Plan
from .compose import plan as plan
from .freeze import freeze_plan as freeze_plan
from .freeze import zero_error_thresholds as zero_error_thresholds
from .origin import Origin as Origin
from .tables import CostTable as CostTable
from .tables import Outcome as Outcome
from .tables import ReplayTable as ReplayTable
from .tables import cascade_ms as cascade_ms
from .tables import replay_plan as replay_plan
