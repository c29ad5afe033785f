"""A teacher for a tool: a running server's, or one of our own for as long as it is needed.

In: a ``teacher`` section, and where its model is served, if anywhere. Out: a client that is ready.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_sip.config import TeacherSection
from megatron_sip.servers import LocalServers
from megatron_sip.teacher.client import Teacher

_CONTEXT = 2048  # tokens of a question and its answer, where the model can read as many


@contextlib.contextmanager
def running_teacher(section: TeacherSection, *, url: str | None, seed: int) -> Iterator[Teacher]:
    """The client, ready, its metrics at zero.

    Args:
        section: ``model`` is the model's folder, or the name under which ``url`` serves it.
        url: of a running server (its key in $SIP_TEACHER_API_KEY); None starts a vLLM server here.

    Raises:
        ServerError: our own server does not come up.
        TeacherError: the server does not answer as the judge needs it.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        urls, key = [url], None
        if not url:
            flags = ["--dtype", "float32", "--max-model-len", str(_context(section.model))]
            servers = LocalServers(section.model, 1, log_dir=Path(scratch), name="teacher", extra_args=flags)
            stack.callback(servers.close)
            servers.start()
            servers.wait_ready()
            urls, key = servers.urls, servers.api_key
        teacher = Teacher(section, quorum=1.0, seed=seed, run_dir=Path(scratch), urls=urls, api_key=key)
        stack.callback(teacher.close)
        teacher.wait_ready()
        teacher.metrics()
        yield teacher


def _context(model: str | None) -> int:
    """Tokens that a server of ours reads at most: no more than the model claims to (vLLM refuses more)."""
    try:
        claimed = json.loads((Path(str(model)) / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):
        return _CONTEXT  # the server says what is wrong with the folder
    return min(_CONTEXT, int(claimed))
