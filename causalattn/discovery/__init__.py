"""From correlations of attention rows to graphs: tests that a search asks one at a time, and data for any other one."""

from .ci import CorrelationTest, surrogate_data

__all__ = ["CorrelationTest", "surrogate_data"]
