"""What the batch scripts ask Python: is the configuration sound, is a node fit to run it, does a server generate?

    preflight.py config --world-size N --files FILE CONFIG [section.key=value ...]    on the node of the batch script
    preflight.py blend FILE                                                          PREFIX_blend.yaml as overrides, one a line
    preflight.py node PLAN                                                           on every node, by srun; see NodePlan
    preflight.py generates URL MODEL                                                 key in $SIP_TEACHER_API_KEY

Problems go to stderr as one line each, with the remedy; exit code 2. ``config`` prints facts as NAME=VALUE and writes the files that
every node must see.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_SETTLES = 15.0  # seconds that a shared file system may take to show a new file
_NEEDED = {"trainer": ("torch", "megatron.core", "megatron_sip.config"), "judge": ("torch", "vllm", "httpx"), "rollout": ("torch", "vllm", "httpx")}
_EXTRA = {"trainer": "cpu (or gpu)", "judge": "serve-cpu (or serve-gpu)", "rollout": "serve-cpu (or serve-gpu)"}


class Unfit(Exception):
    """One line: what is wrong and what helps."""


@dataclass(frozen=True)
class NodePlan:
    """What a node must offer, as the batch script wrote it into the folder of the attempt.

    Attributes:
        token_file, token: a file that the batch script wrote; its content proves that the file system is shared.
        seen: folder into which every node writes its name, so that the batch script sees the other direction.
        files: what every node must see.
        role: of this node, ``trainer``, ``judge`` or ``rollout``.
        gpus: GPUs that it must have.
        ports: that must be free on it.
    """

    token_file: Path
    token: str
    seen: Path
    files: list[Path]
    role: str
    gpus: int
    ports: list[int]

    @classmethod
    def read(cls, path: Path, node: str) -> NodePlan:
        """``path`` has one line NAME VALUE of each, FILE lists files, ``node NAME ROLE GPUS PORT ...`` the nodes."""
        values: dict[str, str] = {}
        plan = _until(lambda: path.read_text(encoding="utf-8"),
                      f"{path} is not there: this node does not see the folder of the run, which must be on a file system that all nodes share")
        for line in plan.splitlines():
            key, _, value = line.partition(" ")
            if key != "node":
                values[key] = value
            elif value.split()[0] == node:
                values["node"] = value
        if "node" not in values:
            raise Unfit(f"{path} does not name this node, {node}")
        _, role, gpus, *ports = values["node"].split()
        files = [Path(line) for line in Path(values["files"]).read_text(encoding="utf-8").splitlines()]
        return cls(Path(values["token_file"]), values["token"], Path(values["seen"]), files, role, int(gpus), [int(port) for port in ports])


def check_node(plan: NodePlan, node: str) -> None:
    """Raises Unfit."""
    found = _until(lambda: plan.token_file.read_text(encoding="utf-8").strip(),
                   f"{plan.token_file} is not there: the folder of the run must be on a file system that all nodes share")
    if found != plan.token:
        raise Unfit(f"{plan.token_file} is another file than the one the batch script wrote: the folder of the run must be on a file system that all "
                    "nodes share, not on a local disk of the same name")
    for port in plan.ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise Unfit(f"port {port} cannot be used ({error.strerror}): another program listens there; set PORT_BASE to the first of 100 free "
                            "ports") from None
    for path in plan.files:
        if not path.exists():
            raise Unfit(f"{path} is not there; put it on a file system that all nodes share")
    for module in _NEEDED[plan.role]:
        try:
            # A server's libraries take long to load, and the server says itself what is wrong with them.
            if module == "vllm":
                if importlib.util.find_spec(module) is None:
                    raise ImportError("not found")
            else:
                importlib.import_module(module)
        except Exception as error:
            raise Unfit(f"{sys.executable} cannot import {module} ({type(error).__name__}: {error}); install with: bash examples/install.sh "
                        f"{_EXTRA[plan.role]}, into an environment that all nodes see, or set PYTHON") from None
    import torch

    visible = torch.cuda.device_count()
    if plan.gpus and visible != plan.gpus:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise Unfit(f"{visible} GPUs are usable (CUDA_VISIBLE_DEVICES={devices}), {plan.gpus} are expected; look at nvidia-smi there, "
                    "at --gres of the job and at the CUDA version of torch, or change GPUS_PER_NODE")
    temporary = plan.seen / f".{node}"
    temporary.write_text(f"{plan.token}\n", encoding="utf-8")
    temporary.rename(plan.seen / node)


def check_config(options: argparse.Namespace) -> None:
    """Raises ConfigError, Unfit."""
    try:
        from megatron_sip.config import check_layout, load_config
    except ImportError as error:
        raise Unfit(f"{sys.executable} cannot import megatron_sip.config ({error}); install with: bash examples/install.sh cpu,data (or "
                    "gpu,serve-gpu), or set PYTHON") from None
    config = load_config(options.config, options.overrides)
    check_layout(config, options.world_size)
    files = [Path(options.config), config.data.tokenizer_model]
    remedy = "tokenize with tools/preprocess_data.py, and set BLEND, TOKENIZER_MODEL (and INIT_FROM)"
    if config.grpo is not None:
        files, remedy = files + config.grpo.data + config.grpo.validation, "set INIT_FROM, and DATA to a folder of tools/build_teacher_data.py"
    elif not config.data.blend:
        raise Unfit("data.blend is empty; set BLEND to PREFIX_blend.yaml of tools/preprocess_data.py")
    files += [Path(f"{prefix}{end}") for _, prefix in config.data.blend for end in (".bin", ".idx")]
    files += [path for path in (config.model.init_from, config.debug.load_pools and Path(f"{config.debug.load_pools}.dp0")) if path]
    missing = [path for path in files if not path.exists()]
    if missing:
        raise Unfit(f"{', '.join(map(str, missing))} not there; {remedy}")
    if options.files:
        options.files.write_text("".join(f"{path.absolute()}\n" for path in files), encoding="utf-8")
    print(f"ASKS_TEACHER={int(config.asks_teacher)}\nLAST_STEP={config.train.train_iters}")


def show_blend(path: Path) -> None:
    """Raises Unfit."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        print(f"data.blend={json.dumps(data['blend'])}")
        if "tokenizer_model" in data:
            print(f"data.tokenizer_model={json.dumps(data['tokenizer_model'])}")
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Unfit(f"BLEND={path} is no PREFIX_blend.yaml of tools/preprocess_data.py ({type(error).__name__}: {error})") from None


def check_generates(url: str, model: str) -> None:
    """One token after a word. Raises Unfit."""
    import httpx

    try:
        key = os.environ.get("SIP_TEACHER_API_KEY", "")
        body = {"model": model, "prompt": "The", "max_tokens": 1}
        answer = httpx.post(f"{url}/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60.0, trust_env=False)
    except httpx.HTTPError as error:
        raise Unfit(f"{url} does not answer ({type(error).__name__})") from None
    if answer.status_code != 200:
        raise Unfit(f"{url} does not generate: HTTP {answer.status_code}: {answer.text[:200]}")


def _until(read, problem: str) -> str:
    """What ``read`` returns as soon as it works; Unfit after a while."""
    deadline = time.monotonic() + _SETTLES
    while True:
        try:
            return read()
        except OSError as error:
            if time.monotonic() > deadline:
                raise Unfit(f"{problem} ({error.strerror})") from None
            time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    config = commands.add_parser("config")
    config.add_argument("--world-size", type=int, required=True)
    config.add_argument("--files", type=Path)
    config.add_argument("config", type=Path)
    config.add_argument("overrides", nargs="*")
    commands.add_parser("blend").add_argument("file", type=Path)
    commands.add_parser("node").add_argument("plan", type=Path)
    generates = commands.add_parser("generates")
    generates.add_argument("url")
    generates.add_argument("model")
    options = parser.parse_args()
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    where = f"node {node}: " if options.command == "node" else ""
    try:
        if options.command == "config":
            check_config(options)
        elif options.command == "blend":
            show_blend(options.file)
        elif options.command == "node":
            check_node(NodePlan.read(options.plan, node), node)
        else:
            check_generates(options.url, options.model)
    except (Unfit, ValueError, OSError) as error:  # ConfigError is a ValueError; OSError: a file that this user may not read
        for line in str(error).splitlines():
            print(f"error: {where}{line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
