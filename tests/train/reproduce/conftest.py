"""Replay tables and costs of planning's tests."""

from tests.planning.conftest import make_costs as make_costs
from tests.planning.conftest import make_table as make_table
from tests.planning.conftest import random_tables as random_tables
