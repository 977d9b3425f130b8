"""The do-operator inside attention: plans of interventions, made exactly without the attention matrix."""

from .context import do
from .plan import Do, Plan
from .receipt import Receipt

__all__ = ["Do", "Plan", "Receipt", "do"]
