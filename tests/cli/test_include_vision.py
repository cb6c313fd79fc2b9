"""--include-vision reaches the recipe."""

import json

import pytest
from tiny import tiny_model_that_runs


@pytest.mark.parametrize("option, others", [((), {"outside of the language model"}), (("--include-vision",), set())])
def test_include_vision(cli, tmp_path, option, others):
    model, _ = tiny_model_that_runs("AutoModelForImageTextToText", "llava")
    model.save_pretrained(tmp_path)
    done = cli("quantize", tmp_path, "--dry-run", "--json", *option)
    assert done.code == 0, done.err
    assert set(json.loads(done.out)["skipped"].values()) == {"output embedding"} | others
