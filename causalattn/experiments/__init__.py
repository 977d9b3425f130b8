"""What a model's attention does to what the model says: ablation and patching, each by real forward passes."""

from .ablation import Ablation, ablate
from .patching import Patching, patch

__all__ = ["Ablation", "Patching", "ablate", "patch"]
