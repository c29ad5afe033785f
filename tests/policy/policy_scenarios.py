"""What the worker processes do; each function returns plain values and tensors, or raises."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron_sip.config import ConfigError
from megatron_sip.policy import optimizer, runtime
from megatron_sip.policy.hf_folder import save_hf_folder
from megatron_sip.policy.hf_init import HfFolder
from megatron_sip.policy.weights import hf_views, load_hf_state, load_init
from policy_judged import LAYOUTS
from policy_tiny import PAIRS, SEQUENCE, VOCAB, Run, hf_weights, make_config, tokens

STEPS = 3
_meeting: list[str] = []


def meet_at(files: str) -> None:
    """Let the runtimes of a scenario find their ports through files that begin with ``files``, the same in all processes."""
    _meeting[:] = [files, "0"]
    next_port()


def next_port() -> None:
    """Let the next runtime of this scenario meet its peers on a port that no earlier one used.

    Rank 0 takes a free one only now: one that was chosen when the processes started could be somebody else's by this time.
    """
    path = Path("".join(_meeting))
    _meeting[1] = str(int(_meeting[1]) + 1)
    if os.environ["RANK"] == "0":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            path.with_suffix(".tmp").write_text(str(probe.getsockname()[1]))
        path.with_suffix(".tmp").rename(path)
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 named no port in {path}")
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = path.read_text()


def _train(output: Path, shape: str, reference: bool) -> dict[str, Any]:
    run = Run(make_config(shape), reference)
    steps = [run.step() for _ in range(STEPS)]
    return {"steps": steps, "weights": run.weights()}


for _shape in ("gqa", "tied"):
    globals()[f"train_{_shape}_plain"] = functools.partial(_train, shape=_shape, reference=False)
    globals()[f"train_{_shape}_one"] = functools.partial(_train, shape=_shape, reference=True)


def train_bf16(output: Path) -> dict[str, Any]:
    run = Run(make_config(dtype="bfloat16"), reference=True)
    steps = [run.step() for _ in range(STEPS)]
    main = {str(tensor.dtype) for name, tensor in run.adam().items() if name.endswith("param")}
    return {"steps": steps, "weights": run.weights(), "main": sorted(main), "model": str(next(run.policy.parameters()).dtype)}


# --------------------------------------------------------------------------- the reference


def reference_beside_policy(output: Path) -> None:
    """One pass with the reference is two separate passes; it gets no gradient and is part of nothing that is trained."""
    run = Run(make_config(), reference=True)
    policy, reference = run.policy, run.policy.reference
    names = {name for name, _ in policy.named_parameters()}
    assert not any("reference" in name for name in (*names, *policy.state_dict(), *policy.sharded_state_dict()))
    assert not set(map(id, reference.parameters())) & set(map(id, policy.parameters()))

    run.step()  # now they differ
    batch = tokens()
    call = (batch[:, :-1], torch.arange(SEQUENCE).expand(PAIRS, -1), None)
    both = policy[0](*call, labels=batch[:, 1:])
    policy.reference_active = False
    alone = policy[0](*call, labels=batch[:, 1:])
    with torch.no_grad():
        frozen = reference[0](*call, labels=batch[:, 1:])
    assert torch.equal(both, torch.cat([alone, frozen])) and not torch.equal(alone, frozen)

    gradients = [torch.autograd.grad(loss, list(policy.parameters())) for loss in (both.sum(), alone.sum())]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reference.parameters())

    before = [parameter.clone() for parameter in reference.parameters()]
    policy.sync_reference()
    assert policy.reference is reference
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), policy.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, reference.parameters()))


def reference_missing(output: Path) -> str:
    run = Run(make_config())
    run.policy.reference_active = True
    try:
        run.gradients()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("a pass without a reference must fail")


def reference_draws_no_random_numbers(output: Path) -> None:
    run = Run(make_config())
    before = torch.get_rng_state()
    run.policy.sync_reference()
    assert torch.equal(before, torch.get_rng_state())


def padding_gets_no_probability(output: Path) -> None:
    """The probabilities of the real vocabulary sum to 1, although the embedding has more rows."""
    run = Run(make_config())
    assert run.policy.vocab_size == 192
    with torch.no_grad():
        run.policy[0].output_layer.weight[VOCAB:] = 100.0  # would dominate
        call = (tokens()[:, :-1], torch.arange(SEQUENCE).expand(PAIRS, -1), None)
        total = torch.stack([torch.exp(-run.policy[0](*call, labels=torch.full_like(call[0], token))) for token in range(VOCAB)]).sum(0)
        logits = run.policy[0](*call)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5), total
    assert torch.equal(logits[..., VOCAB:], torch.full_like(logits[..., VOCAB:], torch.finfo(torch.float32).min))


# --------------------------------------------------------------------------- checkpoints


def _equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), f"{name}: {tensor.flatten()[:4]} became {after[name].flatten()[:4]}"


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _round_trip(output: Path, name: str, steps: int = 2, dtype: str = "float32", **parallel: Any) -> dict[str, Any]:
    """Train, save, load into a fresh run of the same layout, and go on: nothing may differ in a single bit."""
    config = make_config("tied" if "tied" in name else "gqa", dtype, **parallel)
    run = Run(config, reference=True)
    for _ in range(steps):
        run.step()
    folder = output / f"checkpoint_{name}"
    run.save(folder)
    saved, weights, lr = _copy(run.adam()), run.weights(), run.optimizer.param_groups[0]["lr"]
    following = [run.step(), run.step()]
    end = _copy(run.adam())
    runtime.stop()

    next_port()
    again = Run(config, reference=True)
    with torch.no_grad():
        for parameter in (*again.policy.parameters(), *again.policy.reference.parameters()):
            parameter.add_(1.0)
    again.load(folder)
    _equal(saved, again.adam())
    steps_found = [value.data_ptr() for key, value in again.adam().items() if key.endswith("step")]
    assert len(set(steps_found)) == len(steps_found), "parameters share one step tensor"
    assert again.optimizer.param_groups[0]["lr"] == lr and again.scheduler.num_steps == steps
    assert [again.step(), again.step()] == following
    _equal(end, again.adam())
    return {"weights": weights, "following": following}


round_trip_one = functools.partial(_round_trip, name="one")
round_trip_one_tied = functools.partial(_round_trip, name="one_tied")
round_trip_one_bf16 = functools.partial(_round_trip, name="one_bf16", dtype="bfloat16")
round_trip_one_distributed = functools.partial(_round_trip, name="one_distributed", **LAYOUTS["dp2_distributed"])
round_trip_before_first_step = functools.partial(_round_trip, name="before_first_step", steps=0)
round_trip_before_first_step_distributed = functools.partial(_round_trip, name="before_first_step_distributed", steps=0, **LAYOUTS["dp2_distributed"])
round_trip_before_first_step_bf16 = functools.partial(_round_trip, name="before_first_step_bf16", steps=0, dtype="bfloat16")
round_trip_tp2 = functools.partial(_round_trip, name="tp2", **LAYOUTS["tp2"])
round_trip_pp2_tied = functools.partial(_round_trip, name="pp2_tied", **LAYOUTS["pp2"])
round_trip_pp2_vpp2_tied = functools.partial(_round_trip, name="pp2_vpp2_tied", **LAYOUTS["pp2_vpp2"])
round_trip_cp2_overlap = functools.partial(_round_trip, name="cp2_overlap", **LAYOUTS["cp2_overlap_recompute"])
round_trip_cp2_overlap_tied = functools.partial(_round_trip, name="cp2_overlap_tied", **LAYOUTS["cp2_overlap_recompute"])
round_trip_pp2_tied_distributed = functools.partial(_round_trip, name="pp2_tied_distributed", **LAYOUTS["pp2"], **LAYOUTS["dp2_distributed"])
round_trip_dp2_distributed = functools.partial(_round_trip, name="dp2_distributed", **LAYOUTS["dp2_distributed"])
round_trip_dp2_distributed_bf16 = functools.partial(_round_trip, name="dp2_distributed_bf16", dtype="bfloat16", **LAYOUTS["dp2_distributed"])


def _reload(output: Path, saved: str, **parallel: Any) -> dict[str, Any]:
    """Load a checkpoint of another layout and take the next two steps."""
    run = Run(make_config("tied" if "tied" in saved else "gqa", **parallel), reference=True)
    run.load(output / f"checkpoint_{saved}")
    return {"weights": run.weights(), "following": [run.step(), run.step()]}


reload_tp2_as_one = functools.partial(_reload, saved="tp2")
reload_tp2_as_pp2 = functools.partial(_reload, saved="tp2", **LAYOUTS["pp2"])
reload_tp2_as_pp2_vpp2 = functools.partial(_reload, saved="tp2", **LAYOUTS["pp2_vpp2"])
reload_pp2_vpp2_tied_as_one = functools.partial(_reload, saved="pp2_vpp2_tied")
reload_pp2_vpp2_tied_as_tp2 = functools.partial(_reload, saved="pp2_vpp2_tied", **LAYOUTS["tp2"])
reload_cp2_overlap_as_one = functools.partial(_reload, saved="cp2_overlap", **LAYOUTS["dp2_distributed"])
reload_pp2_tied_as_one = functools.partial(_reload, saved="pp2_tied")
reload_pp2_tied_as_tp2 = functools.partial(_reload, saved="pp2_tied", **LAYOUTS["tp2"])
reload_dp2_distributed_as_one = functools.partial(_reload, saved="dp2_distributed", **LAYOUTS["dp2_distributed"])
reload_dp2_distributed_as_tp2 = functools.partial(_reload, saved="dp2_distributed", **LAYOUTS["tp2"], **LAYOUTS["dp2_distributed"])


def without_kept_padding(output: Path) -> str:
    """A round trip of several buckets loses Adam's state."""
    repair, optimizer._padding_kept = optimizer._padding_kept, lambda whole: contextlib.nullcontext()
    try:
        _round_trip(output, "cp2_overlap_without_padding", **LAYOUTS["cp2_overlap_recompute"])
    except AssertionError as error:
        return str(error)
    finally:
        optimizer._padding_kept = repair
    raise AssertionError("Megatron saves several buckets without the repair; remove it")


def load_keeps_configured_rates(output: Path) -> None:
    """Learning rate and weight decay come from the configuration, the step from the checkpoint."""
    config = make_config()
    config.optimizer.lr, config.optimizer.min_lr, config.optimizer.weight_decay = 3e-4, 1e-5, 0.5
    run = Run(config, reference=True)
    run.load(output / "checkpoint_one")
    group = next(g for g in run.optimizer.param_groups if g["wd_mult"] == 1.0)
    assert group["max_lr"] == 3e-4 and group["min_lr"] == 1e-5 and group["weight_decay"] == 0.5
    assert 1e-5 < group["lr"] < 3e-4 and run.scheduler.num_steps == 2


def without_keep_step_on_load(output: Path) -> str:
    repair, optimizer._keep_step_on_load = optimizer._keep_step_on_load, lambda part: None
    try:
        run = Run(make_config(**LAYOUTS["dp2_distributed"]), reference=True)
        run.load(output / "checkpoint_one_distributed")
    except KeyError as error:
        return str(error)
    finally:
        optimizer._keep_step_on_load = repair
    raise AssertionError("Megatron loads torch's Adam without the repair; remove it")


def without_separate_steps(output: Path) -> float:
    """Two steps were saved; returns what two parameters and one more step make of it."""
    repair, optimizer._separate_steps = optimizer._separate_steps, lambda adam: None
    try:
        run = Run(make_config(**LAYOUTS["dp2_distributed"]), reference=True)
        run.load(output / "checkpoint_one_distributed")
    finally:
        optimizer._separate_steps = repair
    run.step()
    return max(value.item() for key, value in run.adam().items() if key.endswith("step"))


def without_allocated_state(output: Path) -> str:
    repair, optimizer._allocate_state = optimizer._allocate_state, lambda adam: None
    try:
        run = Run(make_config(**LAYOUTS["dp2_distributed"]))
        run.sharded(loading=False)
    except (AssertionError, IndexError, KeyError) as error:
        return type(error).__name__
    finally:
        optimizer._allocate_state = repair
    raise AssertionError("Megatron saves torch's Adam before the first step; remove the repair")


# --------------------------------------------------------------------------- patches


def _without(patch: str, scenario: Callable[[], None]) -> str:
    """Error of ``scenario`` in a copy of this process in which ``patch`` was never applied; empty if there was none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        runtime.CPU_PATCHES = tuple(p for p in runtime.CPU_PATCHES if p.__name__ != patch)
        text = ""
        try:
            scenario()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text


def _train_and_save(output: Path, name: str, shape: str = "gqa", **parallel: Any) -> None:
    run = Run(make_config(shape, **parallel), reference=True)
    run.step()
    run.save(output / f"checkpoint_patches_{run.runtime.world_size}_{name}")


def patches_one(output: Path) -> dict[str, str]:
    """Must run first in its process: the parent never applies a patch."""
    names = ("none", "patch_current_device", "patch_factories", "patch_tensor_type", "patch_synchronize", "patch_current_stream", "patch_rng_state")
    return {name: _without(name, lambda: _train_and_save(output, name, **LAYOUTS["one_recompute"])) for name in names}


def patches_two(output: Path) -> dict[str, str]:
    found = {}
    for name in ("none", "patch_tensor_cuda"):
        next_port()
        found[name] = _without(name, lambda: _train_and_save(output, name, "tied", **LAYOUTS["pp2"]))
    return found


# --------------------------------------------------------------------------- Hugging Face


def _hugging_face(output: Path, shape: str) -> None:
    """Bitwise there and back; transformers computes the same logits from the folder and from the views."""
    from transformers import AutoModelForCausalLM

    run = Run(make_config(shape))
    given = hf_weights(run.config)
    views = hf_views(run.policy, run.config, VOCAB)
    assert set(views) == set(given)
    _equal(given, {name: views[name] for name in given})
    _equal(given, run.weights())
    folder = output / f"hf_{shape}"
    save_hf_folder(folder, views, run.config, VOCAB)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.eos_token_id is None and model.config.vocab_size == VOCAB
    batch = tokens()[:, :-1]
    with torch.no_grad():
        ours = run.policy[0](batch, torch.arange(SEQUENCE).expand(PAIRS, -1), None)[..., :VOCAB]
        theirs = model(batch).logits
    difference = (ours - theirs).abs().max().item()
    assert difference <= 1e-5, f"logits differ by {difference}"

    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.zero_()
    load_init(run.policy, run.config, folder)
    _equal(given, run.weights())
    save_hf_folder(folder, views, run.config, VOCAB, dtype=torch.bfloat16)  # over the old one
    rounded = HfFolder(folder)
    assert rounded.config["dtype"] == "bfloat16"
    _equal({name: tensor.bfloat16() for name, tensor in given.items()}, {name: rounded[name] for name in rounded})
    assert [path.name for path in output.iterdir() if path.name.startswith(f".hf_{shape}")] == []


hugging_face_gqa = functools.partial(_hugging_face, shape="gqa")
hugging_face_tied = functools.partial(_hugging_face, shape="tied")


def hugging_face_bf16(output: Path) -> float:
    """Largest difference of log-probabilities to transformers, both computing in bfloat16."""
    from transformers import AutoModelForCausalLM

    run = Run(make_config(dtype="bfloat16"))
    folder = output / "hf_bf16"
    save_hf_folder(folder, hf_views(run.policy, run.config, VOCAB), run.config, VOCAB)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = tokens()
    with torch.no_grad():
        ours = -run.policy[0](batch[:, :-1], torch.arange(SEQUENCE).expand(PAIRS, -1), None, labels=batch[:, 1:])
        theirs = model(batch[:, :-1]).logits.float().log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
    return (ours - theirs).abs().max().item()


def load_refuses_other_shapes(output: Path) -> str:
    """A state that does not fit changes nothing."""
    run = Run(make_config())
    state = hf_weights(run.config)
    name = "model.layers.1.mlp.down_proj.weight"
    state = {key: tensor + 1 for key, tensor in state.items()}
    state[name] = state[name][:, :-1]
    del state["model.norm.weight"]
    try:
        load_hf_state(run.policy, run.config, state)
    except ConfigError as error:
        _equal(hf_weights(run.config), run.weights())
        return str(error)
    raise AssertionError("accepted")
