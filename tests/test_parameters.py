"""Rules over parameter names: the first match wins; one that cannot be meant is an error that lists names."""

from __future__ import annotations

import pytest

from pgdist.errors import ConfigError
from pgdist.parameters import flatten, learning_rate_scales, map_named, matching, merge, unflatten

NAMES = ("img/head/kernel", "img/head/bias", "llm/layers/attn/q_einsum/w", "llm/final_norm/scale")


def test_names_are_paths_and_go_both_ways():
    tree = {"llm": {"final_norm": {"scale": 1}}, "img": {"head": {"kernel": 2, "bias": 3}}}

    assert list(flatten(tree)) == ["img/head/bias", "img/head/kernel", "llm/final_norm/scale"]
    assert unflatten(flatten(tree)) == tree
    assert merge({"img": {"head": {"kernel": 2}}}, {"img": {"head": {"bias": 3}}}, {}) == {"img": tree["img"]}
    assert map_named(lambda name, one, other: (name, one, other), {"a": {"b": 1}}, {"a": {"b": 2}}) == {
        "a": {"b": ("a/b", 1, 2)}
    }


def test_the_first_rule_that_matches_a_whole_name_wins():
    rules = (("img/.*/kernel", 0.1), ("img/head/.*", 5.0), ("llm/layers/attn", 7.0), (".*", 1.0))

    with pytest.raises(ConfigError, match="rule 'llm/layers/attn' matches no parameter"):
        learning_rate_scales(NAMES, rules)  # a part of a name is not a match
    assert learning_rate_scales(NAMES, (rules[0], rules[1], rules[3])) == {
        "img/head/kernel": 0.1,
        "img/head/bias": 5.0,
        "llm/layers/attn/q_einsum/w": 1.0,
        "llm/final_norm/scale": 1.0,
    }


def test_a_rule_that_earlier_ones_leave_nothing_is_an_error_but_not_a_last_one_for_the_rest():
    with pytest.raises(ConfigError, match="rule 'img/head/bias' has no effect"):
        learning_rate_scales(NAMES, (("img/.*", 1.0), ("img/head/bias", 0.0), (".*", 1.0)))
    rules = (("img/.*", 1.0), ("llm/.*", 1.0), (".*", 0.0))
    assert learning_rate_scales(NAMES, rules) == dict.fromkeys(NAMES, 1.0)


def test_rules_that_leave_names_uncovered_list_them():
    with pytest.raises(ConfigError) as raised:
        learning_rate_scales(NAMES, (("llm/.*", 1.0),))

    message = str(raised.value)
    assert "config.trainable" in message
    assert "no rule covers img/head/kernel" in message and "no rule covers img/head/bias" in message
    assert "no rule covers llm" not in message
    assert '(".*", 0.0)' in message  # what to do


def test_a_rule_without_a_match_is_listed_beside_the_names_there_are():
    with pytest.raises(ConfigError) as raised:
        learning_rate_scales(NAMES, (("llm/layers/atn/.*", 1.0), ("img/.*", 1.0), (".*", 0.0)))

    message = str(raised.value)
    assert "rule 'llm/layers/atn/.*' matches no parameter" in message
    assert message.count("matches no parameter") == 1
    assert all(f"  {name}" in message for name in NAMES)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (("llm/(", 1.0), r"config.trainable\[1\]: 'llm/\(' is not a regular expression"),
        ((None, 1.0), r"config.trainable\[1\]: None is not a regular expression"),
        (
            ("llm/.*", 1.0, 2.0),
            r"config.trainable\[1\]: expected \(regex, learning-rate scale\), found \('llm/.*', 1",
        ),
        (("llm/.*", "fast"), r"config.trainable\[1\]: expected \(regex, learning-rate scale\)"),
        (7, r"config.trainable\[1\]: expected \(regex, learning-rate scale\), found 7"),
        (("llm/.*", -1.0), r"config.trainable\[1\]: the learning-rate scale must be 0 \(frozen\) or more"),
        (("llm/.*", float("nan")), "must be 0"),
        (("llm/.*", float("inf")), "must be 0"),
    ],
)
def test_a_broken_rule_is_named_by_its_place(rule, expected):
    with pytest.raises(ConfigError, match=expected):
        learning_rate_scales(NAMES, (("img/.*", 1.0), rule, (".*", 0.0)))


def test_rules_that_freeze_everything_are_refused():
    with pytest.raises(ConfigError, match="freezes every parameter"):
        learning_rate_scales(NAMES, ((".*", 0.0),))


def test_matching_takes_whole_names_and_names_the_field_of_a_broken_regex():
    assert matching(NAMES, ".*/kernel", field="config.x") == {"img/head/kernel"}
    assert matching(NAMES, "kernel", field="config.x") == set()
    with pytest.raises(ConfigError, match="config.x: '\\[' is not a regular expression"):
        matching(NAMES, "[", field="config.x")
