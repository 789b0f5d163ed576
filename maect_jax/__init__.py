"""Self-supervised features that cluster by object: MAE-CT in JAX."""

__version__ = "0.1.0"
