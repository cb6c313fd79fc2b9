"""What arrives at a Hub, and what does not: failures in the middle, repetition, conflicts, refusals."""

import hashlib

import pytest
from folders import contents, read_json
from hub import READ_ONLY, Fault, Repo, running_hub
from huggingface_hub import ModelCard, constants

from lowbit.errors import InputError, OutputError, UsageError
from lowbit.publish import push

pytestmark = pytest.mark.slow

NAME = "me/Tiny-W4A16-G32-GPTQ"


def is_upload(method, path):
    return method == "PUT" and path.startswith("/objects/")


def expected(folder) -> dict[str, bytes]:
    """The folder, its card put aside."""
    files = contents(folder)
    return {"BASE_MODEL_CARD.md": files.pop("README.md"), ".gitattributes": b"", **files}


def test_everything_arrives_in_one_commit(hub, folder):
    before = contents(folder)
    done = push(folder, "me/")
    assert (done.repo_id, done.url, done.changed) == (NAME, f"{hub.url}/{NAME}", True)
    there = hub.contents(NAME)
    assert there.pop("README.md").decode() == done.card
    assert there == expected(folder)
    assert hub.repos[NAME].private and len(hub.repos[NAME].commits) == 2
    assert contents(folder) == before


def test_the_card_is_not_taken_for_that_of_the_base_model_later(hub, folder, tmp_path):
    """Who downloads a model that was pushed and pushes it again publishes the same."""
    first = push(folder, "me/")
    for name, content in hub.contents(NAME).items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    again = push(tmp_path / "downloaded", "you/")
    assert again.repo_id == NAME.replace("me/", "you/")
    assert again.card == first.card.replace(NAME, again.repo_id)
    assert hub.contents(again.repo_id)["BASE_MODEL_CARD.md"] == contents(folder)["README.md"]


def test_unlisted_files_are_not_uploaded(hub, folder):
    (folder / "old.gguf").write_bytes(b"x")
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_bytes(b"x")
    push(folder, "me/")
    assert not {"old.gguf", "model-00009-of-00009.safetensors", ".cache/secret"} & hub.contents(NAME).keys()


def test_a_second_push_sends_nothing(hub, folder):
    push(folder, "me/")
    sent = hub.uploads()
    assert not push(folder, "me/").changed
    assert hub.uploads() == sent and len(hub.repos[NAME].commits) == 2


@pytest.mark.parametrize("status", [None, 500], ids=["dropped", "500"])
def test_a_push_that_was_stopped_goes_on(hub, folder, status):
    shards = sorted(folder.glob("*.safetensors"))
    oids = [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards]
    # the others have time to arrive
    hub.faults = [Fault(lambda _, path: path.endswith(oids[1]), status, after=lambda: len(hub.objects) >= 1)]
    with pytest.raises(OutputError, match="goes on where it stopped"):
        push(folder, "me/")
    arrived = set(hub.objects)
    assert arrived and oids[1] not in arrived
    assert hub.repos[NAME].files.keys() == {".gitattributes"}  # nobody sees half a model

    hub.faults, hub.requests = [], []
    push(folder, "me/")
    assert sorted(hub.uploads()) == sorted(set(oids) - arrived)
    there = hub.contents(NAME)
    assert {name: there[name] for name in expected(folder)} == expected(folder)


@pytest.mark.parametrize("status", [None, 503], ids=["dropped", "503"])
def test_one_failure_is_tried_again(hub, folder, status):
    hub.faults = [Fault(is_upload, status, times=1)]
    assert push(folder, "me/").changed
    assert len(hub.uploads()) == len(set(hub.uploads())) + 1


def test_a_commit_that_fails_sends_no_weights_again(hub, folder):
    hub.faults = [Fault(lambda _, path: "/commit/" in path, 500)]
    with pytest.raises(OutputError, match="cannot push to me/Tiny"):
        push(folder, "me/")
    hub.faults, hub.requests = [], []
    assert push(folder, "me/").changed and hub.uploads() == []


def test_a_folder_that_fails_verification_stays_here(hub, folder, verification):
    verification.failures += ["model.embed_tokens.weight holds NaN", "no canary sang"]
    with pytest.raises(InputError, match=r"fails `lowbit verify`.*embed_tokens.weight holds NaN \(and 1 more\)"):
        push(folder, "me/")
    assert hub.requests == []


@pytest.mark.parametrize(("token", "status"), [("hf_forged", "401"), (READ_ONLY, "403")])
def test_tokens_that_may_not_write(hub, folder, monkeypatch, token, status):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=f"refuses to write to {NAME} .{status}.: run `hf auth login`"):
        push(folder, "me/")
    assert hub.repos == {}


def test_a_token_that_may_only_read_an_existing_repository(hub, folder, monkeypatch):
    hub.repos[NAME] = Repo(private=True)
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    with pytest.raises(OutputError, match=r"\(403\): run `hf auth login`"):
        push(folder, "me/")
    assert hub.repos[NAME].files == {} and hub.objects == {}


def test_without_a_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutputError, match="not logged in to the Hub, run `hf auth login`"):
        push(folder, "me/")
    assert hub.requests == []


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set"):
        push(folder, "me/")
    assert push(folder, "me/", dry_run=True).repo_id == NAME
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached(hub, folder):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(OutputError, match="cannot push to me/Tiny"):
        push(folder, "me/")


def test_a_dry_run_touches_nothing(hub, folder, verification, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    before = contents(folder)
    planned = push(folder, "me/", dry_run=True)
    assert hub.requests == [] and contents(folder) == before and not planned.changed and planned.url is None
    sizes = {name: len(content) for name, content in expected(folder).items() if name != ".gitattributes"}
    assert planned.sizes() == {"README.md": len(planned.card.encode()), **sizes}


# Repositories that exist


def test_a_public_repository_is_not_written_to_by_default(hub, folder):
    hub.repos[NAME] = Repo(private=False)
    with pytest.raises(OutputError, match="is public: pass --public"):
        push(folder, "me/")
    assert hub.repos[NAME].files == {} and hub.objects == {}
    push(folder, "me/", private=False)
    assert "config.json" in hub.contents(NAME)


def test_public_from_the_start(hub, folder):
    push(folder, "me/", private=False)
    assert not hub.repos[NAME].private


def test_private_first_then_public(hub, folder):
    push(folder, "me/")
    hub.requests = []
    push(folder, "me/", private=False)
    assert not hub.repos[NAME].private and hub.uploads() == []


def test_it_becomes_public_only_when_all_is_there(hub, folder):
    hub.repos[NAME] = Repo(private=True)
    hub.faults = [Fault(lambda _, path: "/commit/" in path, 500)]
    with pytest.raises(OutputError):
        push(folder, "me/", private=False)
    assert hub.repos[NAME].private


def other_weights(hub, folder) -> dict[str, bytes]:
    """A repository with a shard more, and one that differs."""
    push(folder, "me/")
    shard = next(name for name in hub.repos[NAME].files if name.endswith(".safetensors"))
    hub.objects["0" * 64] = b"\1" * len(hub.objects[hub.repos[NAME].files[shard]])
    hub.repos[NAME].files |= {shard: "0" * 64, "model-00099-of-00099.safetensors": "0" * 64, "notes.txt": b"mine"}
    return hub.contents(NAME)


def test_other_weights_are_not_replaced(hub, folder):
    there = other_weights(hub, folder)
    with pytest.raises(OutputError, match=r"holds other weights already \(model-00001.*pass --overwrite"):
        push(folder, "me/")
    assert hub.contents(NAME) == there


def test_overwrite_leaves_no_stale_weights(hub, folder):
    other_weights(hub, folder)
    commits = len(hub.repos[NAME].commits)
    done = push(folder, "me/", overwrite=True)
    assert hub.contents(NAME) == {**expected(folder), "README.md": done.card.encode(), "notes.txt": b"mine"}
    assert len(hub.repos[NAME].commits) == commits + 1


def test_an_index_of_other_shards_counts_as_weights(hub, folder, tmp_path):
    hub.repos[NAME] = Repo(True, {"pytorch_model.bin.index.json": b"{}", "tokenizer.json": b"{}"})
    with pytest.raises(OutputError, match=r"other weights already \(pytorch_model.bin.index.json\)"):
        push(folder, "me/")


def test_a_new_card_needs_no_weights(hub, folder):
    push(folder, "me/")
    hub.requests = []
    assert push(folder, "me/", card="---\nlicense: mit\n---\n# Mine\n").changed
    assert ModelCard(hub.contents(NAME)["README.md"].decode()).text == "\n# Mine\n"[1:] and hub.uploads() == []


# Names


@pytest.mark.parametrize("repo", ["tiny", "", "/", "me/a/b", "me/no spaces", "-me/x", "../x/"])
def test_names_that_no_repository_can_have(hub, folder, repo):
    with pytest.raises(UsageError, match="expected NAMESPACE/NAME"):
        push(folder, repo)
    assert hub.requests == []


def test_a_name_of_ones_own(hub, folder):
    assert push(folder, "me/tiny").repo_id == "me/tiny" and list(hub.repos) == ["me/tiny"]


def test_the_index_is_pushed_with_its_shards(hub, folder):
    push(folder, "me/")
    names = set(read_json(folder / "model.safetensors.index.json")["weight_map"].values())
    assert names < hub.contents(NAME).keys() and "model.safetensors.index.json" in hub.contents(NAME)


def test_the_gate_itself(monkeypatch, plain, bare):
    """Not a stand-in for it: what was quantized here passes, and with one byte changed it does not."""
    with running_hub(monkeypatch) as hub:
        assert push(plain, "me/good").changed
        shard = next(bare.glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        with pytest.raises(InputError, match="fails `lowbit verify`"):
            push(bare, "me/bad")
        assert list(hub.repos) == ["me/good"]
