"""Local vLLM servers of the teacher, for a run and as a command.

    python -m megatron_sip.teacher.serve --model DIR --port 8000 [--host HOST] [more vLLM flags]

In: a post-trained model. Out: OpenAI-compatible servers on this machine. The command serves until it is stopped; its key is
``$SIP_TEACHER_API_KEY``. Without that variable, it listens on this machine alone and needs no key.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from pathlib import Path

from megatron_sip.config import TeacherSection
from megatron_sip.servers import LocalServers, ServerError, check_port, vllm_command, vllm_environment

KEY_VARIABLE = "SIP_TEACHER_API_KEY"


def local_teacher(config: TeacherSection, log_dir: Path, *, device: str) -> LocalServers:
    """The servers that ``config`` asks for, not started.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    flags = ["--dtype", config.dtype, "--max-model-len", str(config.max_model_len), "--tensor-parallel-size", str(config.tensor_parallel_size),
             "--enable-prompt-tokens-details"]  # how much of a prompt came from the prefix cache
    return LocalServers(config.model, config.num_servers, port=config.port, log_dir=log_dir, name="teacher",
                        extra_args=[*flags, *config.extra_args], ready_timeout=config.ready_timeout, device=device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder (or hub name) of the post-trained model; also the name under which it is served")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="another address than this machine's own needs a key")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu: eager mode, all cores (default: cuda where there is an NVIDIA driver)")
    arguments, more = parser.parse_known_args()
    try:
        command, environment = command_line(arguments.model, arguments.host, arguments.port, arguments.device or found_device(), os.environ.get(KEY_VARIABLE))
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    os.execve(command[0], command + more, environment)


def command_line(model: str, host: str, port: int, device: str, key: str | None) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a server.

    Raises:
        ServerError: others could reach it and it would need no key; the model's folder is missing; the port is in use.
    """
    if not is_loopback(host) and not key:
        raise ServerError(f"--host {host} can be reached from other machines, so a key is needed: set {KEY_VARIABLE}")
    if (model.startswith((".", "/")) or model.count("/") > 1) and not Path(model).is_dir():
        raise ServerError(f"model folder {model} does not exist; give --model the folder of a Hugging Face model")
    check_port(host, port, "teacher")
    return vllm_command(model, host, port, device), vllm_environment(model, device, key or None)


def found_device() -> str:
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
