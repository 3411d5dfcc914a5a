"""From images and prompts to answers: greedy decoding over a KV cache, in padded global batches."""

from pgdist.decode.decoder import Decoded, Decoder
from pgdist.decode.generation import generate
from pgdist.decode.greedy import GreedyTokens, greedy_decode

__all__ = ["Decoded", "Decoder", "GreedyTokens", "generate", "greedy_decode"]
