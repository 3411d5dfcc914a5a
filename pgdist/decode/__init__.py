"""From images and prompts to answers: one compiled loop over a KV cache, in padded global batches."""

from pgdist.decode.decoder import Answer, Decoded, Decoder
from pgdist.decode.generation import Generated, generate, generate_candidates
from pgdist.decode.sampling import Sampling
from pgdist.decode.scoring import AnswerScore, Scored, score_answers, score_batches

__all__ = [
    "Answer",
    "AnswerScore",
    "Decoded",
    "Decoder",
    "Generated",
    "Sampling",
    "Scored",
    "generate",
    "generate_candidates",
    "score_answers",
    "score_batches",
]
