"""Parameters by name: every rule about them (what trains, how fast, what decays, where it lives) is a regex
over names.

A name is the path in the nested tree joined by "/", as in the published checkpoints:
`llm/layers/attn/q_einsum/w`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import traverse_util

from pgdist.errors import ConfigError

PyTree = Any


def flatten(tree: PyTree) -> dict[str, Any]:
    """Nested dicts -> {name: leaf}, in sorted order of names."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> PyTree:
    """{name: leaf} -> nested dicts."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def map_named(function: Callable[..., Any], tree: PyTree, *others: PyTree) -> PyTree:
    """function(name, leaf, *other_leaves) over a nested tree; the others have the same names."""
    flat_others = [flatten(other) for other in others]
    return unflatten({k: function(k, v, *(o[k] for o in flat_others)) for k, v in flatten(tree).items()})


def merge(*trees: PyTree) -> PyTree:
    """One nested tree of several that share no name."""
    merged: dict[str, Any] = {}
    for tree in trees:
        merged.update(flatten(tree))
    return unflatten(merged)


def learning_rate_scales(names: Iterable[str], rules: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The learning-rate scale of each parameter, 0 for frozen ones: the first rule whose regex matches the
    whole name.

    Raises ConfigError for a rule that is no (regex, scale) pair, a parameter that no rule covers, a rule
    that matches nothing or only what earlier ones took, and rules that leave nothing to train.
    """
    names = list(names)
    patterns = [_compile_rule(number, rule) for number, rule in enumerate(rules)]
    scales: dict[str, float] = {}
    for pattern, scale in patterns:
        matched = [name for name in names if pattern.fullmatch(name)]
        taken = [name for name in matched if name not in scales]
        if not matched:
            raise ConfigError(
                f"config.trainable: rule {pattern.pattern!r} matches no parameter. A rule has to match a "
                "whole name. "
                "The parameters are:\n" + "\n".join(f"  {name}" for name in names)
            )
        # A last rule for the rest may find that nothing is left.
        if not taken and pattern is not patterns[-1][0]:
            raise ConfigError(
                f"config.trainable: rule {pattern.pattern!r} has no effect: the rules before it take "
                "every parameter that "
                "it matches, and the first match wins. Put it before them."
            )
        scales |= dict.fromkeys(taken, scale)
    uncovered = [name for name in names if name not in scales]
    if uncovered:
        lines = ["config.trainable leaves parameters without a rule:"]
        lines += [f"  no rule covers {name}" for name in uncovered[:5]]
        lines += [f"  and {len(uncovered) - 5} more"] if len(uncovered) > 5 else []
        raise ConfigError("\n".join([*lines, 'End the rules with (".*", 0.0) to freeze the rest.']))
    if not any(scales.values()):
        raise ConfigError("config.trainable freezes every parameter: give at least one rule a scale above 0.")
    return scales


def matching(names: Iterable[str], pattern: str, *, field: str) -> set[str]:
    """Names that the regex matches in full; ConfigError naming the config field when the regex is broken."""
    compiled = _compile(pattern, field)
    return {name for name in names if compiled.fullmatch(name)}


def _compile_rule(number: int, rule: Any) -> tuple[re.Pattern[str], float]:
    field = f"config.trainable[{number}]"
    try:
        pattern, scale = rule
        scale = float(scale)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field}: expected (regex, learning-rate scale), found {rule!r}.") from error
    if not 0.0 <= scale < float("inf"):
        raise ConfigError(f"{field}: the learning-rate scale must be 0 (frozen) or more, found {scale}.")
    return _compile(pattern, field), scale


def _compile(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}.") from error
