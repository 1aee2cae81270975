"""Replay table and cost table to a plan: NumPy and SciPy only, so planning never runs a network."""

from .compose import Budget as Budget
from .compose import Composition as Composition
from .compose import Rank as Rank
from .compose import compose as compose
from .compose import rank as rank
from .compose import unpayable as unpayable
from .tables import CostTable as CostTable
from .tables import Origin as Origin
from .tables import Outcome as Outcome
from .tables import ReplayTable as ReplayTable
from .tables import cascade_ms as cascade_ms
from .tables import replay_plan as replay_plan
from .threshold_path import Plan as Plan
from .threshold_path import compose_plan as compose_plan
from .threshold_path import plan as plan
