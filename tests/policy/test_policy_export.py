"""Weights and tokenizer in Hugging Face's form, and the command line over them."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from megatron_sip.config import ConfigError, RunConfig, dump_config, load_config
from megatron_sip.policy.hf_init import HfFolder, check_init_folder
from megatron_sip.policy.hf_tokenizer import special_ids, write_tokenizer
from policy_spawn import Outcome
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 130


def test_hugging_face_round_trip_and_logits(one: Outcome) -> None:
    """Bitwise weights; logits within 1e-5 of transformers in fp32."""
    one.result("hugging_face_gqa")
    one.result("hugging_face_tied")


def test_bfloat16_logprobs_agree_with_transformers(one: Outcome) -> None:
    """Both round every layer to 8 bits of mantissa: measured 0.023 on log-probabilities of about -5."""
    assert one.result("hugging_face_bf16") < 0.08


def test_weights_that_do_not_fit_change_nothing(one: Outcome) -> None:
    message = one.result("load_refuses_other_shapes")
    assert "model.norm.weight is missing" in message
    assert "model.layers.1.mlp.down_proj.weight has shape [64, 95], the configuration says [64, 96]" in message


# --------------------------------------------------------------------------- tokenizer


def _train(path: Path, vocab_size: int, **settings: object) -> Path:
    corpus = path.with_suffix(".txt")
    corpus.write_text("\n".join(Path(file).read_text(errors="ignore") for file in sorted(glob.glob(os.path.dirname(os.__file__) + "/*.py"))[:12]))
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(path), vocab_size=vocab_size, minloglevel=2, **settings)
    return path.with_suffix(".model")


LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "llama": _train(folder / "llama", 600, **LLAMA),
        "nfkc": _train(folder / "nfkc", 600, model_type="bpe", byte_fallback=True),
        "no_fallback": _train(folder / "no_fallback", 600, model_type="bpe"),
        "symbols": _train(folder / "symbols", 600, model_type="bpe", user_defined_symbols=["<|x|>"]),
        "unigram": _train(folder / "unigram", 600, model_type="unigram"),
        "tiny": _train(folder / "tiny", VOCAB, model_type="bpe", character_coverage=0.98),
    }


def _texts() -> list[str]:
    draw = random.Random(0)
    alphabet = list("ab z.,\n\t é中🙂▁1  ") + ["</s>", "<s>", "<unk>", "<0x0A>"]
    texts = ["".join(draw.choice(alphabet) for _ in range(draw.randint(0, 40))) for _ in range(1500)]
    source = Path(random.__file__).read_text()
    return texts + [source[i:i + 800] for i in range(0, len(source), 800)]


@pytest.mark.parametrize("name", ["llama", "nfkc", "no_fallback"])
def test_auto_tokenizer_gives_sentencepiece_ids(tokenizers: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Also for spaces at either end, runs of spaces, bytes, and control tokens written out in a text, which stay text."""
    from transformers import AutoTokenizer

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizers[name]))
    write_tokenizer(tmp_path, tokenizers[name])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (processor.bos_id(), processor.eos_id(), processor.vocab_size())
    for text in _texts():
        expected = processor.encode(text)
        assert tokenizer(text).input_ids == expected, text
        if name != "no_fallback":  # an unknown character is decoded as " ⁇ " by one and as <unk> by the other
            assert tokenizer.decode(expected) == processor.decode(expected), text
    assert tokenizer.decode([processor.eos_id()], skip_special_tokens=True) == ""


def test_tokenizer_of_another_kind_or_size_is_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no BPE model"):
        write_tokenizer(tmp_path, tokenizers["unigram"])
    with pytest.raises(ConfigError, match="user-defined symbols"):
        write_tokenizer(tmp_path, tokenizers["symbols"])
    with pytest.raises(ConfigError, match="vocabulary of 600, the model one of 601"):
        special_ids(tokenizers["llama"], 601)
    (tmp_path / "broken.model").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        special_ids(tmp_path / "broken.model", 600)


# --------------------------------------------------------------------------- tools/export_hf.py


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", str(ROOT / "tools" / "export_hf.py"), *map(str, arguments)],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def checkpoint(two: Outcome, tokenizers: dict[str, Path]) -> Path:
    """A checkpoint of two tensor parallel ranks, dressed as the trainer dresses it."""
    from policy_tiny import make_config

    two.result("round_trip_tp2")
    folder = two.output / "checkpoint_tp2"
    config = make_config(tensor_model_parallel_size=2)
    config.data.tokenizer_model = tokenizers["tiny"]
    (folder / "run.yaml").write_text(dump_config(config))
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCAB, "step": 2}))
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    found = _tool(checkpoint, "--output", folder)
    assert found.returncode == 0, found.stderr
    return folder


def test_export_of_a_split_checkpoint_is_bitwise(two: Outcome, exported: Path) -> None:
    expected = two.result("round_trip_tp2")["weights"]
    found = load_file(exported / "model.safetensors")
    assert expected.keys() == found.keys() and all(tensor.equal(found[name]) for name, tensor in expected.items())
    assert {path.name for path in exported.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                                                          "tokenizer.model", "tokenizer_config.json"}


def test_transformers_generates_from_the_export(exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


def test_from_hf_prints_the_section_that_fits(exported: Path, tmp_path: Path) -> None:
    found = _tool("--from-hf", exported, "--output", tmp_path / "start")
    assert found.returncode == 0, found.stderr
    printed = yaml.safe_load(found.stdout)
    assert printed["model"]["num_query_groups"] == 2 and printed["model"]["init_from"] == str(tmp_path / "start")
    assert Path(printed["data"]["tokenizer_model"]).read_bytes() == (exported / "tokenizer.model").read_bytes()
    assert (tmp_path / "start" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    settings = tmp_path / "run.yaml"
    settings.write_text(yaml.safe_dump({**printed, "pool": {"rewrite": False, "rollouts": 0}, "objective": {"dpo_weight": 0},
                                        "data": {**printed["data"], "prefix_length": 8, "suffix_length": 8}}))
    check_init_folder(HfFolder(tmp_path / "start"), load_config(settings), VOCAB)


def _refused(output: Path, *arguments: object, keeps: bool = False) -> str:
    """The tool's one error, given before any process group or patch: called in this process."""
    spec = importlib.util.spec_from_file_location("export_hf", ROOT / "tools" / "export_hf.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["export_hf.py", *map(str, arguments), "--output", str(output)])
        assert tool.main() == 1
    return _one_error(errors.getvalue(), output, keeps)


def _one_error(stderr: str, output: Path, keeps: bool = False) -> str:
    assert stderr.startswith("error: ") and "Traceback" not in stderr, stderr
    assert output.exists() == keeps and not list(output.parent.glob(f".{output.name}*"))
    return stderr


def test_export_names_what_is_wrong(checkpoint: Path, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "does not exist" in _refused(output, tmp_path / "missing")
    assert "give an iter_… folder" in _refused(output, tmp_path)
    (tmp_path / "run" / "checkpoints" / "iter_0000007").mkdir(parents=True)
    assert "not a checkpoint" in (message := _refused(output, tmp_path / "run")) and "iter_0000007" in message
    assert "vocabulary of 600, the model one of 130" in _refused(output, checkpoint, "--tokenizer-model", tokenizers["llama"])
    assert "exists; choose another --output" in _refused(tmp_path, checkpoint, keeps=True)


def test_export_of_a_damaged_checkpoint_is_one_error(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "iter_0000002"
    shutil.copytree(checkpoint, damaged)
    for file in damaged.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    found = _tool(damaged, "--output", tmp_path / "out")
    assert found.returncode == 1
    assert "cannot be loaded" in _one_error(found.stderr, tmp_path / "out")


@pytest.mark.skipif(not metadata.version("megatron-core").startswith("0.16"), reason="newer ones read both")
def test_export_of_a_newer_megatrons_checkpoint_says_so(checkpoint: Path, tmp_path: Path) -> None:
    newer = tmp_path / "iter_0000002"
    shutil.copytree(checkpoint, newer)
    (newer / "common.pt").unlink()
    with open(newer / ".metadata", "ab") as file:
        file.write(b"common_state")  # the key under which newer ones keep what was in common.pt
    found = _tool(newer, "--output", tmp_path / "out")
    assert found.returncode == 1
    assert "was written by a newer Megatron-Core" in _one_error(found.stderr, tmp_path / "out")


def test_from_hf_refuses_what_the_policy_cannot_be(exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    description = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(description | {"attention_bias": True, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}))
    message = _refused(tmp_path / "out", "--from-hf", other)
    assert "it has biases" in message and "'llama3'" in message
    (other / "config.json").write_text(json.dumps(description | {"intermediate_size": 97}))
    assert "mlp.gate_proj.weight has shape [96, 64], the configuration says [97, 64]" in _refused(tmp_path / "out", "--from-hf", other)
    (other / "model.safetensors").unlink()
    assert "no *.safetensors" in _refused(tmp_path / "out", "--from-hf", other)


def _fitting(**model: object) -> RunConfig:
    settings = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
                "max_position_embeddings": 64, **model}
    return RunConfig.model_validate({"model": settings, "data": {"prefix_length": 8, "suffix_length": 8},
                                     "pool": {"rewrite": False, "rollouts": 0}, "objective": {"dpo_weight": 0}})


def test_init_folder_names_each_differing_setting(exported: Path) -> None:
    folder = HfFolder(exported)
    check_init_folder(folder, _fitting(), VOCAB)
    check_init_folder(folder, _fitting(max_position_embeddings=32), VOCAB)  # shorter than trained for is fine
    with pytest.raises(ConfigError) as error:
        check_init_folder(folder, _fitting(num_layers=3, untie_embeddings_and_output_weights=False), VOCAB)
    assert "model.num_layers is 3, the weights have 2" in str(error.value)
    assert "use: model.num_layers=2 model.untie_embeddings_and_output_weights=true" in str(error.value)
    with pytest.raises(ConfigError, match="vocabulary of 130, the tokenizer one of 600"):
        check_init_folder(folder, _fitting(), 600)


def test_sharded_folder_is_read(exported: Path, tmp_path: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    folder = HfFolder(tmp_path)
    assert set(folder) == set(names) and all(torch.equal(folder[name], tensors[name]) for name in names)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match="not a whole Hugging Face folder"):
        HfFolder(tmp_path)
