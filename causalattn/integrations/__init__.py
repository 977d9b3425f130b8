"""Adapters to outside projects: one module each, and nothing happens at import."""
