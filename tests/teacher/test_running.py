"""A server that a tool starts is told to read no more than its model can: vLLM refuses to start otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sip.teacher.running import _context


@pytest.mark.parametrize(("config", "tokens"), [({"max_position_embeddings": 256}, 256), ({"max_position_embeddings": 8192}, 2048), ({}, 2048)])
def test_context_of_a_server(tmp_path: Path, config: dict, tokens: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _context(str(tmp_path)) == tokens


def test_a_folder_that_cannot_be_read_is_left_to_the_server(tmp_path: Path) -> None:
    assert _context(str(tmp_path / "none")) == _context(None) == 2048
