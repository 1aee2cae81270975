"""Certificates: how often a plan's answers may differ from the base's, with confidence 1 - delta."""

from gati_jax.planning.binomial import largest_passing as largest_passing
from gati_jax.planning.binomial import p_value as p_value
from gati_jax.planning.binomial import samples_needed as samples_needed

from .accuracy_gap import AccuracyGap as AccuracyGap
from .accuracy_gap import accuracy_gap_bound as accuracy_gap_bound
from .arithmetic import BASE as BASE
from .arithmetic import ArithmeticCheck as ArithmeticCheck
from .arithmetic import ServedBound as ServedBound
from .arithmetic import cascade_id as cascade_id
from .arithmetic import comparisons_of as comparisons_of
from .arithmetic import served_bound as served_bound
from .betting import SequentialCertifier as SequentialCertifier
from .certificate import CONDITIONAL as CONDITIONAL
from .certificate import SEQUENTIAL as SEQUENTIAL
from .certificate import Certificate as Certificate
from .certificate import ExitRate as ExitRate
from .certificate import GroupCounts as GroupCounts
from .certificate import tightest as tightest
from .certificate import trial_level as trial_level
from .fixed_sequence import certify as certify
from .fixed_sequence import certify_conditional as certify_conditional
from .fixed_sequence import certify_numerics as certify_numerics
from .fixed_sequence import certify_together as certify_together
from .looks import NO_LOOKS as NO_LOOKS
from .looks import AnyLedger as AnyLedger
from .looks import Ledger as Ledger
from .looks import Looks as Looks
from .looks import count_duplicates as count_duplicates
from .looks import find_ledger as find_ledger
