"""Options are stated once: a field of a dataclass is a keyword in Python, a flag of commands and a line of the docs."""

import inspect
import re
from dataclasses import dataclass, fields

import pytest
import typer

import lowbit
from lowbit.cli.main import load_command
from lowbit.cli.options import grouped, spelled
from lowbit.errors import UsageError
from lowbit.generation import open_session
from lowbit.options import RecipeOptions, SampleOptions, changed, keywords, like, option, takes_options
from lowbit.options.keywords import option_groups

# Commands, and the functions of Python that they run
COMMANDS = {
    "quantize": lowbit.quantize, "plan": lowbit.plan, "convert": lowbit.convert, "dequantize": lowbit.dequantize,
    "merge": lowbit.merge, "verify": lowbit.verify, "generate": open_session, "chat": open_session,
}  # fmt: skip
# More functions that take options
OTHERS = [lowbit.load, lowbit.convert_dtype, lowbit.LowbitConfig]


@dataclass(frozen=True)
class Options(SampleOptions):
    """As those of calibration, with one more."""

    patience: int = option(3, "How often it is tried again.", least=1)
    names: tuple[str, ...] = option((), "What it is called.", flags=("--name",), typed=list[str] | None, read=tuple)
    told: object = option(None, "Called with what happens.", command=False)


def run(model: str, *, samples: Options):
    """Runs.

    Args:
        model: What is run.

    Returns:
        All that it was given.
    """
    return model, samples


def command(*arguments: str):
    """What the command of `run` gives for a command line."""
    app = typer.Typer(add_completion=False)
    app.command()(grouped(run))
    return typer.main.get_command(app).main(list(arguments), standalone_mode=False)


def test_a_new_field_is_a_keyword_with_its_default_and_help():
    taking = takes_options(run)
    assert str(inspect.signature(taking)).startswith(
        "(model: str, *, num_samples: int = 128, seqlen: int = 2048, patience: int = 3"
    )
    assert taking("m") == ("m", Options())
    assert taking("m", patience=5) == ("m", Options(patience=5))
    assert inspect.getdoc(taking).splitlines()[2:8] == [
        "Args:",
        "    model: What is run.",
        "    num_samples: Calibration samples.",
        "    seqlen: Tokens in a sample.",
        "    patience: How often it is tried again.",
        "    names: What it is called.",
    ]
    assert inspect.getdoc(taking).endswith("\n\nReturns:\n    All that it was given.")


def test_a_new_field_is_a_flag_with_its_default_and_help():
    assert command("m") == ("m", Options())
    given = command("m", "--patience", "5", "--name", "a", "--name", "b")
    assert given == ("m", Options(patience=5, names=("a", "b")))
    with pytest.raises(Exception, match=r"range x>=1|greater than or equal to 1"):
        command("m", "--patience", "0")
    with pytest.raises(Exception, match="No such option"):
        command("m", "--told", "me")


def test_a_misspelt_keyword_is_refused_with_the_nearest():
    taking = takes_options(run)
    with pytest.raises(UsageError, match=r"^run has no option 'patiense': did you mean 'patience'\?$"):
        taking("m", patiense=5)
    with pytest.raises(
        UsageError, match=r"^run has no option 'x'; it has model, num_samples, seqlen, patience, names, told$"
    ):
        taking("m", x=5)
    with pytest.raises(TypeError, match=r"^run: missing a required argument: 'model'$"):
        taking(patience=5)
    with pytest.raises(UsageError, match=r"^quantize has no option 'grop_size': did you mean 'group_size'\?$"):
        lowbit.quantize("reference", "never", grop_size=64)


def test_keywords_that_go_elsewhere_are_left_to_it():
    def load(path, *, samples: SampleOptions, **kwargs):
        """Loads.

        Args:
            path: Where.
            **kwargs: Of another function.
        """
        return samples, kwargs

    assert takes_options(load)("p", seqlen=7, other=1) == (SampleOptions(seqlen=7), {"other": 1})
    assert "Of another" in inspect.getdoc(takes_options(load)).splitlines()[-1]


def test_options_of_a_class_may_be_positional():
    config = lowbit.LowbitConfig(8, 64, ignore=["lm_head"])
    assert (config.recipe.scheme.bits, config.recipe.scheme.group_size) == (8, 64)
    assert list(inspect.signature(lowbit.LowbitConfig).parameters)[:2] == ["bits", "group_size"]
    with pytest.raises(UsageError, match=r"^LowbitConfig has no option 'bit': did you mean 'bits'\?$"):
        lowbit.LowbitConfig(bit=4)


def test_what_was_changed():
    assert [each.name for each in changed(RecipeOptions(sym=False, method="rtn"), SampleOptions(seqlen=64))] == [
        "sym",
        "seqlen",
    ]
    assert [each.name for each in changed(Options(patience=3.0, told=lambda: None))] == ["patience", "told"]
    assert keywords(SampleOptions(1, 2)) == {"num_samples": 1, "seqlen": 2}


def test_a_field_like_another():
    @dataclass(frozen=True)
    class Longer:
        """Longer."""

        seqlen: int = like(SampleOptions, "seqlen", 4096)

    (field,) = fields(Longer)
    assert Longer().seqlen == 4096 and field.metadata["shown"].help == "Tokens in a sample."
    assert field.metadata["shown"].least == 2


@pytest.mark.parametrize("public", [*dict.fromkeys(COMMANDS.values()), *OTHERS], ids=lambda public: public.__name__)
def test_python_says_what_the_fields_say(public):
    made = public.__init__ if isinstance(public, type) else public
    told = re.sub(r"\s+", " ", inspect.getdoc(public))
    shown = inspect.signature(made).parameters
    groups = option_groups(made.__wrapped__)
    assert groups
    for each in (each for kind in groups.values() for each in fields(kind)):
        assert shown[each.name].default is each.default and f"{each.name}: {each.metadata['shown'].help}" in told


@pytest.mark.parametrize(("name", "function"), COMMANDS.items(), ids=COMMANDS)
def test_commands_say_what_python_says(name, function):
    """Each option of a function has a flag with its default and help; only the head has two of its own."""
    flags = {parameter.name: parameter for parameter in load_command(name).params}
    for kind in option_groups(function.__wrapped__).values():
        for each in fields(kind):
            shown = each.metadata["shown"]
            if not shown.command:
                assert each.name not in flags
            elif each.name != "lm_head":
                flag = flags[each.name]
                assert spelled(each) in flag.opts and flag.help.startswith(shown.help)
                assert flag.default == (None if each.default == () else each.default)
