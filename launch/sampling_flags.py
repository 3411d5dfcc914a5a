"""The flags that say how answers are chosen. Together they make one `pgdist.decode.Sampling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from pgdist.errors import ConfigError

if TYPE_CHECKING:
    from pgdist.data.tokenizer import Tokenizer
    from pgdist.decode.sampling import Sampling

_SAMPLER = flags.DEFINE_enum(
    "sampler", "greedy", ["greedy", "sample", "beam"], "Likeliest token, a draw, or likeliest sequences."
)
_N = flags.DEFINE_integer("n", 1, "Answers to each input, best first; with sample and beam.")
_CANDIDATES = flags.DEFINE_integer(
    "candidates", 0, "Sequences tried for each input, of which the --n best are answers; --n by default."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of sample: the same one gives the same answers, however they run.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of sample: below 1 likelier tokens are drawn more.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Of sample: only so many likeliest tokens; 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Of sample: only the likeliest tokens with this probability.")
_LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "Of beam: log-probabilities are divided by length to this power."
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


def make_sampling(tokenizer: Tokenizer) -> Sampling:
    """What the flags say.  Raises ConfigError, with the flags, where that makes no sense or leaves no token."""
    from pgdist.decode.sampling import Sampling

    allowed, banned = _find_tokens(_ALLOW, tokenizer), _find_tokens(_BAN, tokenizer)
    choosable = {*allowed, tokenizer.eos_id} if allowed else set(range(tokenizer.vocab_size))
    if choosable <= set(banned):
        raise ConfigError("--allow and --ban leave no token to choose.")
    fields = {name: flag.value for name, flag in _FIELDS.items()}
    try:
        return Sampling(**fields, allowed=allowed, banned=banned)
    except ConfigError as error:
        given = [f"--{flag.name}={flag.value}" for flag in _FIELDS.values() if flag.present]
        raise ConfigError(f"{' '.join(given)}: {error}") from error


def settings() -> dict[str, Any]:
    """{flag: its value}."""
    return {f"--{flag.name}": flag.value for flag in _ALL}


def given() -> list[str]:
    """The flags that were given."""
    return [f"--{flag.name}" for flag in _ALL if flag.present]


def _find_tokens(flag: flags.FlagHolder[Sequence[str]], tokenizer: Tokenizer) -> tuple[int, ...]:
    found: set[int] = set()
    for pattern in flag.value:
        if not (ids := tokenizer.find(pattern)):
            raise ConfigError(
                f"--{flag.name}={pattern}: expected a pattern of tokens, with * and ? as in file names; none of the "
                f"{tokenizer.vocab_size} is like it. A space in a token is written \u2581."
            )
        found.update(ids)
    return tuple(sorted(found))
