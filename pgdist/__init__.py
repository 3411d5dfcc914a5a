"""pgdist: distributed fine-tuning of PaliGemma and PaliGemma 2 with JAX."""

__version__ = "0.1.0"
