"""From correlations of attention rows to graphs: searches, their graphs, and tests for the searches of others."""

from .background import Background
from .ci import CorrelationTest, surrogate_data
from .cleann import Explanation, Explanations, explain
from .compare import Agreement, compare
from .discover import Discovery, discover
from .nulls import null_attention, null_discoveries
from .pag import PAG, Mark, token_names
from .sem import SEM, sem
from .sweep import CutSweep, sweep_cuts

__all__ = [
    "PAG", "SEM", "Agreement", "Background", "CorrelationTest", "CutSweep", "Discovery", "Explanation", "Explanations",
    "Mark", "compare", "discover", "explain", "null_attention", "null_discoveries", "sem", "surrogate_data",
    "sweep_cuts", "token_names",
]  # fmt: skip
