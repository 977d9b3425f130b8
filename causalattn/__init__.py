"""Everything people compute from an attention matrix, computed from q and k without the matrix."""

from . import masks
from .attention import AttentionOutput, attention
from .masks import Intervals, Mask, causal, chunked, full, intervals, packed, padding, prefix, sliding_window
from .statistics import (
    Asymmetry,
    AttentionStats,
    asymmetry,
    attention_stats,
    dag_score,
    score_asymmetry,
)
