"""Uploading a quantized folder to the Hub.

One commit holds all of it, so a repository shows the whole model or nothing. Large files are sent before that, under
the hash of their content: what has arrived is not sent again when a push that was stopped is repeated.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.manifest import REPORT_NAME
from lowbit.checkpoint.reader import INDEX_NAME
from lowbit.checkpoint.side_files import WEIGHT_SUFFIXES, WRITTEN_ANEW, refuse_foreign, side_files, visible
from lowbit.errors import InputError, LowbitError, OutputError, UsageError, first_line
from lowbit.options import PushOptions, takes_options
from lowbit.publish.card import BASE_CARD_NAME, model_card
from lowbit.publish.facts import CARD_NAME, Facts, is_hub_id
from lowbit.publish.private import public_report

_LOGIN = "run `hf auth login` with a token that may write to it"


@dataclass(frozen=True)
class Publication:
    """What is published, or would be. files: path in the repository -> where its content is.

    changed: whether a commit was made; a repository that held all of it already is left as it is.
    """

    repo_id: str
    card: str
    files: dict[str, Path | bytes]
    private: bool
    url: str | None = None
    changed: bool = False

    def sizes(self) -> dict[str, int]:
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


@takes_options
def push(
    folder: str | Path,
    repo: str,
    *,
    options: PushOptions,
    quality: dict | None = None,
    card: str | None = None,
    trust_remote_code: bool = False,
) -> Publication:
    """Publish a quantized folder. Only files of it are published: a link that leads out of it is refused, but for those
    of a folder in the Hub's cache, which all lead to the blobs beside it.

    Args:
        folder: The folder.
        repo: "org/name", or "org/" for a name after the base model and the scheme.
        quality: Measurements as `lowbit eval --json` prints them.
        card: Text of the model card, in place of the one that is written from the folder.
        trust_remote_code: Whether code that comes with the model may run while it is verified.

    Returns:
        What is in the repository now; with dry_run, which stays away from the network, what would be.

    Raises:
        UsageError: The name of the repository.
        InputError: The folder cannot be read, has links that lead out of it, or fails `lowbit verify`.
        OutputError: All that the Hub refuses, or does not get.
    """
    folder = Path(folder)
    refuse_foreign(folder, visible(folder))  # before anything is read: the card quotes what files say
    facts = Facts.of(folder, options.base_model, quality, trust_remote_code)
    repo_id = _repo_id(repo, facts)
    text = str(model_card(facts, repo_id)) if card is None else card
    planned = Publication(repo_id, text, _files(facts, text), options.private)
    if options.dry_run:
        return planned
    _check_access(repo_id)
    _check_verified(folder, trust_remote_code)
    with _hub_errors(repo_id):
        return _upload(planned, options.overwrite)


def _repo_id(repo: str, facts: Facts) -> str:
    repo_id = repo + facts.suggested_name if repo.endswith("/") else repo
    if not is_hub_id(repo_id):
        raise UsageError(f"repository is {repo_id!r}; expected NAMESPACE/NAME, or NAMESPACE/ to have it named")
    return repo_id


def _files(facts: Facts, card: str) -> dict[str, Path | bytes]:
    """Those of the model, not all that lies in the folder; the base model's card makes room for the new one."""
    names = {file.name for file in CheckpointReader(facts.folder).files}
    names |= {path.as_posix() for path in side_files(facts.folder)}
    names |= {name for name in (*WRITTEN_ANEW, INDEX_NAME) if (facts.folder / name).is_file()}
    found = {name: facts.folder / name for name in sorted(names)}
    readme = found.pop(CARD_NAME, None)
    if facts.has_base_card:
        found[BASE_CARD_NAME] = readme
    public = public_report(facts.report, facts.hub_ids)
    if public != facts.report:
        found[REPORT_NAME] = f"{json.dumps(public, indent=1)}\n".encode()
    return {CARD_NAME: card.encode(), **found}


def _check_access(repo_id: str) -> None:
    """What can be known before the folder is verified, which takes long."""
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set (--dry-run works offline)")
    if get_token() is None:
        raise OutputError(f"cannot push to {repo_id}: not logged in to the Hub, {_LOGIN}")


def _check_verified(folder: Path, trust_remote_code: bool = False) -> None:
    from lowbit.eval import verify  # which loads transformers

    result = verify(folder, trust_remote_code=trust_remote_code)
    if not result.ok:
        more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
        raise InputError(f"{folder} fails `lowbit verify`, not pushing it: {result.failures[0]}{more}")


def _upload(planned: Publication, overwrite: bool) -> Publication:
    api, repo_id = HfApi(), planned.repo_id
    url = api.create_repo(repo_id, private=planned.private, exist_ok=True)
    before = api.model_info(repo_id, files_metadata=True)
    if planned.private and not before.private:
        raise OutputError(f"{repo_id} exists and is public: pass --public, or choose another name")
    additions = {name: CommitOperationAdd(name, content) for name, content in planned.files.items()}
    others = [sibling.rfilename for sibling in before.siblings or () if _is_other_weight(sibling, additions)]
    if others and not overwrite:
        raise OutputError(
            f"{repo_id} holds other weights already ({others[0]}): choose another name, or pass --overwrite"
        )
    stale = [CommitOperationDelete(name) for name in others if name not in additions]
    commit = api.create_commit(
        repo_id, [*additions.values(), *stale], commit_message=f"Upload {repo_id.split('/')[1]} with lowbit"
    )
    if before.private and not planned.private:
        api.update_repo_settings(repo_id, private=False)
    return Publication(
        repo_id, planned.card, planned.files, planned.private, str(url), changed=commit.oid != before.sha
    )


def _is_other_weight(sibling, additions: dict[str, CommitOperationAdd]) -> bool:
    """Whether a file of the repository is weights, or their index, that the folder does not have."""
    name = sibling.rfilename
    if not name.lower().endswith((*WEIGHT_SUFFIXES, ".index.json")):
        return False
    if name not in additions or sibling.lfs is None:
        return name not in additions
    own = additions[name].upload_info
    return sibling.lfs.size != own.size or sibling.lfs.sha256 != own.sha256.hex()


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """One line for whatever huggingface_hub raises: its own errors, those of its HTTP library, and of its threads."""
    try:
        yield
    except LowbitError:
        raise
    except Exception as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            raise OutputError(f"the Hub refuses to write to {repo_id} ({status}): {_LOGIN}") from None
        raise OutputError(
            f"cannot push to {repo_id}: {first_line(cause)}; "
            "the same command goes on where it stopped: what has arrived is not sent again"
        ) from None
