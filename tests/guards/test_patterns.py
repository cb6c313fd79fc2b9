"""Regular expressions of checkpoints: matched as `re` does, and never without end."""

import re

import pytest

from lowbit.errors import InputError
from lowbit.formats import get_format
from lowbit.guards import patterns
from lowbit.guards.patterns import Patterns

NAMES = [
    "model.layers.0.mlp.gate",
    "model.layers.10.self_attn.q_proj",
    "lm_head",
    "vision_tower.blocks.3.fc1",
    "a+b",
    "",
]
# Its paths through a name are more than 10^9, and the engine sees no shorter way
HOSTILE = r"(?:[a-z0-9_.]{1,40}){1,40}(?=[A-Z])"
# What the configs of real checkpoints and of lowbit say
REAL = [
    r".*lm_head", r".*mlp\.gate$", r"model\.layers\.(0|1|10)\..*", r"^lm_head$", r"vision_tower.*", r"(?!.*mlp).*proj$",
    r"^a\+b$", r"[\s\S]*q_proj", r"^$", r"model.layers.\d+.self_attn.(q|k)_proj$", r"^model\.layers\.0\.mlp\.gate$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_matches_what_re_matches(pattern):
    found = Patterns([pattern], "config")
    assert [found.first([name]) == 0 for name in NAMES] == [re.match(pattern, name) is not None for name in NAMES]


def test_the_first_pattern_decides():
    """Also where exact names, which are looked up, and others, which are matched, stand in any order."""
    found = Patterns([r"^b$", r"a.*", r"^ab$", r".*b", r"^b$"], "config")
    assert [found.first([name]) for name in ("b", "ab", "cb", "c")] == [0, 1, 3, None]
    assert found.first(["cb", "b"]) == 0 and found.first([]) is None


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(HOSTILE, NAMES[1]), (r"((a{1,1000}){1,1000}){1,1000}b", "a" * 200), (r"(?:(a{1,3}){1,9}){1,9}b", "a" * 30)],
)
def test_patterns_without_end_are_refused(pattern, name, monkeypatch):
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"^config: .* takes too long to match") as caught:
        Patterns([pattern], "config").first([name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_many_slow_matches_are_refused(monkeypatch):
    """Each in time, all together not: a pattern that is merely slow, for each of many names."""
    monkeypatch.setattr(patterns, "TOTAL_SECONDS", 0.05)
    found = Patterns([r"(a{1,9}){1,9}b"], "config")
    with pytest.raises(InputError, match="takes too long"):
        for _ in range(10_000):
            found.first(["a" * 14])


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999}", "(" * 3000 + ")" * 3000, "x" * 30_000, "(?P<1>)"])
def test_invalid_regular_expressions_are_refused(pattern):
    with pytest.raises(InputError, match=r"^config: .* is not a regular expression: "):
        Patterns([pattern], "config")


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("compressed-tensors", {"ignore": ["re:" + HOSTILE]}),
        ("gptq", {"dynamic": {"-:" + HOSTILE: {}}}),
    ],
)
def test_configs_of_checkpoints_are_bounded(format, change, monkeypatch):
    from lowbit.numerics.scheme import Scheme

    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.05)
    fmt = get_format(format)
    parsed = fmt.parse(fmt.config(Scheme(), {}, ()) | change)
    with pytest.raises(InputError, match=r"quantization_config.* takes too long"):
        parsed.lookup([NAMES[1]], "Linear")
