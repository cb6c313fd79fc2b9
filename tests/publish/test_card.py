"""The model card: what the Hub reads of it, what people read, and that nothing is made up where nothing is known."""

import re

import pytest
from facts import BASE_CARD, REPORT
from folders import edit_config, read_json, save_random_llama, stored_tensors, write_json
from huggingface_hub import ModelCard
from models import save_tiny
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import InputError, UsageError
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.publish import Facts, model_card
from lowbit.publish.facts import hub_id


def rendered(folder, repo_id="me/tiny", **known) -> ModelCard:
    card = model_card(Facts.of(folder, **known), repo_id)
    assert str(ModelCard(str(card))) == str(card)
    return card


def metadata(folder, **known) -> dict:
    return rendered(folder, **known).data.to_dict()


def rows(card: ModelCard) -> dict[str, list[str]]:
    """First cell of each row of a table -> the others."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines() if line[:1] == "|"
    ]
    return {first: others for first, *others in cells}


def edit_report(folder, **changes) -> None:
    write_json(folder / "lowbit_report.json", {**REPORT, **changes})


# What the Hub reads


def test_metadata(folder):
    data = metadata(folder)
    results = data.pop("model-index")
    assert data == {
        "base_model": "acme/Tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "acme-1",
        "license_link": "https://huggingface.co/acme/Tiny/blob/main/LICENSE.txt",
        "language": ["en"],
        "datasets": ["NeelNanda/pile-10k"],
        "tags": ["lowbit", "compressed-tensors", "4-bit", "w4a16", "chat"],
    }
    (result,) = results
    (measured,) = result["results"]
    assert result["name"] == "tiny" and measured["dataset"] == {"name": "wikitext2", "type": "wikitext2"}
    values = {metric["type"]: metric["value"] for metric in measured["metrics"]}
    assert values == {"perplexity": 18.2341, "kl_divergence": 0.01384}


def test_metadata_of_a_folder_that_says_nothing(bare):
    assert metadata(bare) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lowbit", "compressed-tensors", "4-bit", "w4a16"],
    }


def test_the_licence_file_that_is_there_is_linked(folder):
    (folder / "LICENSE.txt").write_text("Acme 1")
    assert metadata(folder)["license_link"] == "LICENSE.txt"


def test_a_licence_file_without_a_card(bare):
    (bare / "LICENSE").write_text("Acme 1")
    data = metadata(bare)
    assert (data["license"], data["license_link"]) == ("other", "LICENSE")


def test_a_well_known_licence(folder):
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    data = metadata(folder)
    assert data["license"] == "apache-2.0" and not {"license_link", "license_name"} & data.keys()


def test_zero_points_and_bits_in_the_tags(tmp_path, plain):
    lowbit.quantize(plain.with_name("tiny"), tmp_path / "out", scheme="W3A16_ASYM-G32")
    (tmp_path / "out" / "lowbit_report.json").unlink(missing_ok=True)
    card = rendered(tmp_path / "out")
    assert {"3-bit", "w3a16_asym"} < set(card.data.tags)
    assert "3 bits with zero points, one scale for 32 inputs (`W3A16_ASYM-G32`)" in card.text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("acme/Tiny", "acme/Tiny"),
        ("/home/me/.cache/huggingface/hub/models--acme--Tiny-2/snapshots/0123/", "acme/Tiny-2"),
        ("/data/models/Tiny", None),
        ("./models/Tiny", None),
        ("../Tiny", None),
        ("reference", None),
    ],
)
def test_which_sources_are_on_the_hub(source, expected):
    assert hub_id(source) == expected


def test_a_local_folder_named_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "Tiny").mkdir(parents=True)
    assert hub_id("acme/Tiny") is None


def test_local_paths_of_the_source_are_not_published(folder):
    edit_report(folder, source="/home/joe/secret-project/Tiny", command=None)
    card = rendered(folder)
    assert not {"base_model", "base_model_relation"} & card.data.to_dict().keys()
    assert "joe" not in str(card) and "Tiny with its weights in 4 bits" in card.text
    assert "[the card of the base model](BASE_MODEL_CARD.md)" in card.text
    assert card.data.license_link == "LICENSE.txt"


def test_the_base_model_that_is_given_wins(folder):
    assert metadata(folder, base_model="acme/Other")["base_model"] == "acme/Other"
    with pytest.raises(UsageError, match="expected a Hub id"):
        Facts.of(folder, base_model="/data/Tiny")


def test_the_name_that_older_transformers_left_names_no_base_model(bare):
    """`from_pretrained("models/Tiny")` wrote a folder there as it wrote a Hub id."""
    edit_config(bare, _name_or_path="models/Tiny")
    assert "base_model" not in metadata(bare)


def test_the_card_of_a_quantization_speaks_of_itself(folder):
    """And not of the base model: its licence and lineage are kept as they are."""
    mine = BASE_CARD.replace(
        "base_model: acme/Tiny-Pretrained", "base_model: [acme/Tiny]\nbase_model_relation: quantized"
    )
    (folder / "README.md").write_text(mine)
    facts = Facts.of(folder)
    assert (facts.base_model, facts.has_base_card) == ("acme/Tiny", False)
    assert rendered(folder).data.license_link == "LICENSE.txt"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "Tiny-W4A16-G32-GPTQ"),
        ({"recipe": Recipe(Scheme(8, -1, False)).to_dict()}, "Tiny-W8A16_ASYM-CHANNEL"),
        ({"source": "/data/Tiny-2/"}, "Tiny-2-W4A16-G32-GPTQ"),
        ({"source": None}, "tiny-4bit"),
        ({"recipe": None}, "Tiny-W4A16-G32"),
    ],
)
def test_names(folder, changes, name):
    edit_report(folder, **changes)
    assert Facts.of(folder).suggested_name == name


def test_a_mixed_recipe_is_named_by_its_bits(folder):
    edit_report(folder, recipe=Recipe(Scheme(4, 32), overrides=[(".*down_proj", Scheme(8))]).to_dict())
    stored = stored_tensors(folder)
    parts = [tensor for name, tensor in stored.items() if name.rsplit("_", 1)[-1] in ("packed", "scale", "shape")]
    weights = sum(int(tensor.prod()) for name, tensor in stored.items() if name.endswith("weight_shape"))
    bits = 8 * sum(tensor.nbytes for tensor in parts) / weights
    assert Facts.of(folder).suggested_name == f"Tiny-bpw{bits:.2f}"


# What people read


def test_numbers(folder):
    card = rendered(folder)
    table = rows(card)
    dense = AutoModelForCausalLM.from_config(lowbit.load(folder).config.get_text_config())
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    assert table["parameters"] == ["", f"{parameters:,}"]
    assert table["weights"][0] == "2.47 GB" and table["weights"][1].endswith(" MB")
    assert table["perplexity"] == ["17.700", "18.234"]
    assert table["mean KL divergence (nats per token)"] == ["0.00000", "0.01384"]
    assert table["the same most likely token"] == ["100.00%", "92.30%"]
    assert "Measured on 4,000 tokens of wikitext2." in card.text and "not been measured" not in card.text


def test_card_shows_calibration_versions_time_and_command(folder):
    card = rendered(folder)
    table = rows(card)
    assert table["calibration"] == ["16 samples, 32,768 tokens, from NeelNanda/pile-10k, train"]
    assert table["versions"] == ["torch 2.13.0, transformers 5.23.0"]
    assert (table["time"], table["peak memory"]) == (["83.4 s"], ["1.25 GB"])
    assert f"```bash\n{REPORT['command']}\n```" in card.text and "written by lowbit 0.1.0" in card.text


def test_card_lists_quantized_and_dense_modules(folder):
    text = rendered(folder).text
    assert "- `model.layers.*.mlp.gate.weight` (2): router" in text
    assert "- `lm_head.weight`: output embedding" in text
    assert "- `model.layers.*.mlp.down_proj.weight`: W4A16-G16" in text


def test_without_a_report_the_config_tells_what_is_not_quantized(bare):
    quantization = read_json(bare / "config.json")["quantization_config"]
    edit_config(
        bare, quantization_config={**quantization, "ignore": ["lm_head", "model.layers.0.x", "model.layers.1.x"]}
    )
    card = rendered(bare)
    assert "- `lm_head`\n- `model.layers.*.x` (2)\n" in card.text
    assert "How it was made" not in card.text and "lowbit eval me/tiny" in card.text
    assert rows(card)["parameters"][1] == f"{Facts.of(bare).summary['parameters']:,}"


def test_measurements_of_an_eval_win(folder):
    quality = {"model": "x", "reference": None, "dataset": "stdlib", "perplexity": 9.5, "tokens": 100, "seqlen": 64,
               "reference_perplexity": None, "kl_mean": None, "kl_p99": None, "top1_agreement": None}  # fmt: skip
    card = rendered(folder, quality=quality)
    assert rows(card)["perplexity"] == ["", "9.500"] and "KL" not in card.text
    assert "Measured on 100 tokens of stdlib in windows of 64." in card.text


@pytest.mark.parametrize("key", REPORT)
@pytest.mark.parametrize("gone", ["missing", "null"])
def test_unknown_values_leave_no_line_in_the_card(folder, key, gone):
    report = {name: value for name, value in REPORT.items() if name != key}
    write_json(folder / "lowbit_report.json", report if gone == "missing" else {**report, key: None})
    card = str(rendered(folder))
    assert not re.search(r"\b(None|nan|null|Undefined)\b|\{\{|\{%", card)
    assert "\n\n\n" not in card and card.endswith("\n")


def test_no_gaps_in_the_page(folder, bare):
    for made in (folder, bare):
        assert "\n\n\n" not in str(rendered(made))


def test_the_snippet_runs(folder, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", rendered(folder).text, flags=re.DOTALL)
    exec(snippet.replace("me/tiny", str(folder)), {})
    assert capsys.readouterr().out.startswith("The first thing to know is")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Sides that the kernels of all engines take."""
    return save_random_llama(tmp_path_factory.mktemp("wide") / "wide", hidden=128, intermediate=256, layers=1)


@pytest.mark.parametrize(
    ("options", "vllm", "sglang"),
    [
        ({"scheme": "W4A16-G32"}, True, True),
        ({"scheme": "W8A16-CHANNEL"}, True, True),
        ({"scheme": "W3A16-G32"}, True, False),
        ({"scheme": "W4A16-G32", "overrides": [(".*q_proj", "W8A16-G32")]}, False, False),
        ({"scheme": "W4A16-G32", "ignore": [".*k_proj"]}, False, False),
        ({"scheme": "W4A16-G32", "overrides": [(".*down_proj", "W8A16-G32")]}, True, True),
    ],
    ids=["G32", "CHANNEL", "3-bit", "mixed-q", "dense-k", "mixed-down"],
)
def test_engines(tmp_path, wide, options, vllm, sglang):
    """What serves and what does not, and why: query, key and value are one matrix there."""
    lowbit.quantize(wide, tmp_path / "out", **options)
    text = rendered(tmp_path / "out").text
    assert ("vllm serve me/tiny" in text) is vllm and ("vLLM 0.33 does not take it: " in text) is not vllm
    assert ("sglang.launch_server --model-path me/tiny" in text) is sglang
    assert bool(re.search("SGLang .* does not take it: model.layers.0", text)) is not sglang


def test_fused_experts_are_for_lowbit(tmp_path):
    save_tiny(tmp_path / "moe", "gpt_oss")
    lowbit.quantize(tmp_path / "moe", tmp_path / "out", group_size=32)
    text = rendered(tmp_path / "out").text
    assert "vllm serve" not in text and "is stored as one tensor of all experts" in text


def test_a_gptq_checkpoint(tmp_path, wide):
    lowbit.quantize(wide, tmp_path / "out", scheme="W4A16-G32", format="gptq")
    card = rendered(tmp_path / "out")
    assert "gptq" in card.data.tags and "vllm serve me/tiny" in card.text and "the gptq format" in card.text


def test_a_model_with_code_of_its_own_is_not_run(bare):
    edit_config(bare, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, model_type="own")
    text = rendered(bare).text
    assert "vllm" not in text.lower() and "lowbit.load" in text


# What cannot be used


def test_dense_folders_are_refused(plain):
    with pytest.raises(InputError, match="nothing is quantized"):
        Facts.of(plain.with_name("tiny"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("lowbit_report.json", "{", "lowbit_report.json is not valid JSON"),
        ("lowbit_report.json", "[]", "expected an object"),
        ("lowbit_report.json", '{"recipe": {"scheme": {"bits": 7}, "method": "rtn"}}', "bits is 7"),
        ("lowbit_report.json", '{"recipe": {"scheme": {"bits": 4}}}', "lowbit_report.json: recipe.method is missing"),
        ("README.md", "---\nlicense: [\n---\n", "metadata of .*README.md cannot be read"),
        ("README.md", "---\n- a list\n---\n", "metadata of .*README.md cannot be read"),
    ],
)
def test_damaged_files(folder, name, text, says):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=says):
        Facts.of(folder)


def test_a_card_without_metadata(folder):
    (folder / "README.md").write_text("# Tiny\n")
    facts = Facts.of(folder)
    assert facts.has_base_card and "license" not in metadata(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": "1"}, {"left_alone": [1]}, {"left_alone": {"a": 1}}, {"fallbacks": "x"}, {"calibration": "abc"},
        {"calibration": {"samples": "x"}}, {"quality": {"perplexity": "x"}}, {"quality": [1]}, {"source": 5},
        {"source_bytes": "x"}, {"versions": {"torch": 2}}, {"versions": [1]}, {"machine": {}}, {"date": 5},
        {"command": ["x"]}, {"lowbit": 1.0}, {"peak_memory": True}, {"recipe": {"scheme": {}, "method": 5}},
        {"recipe": {"scheme": {"bits": 4}, "method": "rtn", "overrides": [["a{99999999999}", {}]]}}, {"seconds": 1e400},
    ],
    ids=str,
)  # fmt: skip
def test_reports_of_other_types_are_one_line(folder, change):
    report = read_json(folder / "lowbit_report.json")
    write_json(folder / "lowbit_report.json", {**report, **change})
    with pytest.raises(InputError, match=r"lowbit_report\.json") as caught:
        Facts.of(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "metadata",
    ["tags: [[a]]", "license_link: 5", "license: {a: b}", "language: no", "base_model: 7", "pipeline_tag: []"],
)
def test_cards_of_other_types_are_one_line(folder, metadata):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(InputError, match=rf"the metadata of .*README\.md: {metadata.split(':')[0]}.*expected"):
        Facts.of(folder)


def test_an_empty_list_of_base_models_names_none(folder):
    (folder / "README.md").write_text("---\nbase_model: []\nbase_model_relation: quantized\n---\n")
    assert Facts.of(folder).base_model is None


def test_a_card_that_lies_elsewhere_is_none(folder, tmp_path):
    (tmp_path / "elsewhere.md").write_text("---\nlicense: secret\n---\n")
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").symlink_to(tmp_path / "elsewhere.md")
    facts = Facts.of(folder)
    assert not facts.has_base_card and facts.card.get("license") is None


ALLOCATION = {
    "budget": {"fit": 3e9},
    "predicted_kl": 0.021,
    "units": [
        {"name": "model.layers.0.mlp.gate_proj+up_proj", "scheme": "W3A16_ASYM-G128", "bytes": 1100, "kl": 0.01},
        {"name": "model.layers.0.mlp.down_proj", "scheme": "W8A16-G32", "bytes": 300, "kl": 0.011},
    ],
    "judged": [{"bytes": 540, "bits": 3.49, "kl": 0.021}],
    "frontier": [{"bytes": 400, "bits": 2.5, "kl": 0.2}],
    "uniform": [{"scheme": "W3A16-G64", "bytes": 500, "bits": 3.25, "kl": 0.05}],
}


def test_what_was_chosen_for_a_budget(folder):
    edit_report(folder, allocation=ALLOCATION)
    card = rendered(folder)
    assert "for a budget of 3,000,000,000 bytes of memory while it runs" in card.text
    table = rows(card)
    assert table["gate\\_proj+up\\_proj"] == ["1 × W3A16\\_ASYM-G128", "1,100", "0.0100"]
    assert table["chosen here"] == ["3.49", "0.0210"]
    assert table["the best for each part"] == ["2.50", "0.2000"]
    assert table["W3A16-G64 for all"] == ["3.25", "0.0500"]


def test_a_budget_whose_parts_nobody_wrote_down_has_no_table(folder):
    edit_report(folder, allocation={**ALLOCATION, "units": []})
    assert "was foreseen for it" not in rendered(folder).text
