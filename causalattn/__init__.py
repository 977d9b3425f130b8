"""Everything people compute from an attention matrix, computed from q and k without the matrix."""

from . import conventions, dense, experiments, feature_maps, integrations, masks
from .analysis import HeadScores, Report, analyze, capture
from .attention import (
    AttentionMap,
    AttentionOutput,
    TopK,
    attention,
    attention_map,
    attention_rows,
    attention_topk,
)
from .edge_effects import EdgeEffects, edge_effects
from .hopfield import (
    Certificate,
    ClassicalRetrieval,
    FixedPoint,
    Hopfield,
    Retrieval,
    classical_hopfield_energy,
    classical_hopfield_retrieve,
    hopfield_certificate,
    hopfield_energy,
    hopfield_retrieve,
)
from .integrations import bertviz as _bertviz  # noqa: F401  (ca.integrations.bertviz.head_view)
from .integrations import transformers as _transformers  # noqa: F401  (ca.integrations.transformers.register())
from .interventions import Do, Plan, Receipt, do
from .linear_attention import (
    LinearAttentionOutput,
    LinearState,
    linear_attention,
    linear_attention_matrix,
    linear_attention_step,
)
from .masks import Intervals, Mask, causal, chunked, full, intervals, packed, padding, prefix, sliding_window
from .nulls import Null, null_from_stats, permutation_null
from .selective_scan import ScanOutput, selective_scan
from .statistics import Asymmetry, AttentionStats, asymmetry, attention_stats, dag_score, score_asymmetry

__version__ = "0.1.0"
__all__ = [
    "Asymmetry",
    "AttentionMap",
    "AttentionOutput",
    "AttentionStats",
    "Certificate",
    "ClassicalRetrieval",
    "Do",
    "EdgeEffects",
    "FixedPoint",
    "HeadScores",
    "Hopfield",
    "Intervals",
    "LinearAttentionOutput",
    "LinearState",
    "Mask",
    "Null",
    "Plan",
    "Receipt",
    "Report",
    "Retrieval",
    "ScanOutput",
    "TopK",
    "analyze",
    "asymmetry",
    "attention",
    "attention_map",
    "attention_rows",
    "attention_stats",
    "attention_topk",
    "capture",
    "causal",
    "chunked",
    "classical_hopfield_energy",
    "classical_hopfield_retrieve",
    "conventions",
    "dag_score",
    "dense",
    "do",
    "edge_effects",
    "experiments",
    "feature_maps",
    "full",
    "hopfield_certificate",
    "hopfield_energy",
    "hopfield_retrieve",
    "integrations",
    "intervals",
    "linear_attention",
    "linear_attention_matrix",
    "linear_attention_step",
    "masks",
    "null_from_stats",
    "packed",
    "padding",
    "permutation_null",
    "prefix",
    "score_asymmetry",
    "selective_scan",
    "sliding_window",
]
