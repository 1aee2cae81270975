"""Replay table and cost table to plan and certificate. NumPy and SciPy only: planning never runs a network."""

from .binomial import largest_passing as largest_passing
from .binomial import p_value as p_value
from .binomial import samples_needed as samples_needed
from .certificate import Certificate as Certificate
from .certificate import certify as certify
from .compose import Budget as Budget
from .compose import Composition as Composition
from .compose import compose as compose
from .front import front as front
from .origin import Origin as Origin
from .path import compose_plan as compose_plan
from .path import plan as plan
from .plan import Plan as Plan
from .tables import CostTable as CostTable
from .tables import Outcome as Outcome
from .tables import ReplayTable as ReplayTable
from .tables import cascade_ms as cascade_ms
from .tables import replay_plan as replay_plan
