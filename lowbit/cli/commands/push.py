"""lowbit push"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.common import JsonOption, TrustOption, size
from lowbit.cli.terminal import console, notes, print_json, table
from lowbit.errors import InputError
from lowbit.options import PushOptions, keywords


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized folder.", show_default=False)],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="org/name, or org/ for a name after the base model and the scheme.", show_default=False
        ),
    ],
    quality: Annotated[
        Path | None, typer.Option("--eval", help="Output of `lowbit eval --json`, for the card.", show_default=False)
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            help="A model card of your own, for instance what --dry-run showed and you have edited.", show_default=False
        ),
    ] = None,
    *,
    options: PushOptions,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
):
    """Write the model card and upload a quantized folder to the Hub.

    A push that was stopped goes on when the same command is given again: what has arrived is not sent again.
    """
    import huggingface_hub

    from lowbit.publish import push as publish
    from lowbit.publish.facts import read_object

    huggingface_hub.utils.logging.set_verbosity_error()
    if json or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    done = publish(
        folder,
        repo,
        **keywords(options),
        quality=read_object(quality) if quality is not None else None,
        card=_read_text(card) if card is not None else None,
        trust_remote_code=trust_remote_code,
    )
    if json:
        print_json(
            {"repo": done.repo_id, "private": done.private, "url": done.url, "changed": done.changed,
             "files": done.sizes(), "card": done.card}
        )  # fmt: skip
    else:
        _show(done, options.dry_run)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None


def _show(done, dry_run: bool) -> None:
    sizes = done.sizes()
    whole = f"{len(sizes)} files, {size(sum(sizes.values()))}"
    kind = "private" if done.private else "public"
    if dry_run:
        console.write(done.card.rstrip("\n") + "\n")
        rows = table("file", "size")
        for name, count in sizes.items():
            rows.add_row(name, size(count))
        notes.print(rows)
        notes.print(f"dry run: {whole} would be pushed to {done.repo_id} ({kind}); nothing was uploaded")
    else:
        state = "pushed to" if done.changed else "already at"
        console.print(f"{whole} {state} {done.url} ({kind})")
