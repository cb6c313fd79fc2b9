"""Names, checks and fallbacks of schemes and recipes."""

import dataclasses
import itertools
import json

import pytest

from lowbit.errors import UsageError
from lowbit.numerics.scheme import BITS, GROUP_SIZES, TENSOR, TOKEN, Activations, Recipe, Scheme

NAMES = {
    "W4A16": Scheme(4, 128, True),
    "W8A16-G64": Scheme(8, 64, True),
    "W4A16_ASYM": Scheme(4, 128, False),
    "W2A16_ASYM-G16": Scheme(2, 16, False),
    "W3A16-CHANNEL": Scheme(3, -1, True),
    "W3A16_ASYM-CHANNEL": Scheme(3, -1, False),
    "  w4a16_asym-g1024 ": Scheme(4, 1024, False),
    "W8A8": Scheme(8, -1, True, Activations(8, True, TOKEN)),
    "W8A8-G128": Scheme(8, 128, True, Activations()),
    "W8A8-STATIC": Scheme(8, -1, True, Activations(8, False, TENSOR)),
    "w8a8-static_sym": Scheme(8, -1, True, Activations(8, True, TENSOR)),
    "W4A8": Scheme(4, 128, True, Activations()),
    "W4A8-CHANNEL-DYNAMIC_ASYM": Scheme(4, -1, True, Activations(8, False, TOKEN)),
    "W3A8_ASYM-G64-STATIC": Scheme(3, 64, False, Activations(8, False, TENSOR)),
}


@pytest.mark.parametrize("name", NAMES)
def test_parse(name):
    assert Scheme.parse(name) == NAMES[name]


EVERY_ACTIVATIONS = [None, *(Activations(8, sym, strategy) for sym in (True, False) for strategy in (TOKEN, TENSOR))]


@pytest.mark.parametrize("bits", BITS)
def test_every_name_reads_back(bits):
    names = set()
    for fields in itertools.product(GROUP_SIZES, (True, False), EVERY_ACTIVATIONS):
        scheme = Scheme(bits, *fields)
        assert Scheme.parse(scheme.name) == scheme
        assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
        names.add(scheme.name)
    assert len(names) == len(GROUP_SIZES) * 2 * len(EVERY_ACTIVATIONS)


def test_without_activations_nothing_is_said_of_them():
    assert Scheme(4, 64).to_dict() == {"bits": 4, "group_size": 64, "sym": True}
    assert "activation_range" not in Recipe(Scheme.parse("W8A8")).to_dict()
    static = Recipe(overrides=[("x", Scheme.parse("W8A8-STATIC"))], activation_range="mse")
    assert static.is_static and static.to_dict()["activation_range"] == "mse"
    assert Recipe.from_dict(static.to_dict()) == static


@pytest.mark.parametrize(
    "name",
    [
        "",
        "W4",
        "W4A4",
        "W4A16-STATIC",
        "W8A8-DYNAMIC",
        "W8A8-STATIC-CHANNEL",
        "W4A16-",
        "W4A16-G",
        "W4A16_SYM",
        "W4A16-G-1",
        "W4A16-CHANNEL-G32",
        "4",
        "W4A16 -G32",
    ],
)
def test_parse_names_the_pattern_it_expects(name):
    with pytest.raises(UsageError, match=r"is not known; expected W<bits>A16\[_ASYM\]\[-G<group>\|-CHANNEL\]"):
        Scheme.parse(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 7}, "bits is 7; allowed: 2, 3, 4, 5, 6, 8"),
        ({"bits": "4"}, "bits is '4'; allowed: 2, 3, 4, 5, 6, 8"),
        ({"bits": True}, "bits is True; allowed"),
        ({"bits": 4.0}, "bits is 4.0; allowed"),
        ({"group_size": 48}, "group_size is 48; allowed: 16, 32, 64, 128, 256, 512, 1024, -1"),
        ({"group_size": 0}, "group_size is 0; allowed"),
        ({"group_size": None}, "group_size is None; allowed"),
        ({"group_size": 128.0}, "group_size is 128.0; allowed"),
        ({"sym": "yes"}, "sym is 'yes'; allowed: True, False"),
        ({"sym": None}, "sym is None; allowed"),
        ({"sym": 1}, "sym is 1; allowed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_errors_list_the_allowed_values(fields, message):
    with pytest.raises(UsageError) as error:
        Scheme(**fields)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["W7A16", "W4A16-G48", "W16A16", "W4A16-G0"])
def test_parse_checks_values(name):
    with pytest.raises(UsageError, match="allowed: "):
        Scheme.parse(name)


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 8.0}, {"sym": 1}, {"strategy": "channel"}], ids=str)
def test_errors_of_activations_list_the_allowed_values(fields):
    with pytest.raises(UsageError, match=f"activation {next(iter(fields))} is .*; allowed: "):
        Activations(**fields)


def test_an_unknown_range_of_activations():
    with pytest.raises(UsageError, match="activation_range is 'max'; allowed: mse, minmax, percentile"):
        Recipe(activation_range="max")


def test_schemes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme().bits = 2


@pytest.mark.parametrize(
    ("group", "in_features", "fitted"),
    [
        (128, 4096, 128),
        (128, 172, -1),  # 4 * 43
        (64, 96, 32),
        (128, 96, 32),
        (128, 48, 16),
        (1024, 768, 256),
        (128, 64, 64),  # a group longer than the row
        (16, 8, -1),
        (16, 24, -1),
        (32, 1, -1),
        (-1, 172, -1),
        (64, 4096 + 32, 32),
    ],
)
def test_fitted_takes_the_next_smaller_group_else_the_channel(group, in_features, fitted):
    for bits, sym in ((4, True), (2, False)):
        scheme = Scheme(bits, group, sym)
        assert scheme.fitted(in_features) == Scheme(bits, fitted, sym)
        assert scheme.fits(in_features) == (group == fitted)
        assert scheme.fitted(in_features).fits(in_features)


@pytest.mark.parametrize(("group", "length", "count"), [(32, 32, 3), (16, 16, 6), (-1, 96, 1)])
def test_groups(group, length, count):
    assert Scheme(4, group).group_of(96) == length
    assert Scheme(4, group).groups(96) == count


@pytest.mark.parametrize(("bits", "levels", "middle"), [(2, 4, 2), (3, 8, 4), (4, 16, 8), (8, 256, 128)])
def test_levels(bits, levels, middle):
    assert (Scheme(bits).levels, Scheme(bits).middle) == (levels, middle)


RECIPE = Recipe(
    Scheme(4, 64, False),
    "rtn",
    {"scale_search": "mse"},
    [(r"model\.layers\.0\.", Scheme(8, 32)), (r".*down_proj", Scheme(8, -1)), (r".*_proj", Scheme(3, 128, False))],
    [r".*\.gate$"],
    Scheme(8, 64),
)


def test_recipe_survives_json():
    data = RECIPE.to_dict()
    again = Recipe.from_dict(json.loads(json.dumps(data)))
    assert again == RECIPE
    assert again.to_dict() == data


def test_head_has_a_scheme_of_its_own():
    head, other = "lm_head", "model.layers.1.q_proj"
    assert RECIPE.asked_for(head, is_head=True) == Scheme(8, 64)
    assert Recipe(Scheme(2)).asked_for(head, is_head=True) == Recipe(Scheme(2), lm_head=Scheme(8)).asked_for(other)
    overridden = Recipe(overrides=[(head, Scheme(3))], lm_head=Scheme(8))
    assert overridden.asked_for(head, is_head=True) == Scheme(3)


def test_recipe_from_the_least_data():
    assert Recipe.from_dict({"scheme": {"bits": 2}, "method": "rtn"}) == Recipe(Scheme(2))
    old = {"scheme": {"bits": 2}, "method": "rtn", "lm_head": True}  # of reports from before heads had a scheme
    assert Recipe.from_dict(old) == Recipe(Scheme(2), lm_head=Scheme(2))


def test_recipe_keeps_no_reference_to_what_it_was_made_from():
    options, ignore = {"scale_search": "mse"}, ["a"]
    recipe = Recipe(options=options, ignore=ignore)
    options["scale_search"] = "minmax"
    ignore.append("b")
    recipe.to_dict()["options"]["scale_search"] = "minmax"
    assert recipe.options == {"scale_search": "mse"} and recipe.ignore == ("a",)


@pytest.mark.parametrize(
    ("name", "in_features", "expected"),
    [
        ("model.layers.0.mlp.down_proj", 256, Scheme(8, 32)),  # the first pattern that matches wins
        ("model.layers.1.mlp.down_proj", 256, Scheme(8, -1)),
        ("model.layers.1.mlp.up_proj", 256, Scheme(3, 128, False)),
        ("model.layers.1.mlp.up_proj", 96, Scheme(3, 32, False)),  # an override falls back as the default does
        ("model.layers.1.mlp.fc1", 256, Scheme(4, 64, False)),
        ("model.layers.1.mlp.fc1", 96, Scheme(4, 32, False)),
        ("xmodel.layers.0.fc1", 256, Scheme(4, 64, False)),  # patterns are anchored at the start
    ],
)
def test_overrides(name, in_features, expected):
    assert RECIPE.asked_for(name).fitted(in_features) == expected


@pytest.mark.parametrize(
    ("ignore", "names", "pattern"),
    [
        (["lm_head"], ["lm_head"], "lm_head"),
        (["re:.*gate$"], ["model.layers.3.mlp.gate"], ".*gate$"),
        (["re:.*gate$"], ["model.layers.3.mlp.gate_proj"], None),
        ([".*gate$"], ["model.gate"], ".*gate$"),
        ([r"layers\.3"], ["model.layers.3"], None),  # from the start, as the marked regexes of compressed-tensors
        (["x", "re:.*experts"], ["a.mlp.gate_up_proj", "a.mlp.experts"], ".*experts"),
        ("lm_head", ["lm_head"], "lm_head"),  # one pattern, not seven letters
        ("lm_head", ["lm"], None),
        (["down_proj"], ["model.layers.0.mlp.down_proj"], "down_proj"),  # a plain name: whole words anywhere
        (["layers.1"], ["model.layers.1.mlp.up_proj"], "layers.1"),
        (["layers.1"], ["model.layers.11.mlp.up_proj"], None),
        (["proj"], ["model.layers.1.mlp.up_proj"], None),
        ([], ["lm_head"], None),
    ],
)
def test_ignore(ignore, names, pattern):
    assert Recipe(ignore=ignore).ignored_by(*names) == pattern


def test_override_patterns_may_be_marked_as_regexes_too():
    recipe = Recipe(overrides=[("re:.*down_proj", Scheme(8, 32))])
    assert recipe.asked_for("model.layers.0.mlp.down_proj").fitted(64) == Scheme(8, 32)


@pytest.mark.parametrize("fields", [{"ignore": ["("]}, {"ignore": ["re:*"]}, {"overrides": [("[", Scheme())]}], ids=str)
def test_bad_patterns(fields):
    with pytest.raises(UsageError, match="is not a regular expression: "):
        Recipe(**fields)
