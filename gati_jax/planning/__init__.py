"""Replay table and cost table to plan and certificate. NumPy and SciPy only: planning never runs a network."""

from .betting import AccuracyGap as AccuracyGap
from .betting import accuracy_gap_bound as accuracy_gap_bound
from .binomial import largest_passing as largest_passing
from .binomial import p_value as p_value
from .binomial import samples_needed as samples_needed
from .certificate import CONDITIONAL as CONDITIONAL
from .certificate import Certificate as Certificate
from .certificate import ExitRate as ExitRate
from .certificate import tightest as tightest
from .compose import Plan as Plan
from .compose import plan as plan
from .conditional import conditional_plan as conditional_plan
from .coverage import Coverage as Coverage
from .coverage import resplit_coverage as resplit_coverage
from .freeze import freeze_plan as freeze_plan
from .freeze import zero_error_thresholds as zero_error_thresholds
from .origin import Origin as Origin
from .tables import CostTable as CostTable
from .tables import Outcome as Outcome
from .tables import ReplayTable as ReplayTable
from .tables import cascade_ms as cascade_ms
from .tables import replay_plan as replay_plan
from .testing import certify as certify
from .testing import certify_conditional as certify_conditional
from .testing import certify_together as certify_together
