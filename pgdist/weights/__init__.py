"""Weights in the published layouts: read array by array straight onto their shards, written losslessly."""

from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.npz import fingerprint, load, read_header, save

__all__ = ["ArrayInfo", "fingerprint", "load", "read_header", "save"]
