"""One Slurm and one small corpus for the tests of this folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import standard_library

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, missing  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Slurm. Without root or Slurm the tests are skipped, but where SIP_REQUIRE_SLURM is set (CI) they fail."""
    reason = missing()
    if reason:
        (pytest.fail if os.environ.get("SIP_REQUIRE_SLURM") else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: it holds sockets
    found = Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def blend(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """PREFIX_blend.yaml of a small corpus, as tools/preprocess_data.py leaves it."""
    from megatron_sip.data.preprocess import Settings, preprocess

    folder = tmp_path_factory.mktemp("corpus")
    lines = (json.dumps({"text": text[:8000], "meta": {"redpajama_set_name": "code"}}) for text in standard_library(50))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    settings = Settings((str(folder / "text.jsonl"),), str(folder / "d"), str(tokenizer_model), append_eod=True, split_by_subset=True)
    preprocess(settings, say=lambda line: None)
    return folder / "d_blend.yaml"
