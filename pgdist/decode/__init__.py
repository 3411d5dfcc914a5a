"""From images and prompts to answers: one compiled loop over a KV cache, in padded global batches."""

from pgdist.decode.decoder import Answer, Decoded, Decoder
from pgdist.decode.generation import generate
from pgdist.decode.sampling import Sampling

__all__ = ["Answer", "Decoded", "Decoder", "Sampling", "generate"]
