"""A Hub to push to, and a quantized folder in several shards."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from facts import BASE_CARD, REPORT
from folders import save_chat_model, write_json
from hub import running_hub

import lowbit
import lowbit.eval


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A quantized folder with neither report nor card, in several shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("publish")
    save_chat_model(folder / "tiny")
    lowbit.quantize(folder / "tiny", folder / "tiny-4bit", group_size=32, max_shard_size="30KB")
    assert len(list((folder / "tiny-4bit").glob("*.safetensors"))) >= 3
    return folder / "tiny-4bit"


@pytest.fixture
def bare(plain, tmp_path) -> Path:
    """The same, to be changed: what another tool writes."""
    folder = shutil.copytree(plain, tmp_path / "bare")
    (folder / "lowbit_report.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def folder(bare, tmp_path) -> Path:
    """With the report and the card of the base model, which mentions a licence that is not here."""
    folder = shutil.copytree(bare, tmp_path / "tiny-4bit")
    write_json(folder / "lowbit_report.json", REPORT)
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@dataclass
class Found:
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures


@pytest.fixture
def verification(monkeypatch) -> Found:
    """What `lowbit verify` finds."""
    found = Found()
    monkeypatch.setattr(lowbit.eval, "verify", lambda folder, **options: found)
    return found


@pytest.fixture
def hub(monkeypatch, verification):
    with running_hub(monkeypatch) as hub:
        yield hub
