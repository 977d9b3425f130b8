"""From correlations of attention rows to graphs: searches, their graphs, and tests for the searches of others."""

from .background import Background
from .ci import CorrelationTest, surrogate_data
from .discover import Discovery, discover
from .nulls import null_attention, null_discoveries
from .pag import PAG, Mark, token_names

__all__ = [
    "PAG", "Background", "CorrelationTest", "Discovery", "Mark", "discover", "null_attention", "null_discoveries",
    "surrogate_data", "token_names",
]  # fmt: skip
