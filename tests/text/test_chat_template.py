"""Chat templates are programs of strangers: whatever they do is one line, and ends."""

import io
import sys

import pytest
from folders import save_chat_model, save_tokenizer

from lowbit.errors import InputError
from lowbit.text import chat_template
from lowbit.text.chat_template import chat_ids
from lowbit.text.datasets import chat_tokens

MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BAD = {
    "refusal": "{{ raise_exception('no system\\nrole') }}",
    "zero": "{{ 1 / 0 }}",
    "undefined": "{{ x.y.z }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "syntax": "{% for %}",
    "loops": LOOPS,
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "filter": "{{ messages | no_such_filter }}",
    "types": "{{ messages[0] + 1 }}",
    "named": {"tool": "x", "rag": "y"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def templated(tokenizer, monkeypatch):
    def use(template):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return use


@pytest.mark.parametrize("kind", BAD)
def test_templates_that_fail_are_one_line(templated, monkeypatch, kind):
    monkeypatch.setattr(chat_template, "_MOST_LINES", 20_000)
    for convert in (
        lambda found: chat_ids(found, MESSAGES, "a chat", add_generation_prompt=True),
        lambda found: chat_tokens(found, MESSAGES, "chats.jsonl"),
    ):
        with pytest.raises(InputError, match="the chat template of the tokenizer refuses a chat") as caught:
            convert(templated(BAD[kind]))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_long_chats_are_within_the_bounds(templated):
    many = MESSAGES * 2000
    plain = "{% for m in messages %}{% if m.role == 'user' %}<{{ m.role }}>{% endif %}{{ m.content }}{% endfor %}"
    assert len(chat_ids(templated(plain), many, "a chat")) > 8000


def test_output_is_bounded(templated, monkeypatch):
    monkeypatch.setattr(chat_template, "_MOST_CHARACTERS", 1000)
    with pytest.raises(InputError, match="characters of it"):
        chat_ids(templated("{{ 'a' * 1000000 }}"), MESSAGES, "a chat")


def test_memory_is_bounded_and_given_back(templated):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError, match="refuses a chat"):
        chat_ids(templated("{{ 'a' * 200000000000 }}"), MESSAGES, "a chat")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_ids_are_those_of_transformers(templated, tokenizer):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    found = templated(template)
    expected = found.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat_ids(found, MESSAGES, "a chat", add_generation_prompt=True) == list(expected)


@pytest.mark.parametrize("kind", ["refusal", "zero"])
def test_chat_goes_on_and_ends_with_an_exit_code(tmp_path, monkeypatch, capfd, kind):
    from lowbit.cli.main import main

    folder = save_chat_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(BAD[kind])
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand again\n"))
    monkeypatch.setattr(sys, "argv", ["lowbit", "chat", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    err = capfd.readouterr().err
    assert err.count("the chat template of the tokenizer refuses this conversation") == 2 and "Traceback" not in err
