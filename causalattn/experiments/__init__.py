"""What a model's attention does to what the model says: forward passes under a do, and derivatives beside them."""

from .ablation import Ablation, ablate
from .influence import Influence, influence
from .patching import Patching, patch
from .rollout import rollout, token_influence

__all__ = ["Ablation", "Influence", "Patching", "ablate", "influence", "patch", "rollout", "token_influence"]
