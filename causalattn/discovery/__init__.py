"""From correlations of attention rows to graphs: tests that a search asks one at a time, data for any other, PAGs."""

from .ci import CorrelationTest, surrogate_data
from .pag import PAG, Mark, token_names

__all__ = ["PAG", "CorrelationTest", "Mark", "surrogate_data", "token_names"]
