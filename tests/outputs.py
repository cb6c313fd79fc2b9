"""Output folders for tests: one that is there already, and one that takes its place."""

from lowbit.checkpoint.writer import StagedFolder


def stage(target, overwrite=False, text="new"):
    with StagedFolder(target, overwrite) as staged:
        (staged.path / "config.json").write_text(text)
        staged.commit()


def old_folder(target):
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "of the old one").write_text("old")
    return target
