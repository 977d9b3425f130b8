"""Everything people compute from an attention matrix, computed from q and k without the matrix."""

from . import conventions, dense, discovery, distributed, experiments, feature_maps, integrations, masks
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
from .corpus import CorpusResult, analyze_corpus
from .covariance import attention_correlation, attention_covariance
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
from .integrations import causal_learn as _causal_learn  # noqa: F401  (ca.integrations.causal_learn.register())
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
from .partial_corr import (
    Candidates,
    FisherZ,
    LevelTests,
    PartialCorrelation,
    Status,
    critical_correlation,
    fisher_z,
    full_partial_correlation,
    level_tests,
    partial_correlation,
    partial_correlation_given,
)
from .selective_scan import ScanOutput, selective_scan
from .statistics import Asymmetry, AttentionStats, asymmetry, attention_stats, dag_score, score_asymmetry
from .text_discovery import TextDiscovery, discover_text
from .text_explanation import TextExplanation, explain_text

__version__ = "0.1.0"
__all__ = [
    "Asymmetry",
    "AttentionMap",
    "AttentionOutput",
    "AttentionStats",
    "Candidates",
    "Certificate",
    "ClassicalRetrieval",
    "CorpusResult",
    "Do",
    "EdgeEffects",
    "FisherZ",
    "FixedPoint",
    "HeadScores",
    "Hopfield",
    "Intervals",
    "LevelTests",
    "LinearAttentionOutput",
    "LinearState",
    "Mask",
    "Null",
    "PartialCorrelation",
    "Plan",
    "Receipt",
    "Report",
    "Retrieval",
    "ScanOutput",
    "Status",
    "TextDiscovery",
    "TextExplanation",
    "TopK",
    "analyze",
    "analyze_corpus",
    "asymmetry",
    "attention",
    "attention_correlation",
    "attention_covariance",
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
    "critical_correlation",
    "dag_score",
    "dense",
    "discover_text",
    "discovery",
    "distributed",
    "do",
    "edge_effects",
    "experiments",
    "explain_text",
    "feature_maps",
    "fisher_z",
    "full",
    "full_partial_correlation",
    "hopfield_certificate",
    "hopfield_energy",
    "hopfield_retrieve",
    "integrations",
    "intervals",
    "level_tests",
    "linear_attention",
    "linear_attention_matrix",
    "linear_attention_step",
    "masks",
    "null_from_stats",
    "packed",
    "padding",
    "partial_correlation",
    "partial_correlation_given",
    "permutation_null",
    "prefix",
    "score_asymmetry",
    "selective_scan",
    "sliding_window",
]
