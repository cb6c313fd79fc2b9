"""lowbit report"""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.terminal import console


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `lowbit quantize` wrote.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: DIR.report.html, beside DIR.", show_default=False)
    ] = None,
):
    """Show what a quantize run did as one HTML page: errors, sizes, what to try, how to do it again.

    Needs the extra `report`. The page holds all that it shows: it can be sent, printed, and read offline.
    """
    from lowbit.checkpoint.report_file import load_report
    from lowbit.guards.safe_files import write_whole
    from lowbit.report_page.page import render

    page = render(load_report(folder), str(folder))
    output = output or Path(f"{folder.resolve()}.report.html")
    write_whole(output, page)
    console.print(f"written to {output}")
