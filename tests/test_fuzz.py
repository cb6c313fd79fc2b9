"""Files of strangers with any value exchanged: an error of one line, or success. scripts/fuzz.py runs more of it."""

from itertools import islice

import pytest
from fuzz import cases, failure, make_folders, quiet

pytestmark = pytest.mark.slow

CASES, SEED = 150, 20251


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    quiet()
    return make_folders(tmp_path_factory.mktemp("originals"))


def test_any_json_gives_one_line_or_success(folders, tmp_path):
    found = (failure(case, tmp_path / "copies") for case in islice(cases(folders, SEED), CASES))
    assert not [problem for problem in found if problem]


def test_fuzz_reports_a_traceback(folders, tmp_path, monkeypatch):
    """A reader that trips over one value is a failure with its traceback."""
    import fuzz

    def careless(folder):
        return fuzz._read(folder / "config.json")["hidden_size"] + 1

    monkeypatch.setattr(fuzz, "_readers", lambda file: {"careless": careless} if file == "config.json" else {})
    found = (failure(case, tmp_path / "copies") for case in islice(cases(folders, SEED), 2000))
    problem = next(filter(None, found))
    assert "hidden_size" in problem and "Traceback" in problem
