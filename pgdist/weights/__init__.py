"""Weights in the published layouts: read array by array straight onto their shards, written losslessly."""

from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.converting import convert
from pgdist.weights.loading import fingerprint, load, read_header
from pgdist.weights.saving import save

__all__ = ["ArrayInfo", "convert", "fingerprint", "load", "read_header", "save"]
