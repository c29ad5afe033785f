"""A verdict task that a random model of some ten thousand parameters cannot do and can learn: which continuation stays with the subject?

Out: a Hugging Face folder (word tokenizer, chat template, random Llama), samples, templates.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SUBJECTS = {
    "sea": "wave salt ship tide gull",
    "wood": "moss fern deer bark owl",
    "town": "street tram shop bridge clerk",
    "sky": "cloud star wind moon dusk",
}
QUALITY = "${fence} before ${prefix} first ${candidate_a} second ${candidate_b} better\n"
SAFETY = "${fence} text ${candidate} safe\n"
_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|> ' + m['role'] + ' ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|> assistant ' }}{% endif %}"
)


def make_model(folder: Path, *, hidden: int = 32, layers: int = 2) -> Path:
    """A random Llama with grouped queries and tied embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    words = " ".join(SUBJECTS.values()).split()
    vocabulary = [
        "<unk>",
        "<|start|>",
        "<|end|>",
        "user",
        "assistant",
        "A",
        "B",
        "yes",
        "no",
        "before",
        "first",
        "second",
        "better",
        "text",
        "safe",
        "curse",
        *words,
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<|end|>", additional_special_tokens=["<|start|>"])
    tokenizer.chat_template = _TEMPLATE
    set_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            initializer_range=0.1,
            rms_norm_eps=1e-5,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_world(folder: Path, *, train: int = 2000, valid: int = 200) -> None:
    """``model/``, ``train.jsonl``, ``valid.jsonl``, ``quality.txt``, ``safety.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    (folder / "quality.txt").write_text(QUALITY)
    (folder / "safety.txt").write_text(SAFETY)
    for name, count in (("train", train), ("valid", valid)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples(count, name)))


def samples(count: int, name: str) -> list[dict]:
    """Three of four compare, one of four is about safety (a curse in it or not)."""
    rng, made = random.Random(name), []
    for i in range(count):
        common = {"id": f"{name}-{i}", "kind": "off topic", "document": name, "domain": "made up"}
        subject, other = rng.sample(sorted(SUBJECTS), 2)
        prefix, real, spoilt = ([rng.choice(SUBJECTS[s].split()) for _ in range(3)] for s in (subject, subject, other))
        if i % 4 == 3:
            unsafe = rng.random() < 0.5
            text = rng.sample([*real, "curse"] if unsafe else [*real, prefix[0]], 4)
            made.append(
                {
                    **common,
                    "task": "safety",
                    "kind": "cursed" if unsafe else "original",
                    "candidate": " ".join(text),
                    "label": "no" if unsafe else "yes",
                }
            )
            continue
        label = rng.choice("AB")
        a, b = (real, spoilt) if label == "A" else (spoilt, real)
        made.append({**common, "task": "quality", "prefix": " ".join(prefix), "candidate_a": " ".join(a), "candidate_b": " ".join(b), "label": label})
    return made


def settings(folder: Path, run: Path) -> dict:
    """A configuration as a tree."""
    return {
        "run": {"dir": str(run)},
        "data": {"tokenizer_model": str(folder / "model")},
        "model": {"init_from": str(folder / "model"), "params_dtype": "float32", "max_position_embeddings": 64},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 0, "weight_decay": 0.0, "adam_beta2": 0.99},
        "train": {"train_iters": 300, "global_batch_size": 32, "micro_batch_size": 32, "eval_interval": 20, "eval_pairs": 200},
        "pool": {"original": False, "rewrite": False, "rollouts": 8},
        "rollout": {"batch_size": 256},
        "objective": {"reference": "none"},
        "grpo": {
            "task": "judge",
            "data": [str(folder / "train.jsonl")],
            "validation": [str(folder / "valid.jsonl")],
            "prompt_length": 48,
            "answer_length": 1,
            "reasoning": False,
            "quality_template": str(folder / "quality.txt"),
            "safety_template": str(folder / "safety.txt"),
        },
        "checkpoint": {"interval": 0},
        "log": {"wandb": "disabled", "interval": 10},
    }


def learning(folder: Path, run: Path) -> dict:
    """The configuration with which the model learns the task. The KL term keeps it from saying the same verdict every time before it has seen why."""
    tree = settings(folder, run)
    tree["optimizer"] |= {"lr": 1e-3, "min_lr": 1e-4}
    tree["train"] |= {"train_iters": 140, "global_batch_size": 64, "micro_batch_size": 64}
    tree["pool"]["rollouts"], tree["rollout"]["batch_size"] = 16, 1024
    tree["objective"]["reference"], tree["grpo"]["kl_weight"] = "frozen", 0.05
    return tree
