"""The damages of scripts/mutations.py can be made: what they change is in the code, what has to notice is there."""

import pytest
from folders import ROOT
from mutations import Damage, damages, first_failure, tried

ALL = damages()


@pytest.mark.parametrize("damage", ALL, ids=lambda damage: damage.name)
def test_damage_can_be_made(damage):
    assert damage.problem(ROOT) is None and damage.old != damage.new
    code = (ROOT / damage.file).read_text(encoding="utf-8").replace(damage.old, damage.new)
    if damage.file.endswith(".py"):
        compile(code, damage.file, "exec")


def test_names_are_told_apart():
    assert len({damage.name for damage in ALL}) == len(ALL) >= 30


def test_a_damage_that_cannot_be_made_says_why(tmp_path):
    damage = Damage("x", "code.py", "a = 1", "a = 2", ["test_code.py"])
    assert damage.problem(tmp_path) == "code.py is not there"
    (tmp_path / "code.py").write_text("a = 1\na = 1\n")
    assert damage.problem(tmp_path) == "'a = 1' is in code.py 2 times"
    (tmp_path / "code.py").write_text("a = 1\n")
    assert damage.problem(tmp_path) == "test_code.py is not there"
    (tmp_path / "test_code.py").write_text("")
    assert damage.problem(tmp_path) is None


@pytest.mark.slow
def test_a_damage_is_noticed_or_missed_and_taken_back(tmp_path):
    code = tmp_path / "code_under_test.py"
    code.write_text("a = 1\nb = 2\n")
    (tmp_path / "test_code.py").write_text("import code_under_test as c\n\ndef test_a():\n    assert c.a == 1\n")
    for old, new, noticed in (("a = 1", "a = 3", "test_code.py::test_a"), ("b = 2", "b = 3", None)):
        damage = Damage("x", code.name, old, new, ["test_code.py"])
        assert tried(damage, tmp_path)["noticed_by"] == noticed
        assert code.read_text() == "a = 1\nb = 2\n"
    with pytest.raises(RuntimeError, match="pytest ended with 4"):
        first_failure(tmp_path, ["missing.py"])
