"""What a model's attention does to what the model says: forward passes under a do, and derivatives beside them."""

from .ablation import Ablation, ablate
from .counterfactual import Counterfactual, Inference, counterfactual
from .edge_patching import EdgePatching, patch_edges
from .influence import Influence, influence
from .knockout import KnockoutSweep, knockout_sweep
from .patching import Patching, patch
from .rollout import rollout, token_influence

__all__ = [
    "Ablation",
    "Counterfactual",
    "EdgePatching",
    "Inference",
    "Influence",
    "KnockoutSweep",
    "Patching",
    "ablate",
    "counterfactual",
    "influence",
    "knockout_sweep",
    "patch",
    "patch_edges",
    "rollout",
    "token_influence",
]
