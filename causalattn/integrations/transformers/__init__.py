"""Attention statistics inside transformers: register() the name, or use(model) to switch a model over."""

from .families import register, use

__all__ = ["register", "use"]
