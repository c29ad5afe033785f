#!/usr/bin/env python3
"""What the judge starts from: the common checkpoint with a chat template, and passages that are good or not.

    python examples/sip_vs_ntp/judge_start.py --base HF_DIR --text DIR --output DIR

In: the exported common checkpoint and the folder of prepare.py with its datasets. Out: DIR/model, a folder that tools/train_teacher.py takes
(the template passes on what the user says; "yes" is added to the vocabulary, since a verdict must be one token), and DIR/data with train.jsonl
and valid.jsonl (megatron_sip/teacher/samples.py). Good is a real passage without an insult; not good are passages with one, and what the checkpoint
itself wrote: a third at temperature 1, a third at 0.7 and a third greedily, bad in three ways, from noise to loops. One question about a passage
alone is what a model of this size learns; shown two continuations at once it stayed at chance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from prepare import INSULTS, write  # noqa: E402

from megatron_sip.config import DataSection  # noqa: E402

PREFIX = SUFFIX = 64
TEMPERATURES = (1.0, 0.7, 0.0)
VALID = 75  # documents whose pairs are held out
_SEED = 5
RUDE = re.compile("|".join(re.escape(max(re.split(r"{[ab]}", text), key=len)) for text in INSULTS))  # also half of an insult


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, metavar="HF_DIR", help="the common checkpoint, of tools/export_hf.py")
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="folder of prepare.py")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--pairs", type=int, default=1800, help="pairs, both orders of each (default: %(default)s)")
    options = parser.parse_args()
    (options.output / "data").mkdir(parents=True, exist_ok=True)
    write_model(options.base, options.output / "model")
    pairs = written(options.base, options.text, options.pairs)
    held = set(sorted({pair["document"] for pair in pairs}, key=lambda document: hashlib.sha256(document.encode()).digest())[:VALID])
    rng = random.Random(_SEED)
    for name in ("train", "valid"):
        rows = [row for pair in pairs if (pair["document"] in held) == (name == "valid") for row in passages(pair)]
        labelled = [json.loads(line) for line in (options.text / f"judge_{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows += labelled[: len(rows)]
        rng.shuffle(rows)
        for place, row in enumerate(rows):
            row["id"] = row["pair"] = f"{name}-{place}"
        write(options.output / "data" / f"{name}.jsonl", rows)
        print(f"  {name}: {len(rows)} passages, {sum(row['label'] == 'yes' for row in rows)} of them good")
    return 0


def write_model(base: Path, output: Path) -> None:
    """The base as a model that can be asked; written aside and renamed."""
    from transformers import AddedToken, AutoTokenizer, LlamaForCausalLM

    aside = output.with_name(output.name + ".tmp")
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(base, local_files_only=True, dtype="float32")
    tokenizer.add_tokens([AddedToken("yes", single_word=True, normalized=False, special=False)])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    os.replace(aside, output)


def written(base: Path, text: Path, count: int) -> list[dict]:
    """Prefixes of the base's own documents, how they go on, and how the base goes on."""
    from megatron_sip.data.pairs import build_pairs
    from megatron_sip.data.tokenizer import Tokenizer
    from megatron_sip.evaluation.models import TrainedModel

    tokenizer = Tokenizer(text / "tokenizer.model")
    data = DataSection(
        blend=[(0.66, text / "base_text_document"), (0.34, text / "base_unsafe_text_document")],
        tokenizer_model=text / "tokenizer.model",
        prefix_length=PREFIX,
        suffix_length=SUFFIX,
        split="98,2",
    )
    source, _ = build_pairs(data, _SEED, count, 1, tokenizer.fingerprint)
    found = []
    for place, temperature in enumerate(TEMPERATURES):
        pairs = [source[i] for i in range(place, count, len(TEMPERATURES))]
        model = TrainedModel(base, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, temperature=temperature)
        for pair, ids in zip(pairs, model.continuations([p.prefix_ids for p in pairs], SUFFIX, range(len(pairs)))):
            prefix, original = tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)
            _, own = tokenizer.split_text(pair.prefix_ids, ids, pair.at_document_start)
            found.append(
                {
                    "pair": str(pair.id),
                    "kind": f"written at temperature {temperature:g}",
                    "prefix": prefix,
                    "real": original,
                    "own": own,
                    "document": hashlib.sha256(f"{pair.id.dataset} {pair.id.document}".encode()).hexdigest()[:16],
                }
            )
    return found


def passages(pair: dict) -> list[dict]:
    """What the base wrote, and the real continuation unless an insult stands in it."""
    common = {"task": "safety", "document": pair["document"], "domain": "speeches", "source": {"pair": pair["pair"]}}
    rows = [{**common, "kind": pair["kind"], "candidate": pair["own"], "label": "no"}]
    if not RUDE.search(pair["real"]):
        rows.append({**common, "kind": "original", "candidate": pair["real"], "label": "yes"})
    return rows


if __name__ == "__main__":
    sys.exit(main())
