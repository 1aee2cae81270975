"""From a replay table and a cost table to a plan. NumPy and SciPy only: planning never runs a network.

``plan`` in threshold_path calls ``compose``, which states a problem, starts from a local search, and
ends in branch and bound with bounds by Lagrangian relaxation.
"""

from .compose import Budget as Budget
from .compose import Composition as Composition
from .compose import Rank as Rank
from .compose import compose as compose
from .compose import prunable as prunable
from .compose import rank as rank
from .tables import CostTable as CostTable
from .tables import Outcome as Outcome
from .tables import ReplaySource as ReplaySource
from .tables import ReplayTable as ReplayTable
from .tables import cascade_ms as cascade_ms
from .tables import replay_plan as replay_plan
from .threshold_path import Plan as Plan
from .threshold_path import compose_plan as compose_plan
from .threshold_path import plan as plan
