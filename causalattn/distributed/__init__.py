"""The operators on a sequence that several ranks share: local tokens in, one keyword more, the same numbers out.

Every rank of a one-dimensional DeviceMesh calls the operator with its own tokens and the same options. Results of a
row, a key or a token are those of the rank's own; those of a head are on every rank. How many tokens each rank holds is
exchanged first, which waits for the device once.
"""

from .attention import attention, attention_topk
from .covariance import attention_correlation, attention_covariance
from .edge_effects import edge_effects
from .layout import shard, unshard
from .model import analyze
from .prefix import linear_attention, selective_scan
from .ring import Traffic, traffic
from .statistics import attention_stats, dag_score

__all__ = [
    "Traffic", "analyze", "attention", "attention_correlation", "attention_covariance", "attention_stats",
    "attention_topk", "dag_score", "edge_effects", "linear_attention", "selective_scan", "shard", "traffic", "unshard",
]  # fmt: skip
