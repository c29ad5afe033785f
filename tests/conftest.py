"""Fixtures shared by all tests: a small real tokenizer, trained here, and a small real teacher, served by vLLM."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sip.servers import LocalServers

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
_TEXT = "Accents: é, ü, ß. Signs: € § →. Emoji: 😀 🚀. 日本語の文章。 Русский текст.\n"


def standard_library(count: int) -> list[str]:
    """Text of the standard library's modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files[:count]]


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model like Llama's (BPE, byte fallback, digits apart), 1,000 pieces."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [line for text in standard_library(40) for line in text.splitlines() if line.strip()][:20_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines + [_TEXT] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=1000, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=0.995, minloglevel=2)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def vllm() -> None:
    """What starts a vLLM server needs it; only on Python 3.12 and newer, which CI does not use, may it be absent (docs/newest_megatron.md)."""
    if sys.version_info >= (3, 12) and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


@pytest.fixture(scope="session")
def teacher_model(request: pytest.FixtureRequest) -> Path:
    """Folder of the quickstart's teacher, fetched once: into $SIP_TEST_CACHE, or pytest's own cache."""
    cache = os.environ.get("SIP_TEST_CACHE")
    folder = (Path(cache) if cache else request.config.cache.mkdir("sip")) / "teacher"
    script = Path(__file__).resolve().parent.parent / "examples" / "fetch_teacher.py"
    done = subprocess.run([sys.executable, str(script), "--output", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@dataclass(frozen=True)
class RunningTeacher:
    url: str
    key: str
    model: str


@pytest.fixture(scope="session")
def teacher_server(vllm: None, teacher_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTeacher]:
    """One real vLLM server of the teacher for all slow tests."""
    servers = LocalServers(str(teacher_model), 1, log_dir=tmp_path_factory.mktemp("teacher"), name="teacher",
                           extra_args=["--dtype", "float32", "--max-model-len", "1024"])
    try:
        servers.start()
        servers.wait_ready()
        yield RunningTeacher(servers.urls[0], servers.api_key, str(teacher_model))
    finally:
        servers.close()
