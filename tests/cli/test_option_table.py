"""Options that every command needs which does the same thing: over the table of commands, new ones included."""

import pytest

from lowbit.cli.main import COMMANDS, load_command

# Commands that open a model -> why one takes no such option
NO_CODE = {
    "inspect": "reads headers alone",
    "tune": "reads headers alone",
    "report": "reads the report of a run alone",
}
NO_REVISION = {"push": "publishes a folder that is here", "report": "reads a folder that is here"}


def options(name):
    return {parameter.name for parameter in load_command(name).params}


def opens_a_model(name):
    return bool(options(name) & {"model", "folder", "what", "model_option"})


@pytest.mark.parametrize("name", [name for name in COMMANDS if opens_a_model(name)])
def test_a_command_that_opens_a_model_can_trust_it_and_choose_its_revision(name):
    assert ("trust_remote_code" in options(name)) == (name not in NO_CODE)
    assert ("revision" in options(name)) == (name not in NO_REVISION)


def test_every_command_opens_a_model():
    """Or the test above would pass over one whose argument has another name."""
    assert [name for name in COMMANDS if not opens_a_model(name)] == []


# Options that mean something else in each command
OF_THEIR_OWN = {
    "model", "folder", "scheme", "method", "format", "dataset", "seqlen", "seed", "dtype", "reference", "layers",
    "overwrite", "dry_run", "lm_head", "context",
}  # fmt: skip


def test_options_of_one_name_are_one():
    """Stated once, with one help text: whoever knows one command knows the others."""
    helps = {}
    for command in COMMANDS:
        for parameter in load_command(command).params:
            helps.setdefault(parameter.name, {}).setdefault(getattr(parameter, "help", None), []).append(command)
    several = {name: texts for name, texts in helps.items() if len(texts) > 1 and name not in OF_THEIR_OWN}
    assert several == {}
