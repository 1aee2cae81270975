"""The papers' experiments: ``python -m train.reproduce``, ``train.reproduce.freeze`` and ``train.reproduce.page``."""

from .policies import POLICIES as POLICIES
from .policies import Score as Score
from .policies import max_probability as max_probability
from .policies import oracle_exits as oracle_exits
from .policies import policy_table as policy_table
from .policies import shared_threshold_plan as shared_threshold_plan
from .policies import zero_error_thresholds as zero_error_thresholds
