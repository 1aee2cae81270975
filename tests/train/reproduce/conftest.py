"""Replay tables and costs of planning's tests."""

from tests.planning.conftest import make_costs, make_table, random_tables

__all__ = ["make_costs", "make_table", "random_tables"]
