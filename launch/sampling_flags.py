"""The flags that say how answers are chosen. Together they make one `pgdist.decode.Sampling`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from pgdist.errors import ConfigError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from pgdist.data.tokenizer import Tokenizer
    from pgdist.decode.sampling import Sampling

_SAMPLER = flags.DEFINE_enum(
    "sampler", None, ["greedy", "sample", "beam"], "The likeliest token, a draw, or the likeliest sequences."
)
_N = flags.DEFINE_integer("n", None, "Answers to each input, best first; with sample and beam.")
_CANDIDATES = flags.DEFINE_integer(
    "candidates", None, "Sequences tried for each input, of which the --n best are answers; --n by default."
)
_SEED = flags.DEFINE_integer(
    "seed", None, "Of sample: the same one draws the same answers, however they run."
)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Of sample: below 1, likely tokens are drawn more.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Of sample: draw among so many likeliest tokens; 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Of sample: draw among the likeliest with this probability.")
_LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", None, "Of beam: log-probabilities are divided by the length to this power."
)
_ALLOW = flags.DEFINE_multi_string(
    "allow", [], "Only tokens like this, such as '<loc*>', and the answer's end; may be given again."
)
_BAN = flags.DEFINE_multi_string("ban", [], "No tokens like this, such as '<seg*>'; may be given again.")

_FIELDS = {  # of `Sampling`
    "method": _SAMPLER,
    "n": _N,
    "candidates": _CANDIDATES,
    "seed": _SEED,
    "temperature": _TEMPERATURE,
    "top_k": _TOP_K,
    "top_p": _TOP_P,
    "length_penalty": _LENGTH_PENALTY,
}
_ALL = (*_FIELDS.values(), _ALLOW, _BAN)


def make_sampling(config: ConfigDict, *, tokenizer: Tokenizer | None) -> Sampling:
    """What the flags say; where there is no --sampler, they change what evaluation does (config.eval).

    tokenizer: None where nothing is to be answered.  Raises ConfigError, with the flags, where they make no sense or
    leave no token.
    """
    from pgdist.config import evaluation_sampling
    from pgdist.decode.sampling import Sampling

    allowed, banned = (_find_tokens(flag, tokenizer) for flag in (_ALLOW, _BAN))
    if banned:
        if set(allowed or range(tokenizer.vocab_size)) <= set(banned):
            raise ConfigError("--allow and --ban leave no token to choose.")
    start = Sampling() if _SAMPLER.present else evaluation_sampling(config)
    fields = {name: flag.value for name, flag in _FIELDS.items() if flag.value is not None}
    try:
        return dataclasses.replace(start, **fields, allowed=allowed, banned=banned)
    except ConfigError as error:
        given = [f"--{flag.name}={flag.value}" for flag in _FIELDS.values() if flag.present]
        default = "" if _SAMPLER.present else f" with config.eval.sampler={start.method}"
        raise ConfigError(f"{' '.join(given)}{default}: {error}") from error


def patterns() -> dict[str, list[str]]:
    """Of the tokens that are allowed and banned, by flag."""
    return {f"--{flag.name}": flag.value for flag in (_ALLOW, _BAN)}


def given() -> list[str]:
    """The flags that were given."""
    return [f"--{flag.name}" for flag in _ALL if flag.present]


def _find_tokens(flag: flags.FlagHolder[Sequence[str]], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if flag.value and tokenizer is None:
        raise ConfigError(f"--{flag.name} is about answers, of which --compile_only makes none")
    found: set[int] = set()
    for pattern in flag.value:
        if not (ids := tokenizer.find(pattern)):
            raise ConfigError(
                f"--{flag.name}={pattern}: expected a pattern of tokens, with * and ? as in file names; none of the "
                f"{tokenizer.vocab_size} is like it. A space in a token is written \u2581."
            )
        found.update(ids)
    return tuple(sorted(found))
