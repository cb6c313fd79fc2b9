"""What callers hand over in Python, and what they are told."""

import pytest
from folders import read_json, save_chat_model

import lowbit
from lowbit.errors import InputError, UsageError

FEW = {"num_samples": 4, "seqlen": 32, "group_size": 32}


@pytest.fixture
def model(tmp_path):
    return save_chat_model(tmp_path / "model")


def test_overrides_as_a_dict_are_those_of_pairs(model, tmp_path):
    wanted = {".*down_proj": "W8A16-G32", ".*q_proj": lowbit.Scheme(3, 32)}
    recipes = [
        lowbit.quantize(model, tmp_path / name, overrides=overrides, group_size=32).recipe
        for name, overrides in {"dict": wanted, "pairs": list(wanted.items()), "iterator": iter(wanted.items())}.items()
    ]
    assert recipes[0] == recipes[1] == recipes[2] and len(recipes[0]["overrides"]) == 2


@pytest.mark.parametrize("wrong", [["a=W8A16"], [("a",)], [(1, "W8A16")], ["ab"]], ids=repr)
def test_overrides_of_another_form_are_refused(model, tmp_path, wrong):
    with pytest.raises(UsageError, match=r"override .* is not understood"):
        lowbit.quantize(model, tmp_path / "out", overrides=wrong)


def test_a_list_of_texts_is_called_one(model, tmp_path):
    with pytest.raises(InputError, match=r"is a list of texts; expected integers .* or the name of a file of texts"):
        lowbit.quantize(model, tmp_path / "out", method="gptq", dataset=["a text", "another"], **FEW)


@pytest.mark.parametrize("wrong", [["a text", 5], [[1, 2], ["a", "b"]]], ids=repr)
def test_lists_of_other_things_are_refused_in_one_line(model, tmp_path, wrong):
    with pytest.raises(InputError) as caught:
        lowbit.quantize(model, tmp_path / "out", method="gptq", dataset=wrong, **FEW)
    assert "\n" not in str(caught.value) and "token ids" in str(caught.value)


def test_an_empty_model_name_is_not_the_current_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model)
    for name in ("", " "):
        with pytest.raises(InputError, match="no model is named"):
            lowbit.quantize(name, tmp_path / "out")


def test_the_report_names_a_folder_from_the_root_on(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lowbit.quantize("model", "out", group_size=32)
    assert read_json(tmp_path / "out" / "lowbit_report.json")["source"] == str(tmp_path / "model")


def test_errors_of_loading_are_not_drowned(model, capfd):
    from folders import edit_tensors

    edit_tensors(model, lambda tensors: tensors.pop("model.norm.weight"))
    import transformers

    before = transformers.logging.get_verbosity()
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        lowbit.load(model)
    assert "LOAD REPORT" not in capfd.readouterr().err and transformers.logging.get_verbosity() == before


def test_a_plain_folder_opens_and_has_nothing_to_verify(model):
    found = {check.name: check for check in lowbit.verify(model).checks}
    assert found["opens"].ok and found["quantized"].detail.endswith("holds no quantized weights: nothing to verify")


def test_a_tokenizer_that_is_not_there_is_said_to_be(model):
    from lowbit.generation.stream import load_tokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(InputError, match="the folder holds none of") as caught:
        load_tokenizer(model)
    assert "\n" not in str(caught.value)
