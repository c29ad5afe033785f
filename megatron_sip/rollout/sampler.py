"""Rollouts inside the trainer's own process.

In: prefixes, one seed each, and the policy's weights as tensors under Hugging Face names.
Out: K :class:`Rollout` a prefix.

Randomness: rollout k of a prefix with seed s uses one uniform number a token from a stream keyed by (s, k), and turns
it into a token by inverting the cumulative distribution. So it does not matter which other prefixes are in the
batch, how large the batch is, how many rollouts are asked for or how long they may be. What remains is rounding: a matrix
product of another size may round differently, which moves a token only when its uniform number falls within about
1e-6 of a boundary (float32; more often in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sip.rollout.engine import Rollout, RolloutError, check_request
from megatron_sip.rollout.llama import LlamaDecoder

_BLOCK = 128  # probabilities that are summed first; the cumulative sum then runs over blocks, and inside one of them
_CHECK_EVERY = 16  # steps between looks at which rows have ended: the only transfer to the host while decoding
_BELOW_ONE = 1.0 - 1e-12


class InProcessEngine:
    """Samples with a copy-free view of the policy (``RolloutEngine``).

    Args:
        config: Hugging Face configuration of the policy as a dict.
        weights: called by ``sync``; gives Hugging Face names -> tensors, which are read in place.
        eod_id: token that ends a rollout; ``None``: nothing does.
        temperature: 0 takes the most probable token.
        top_p: nucleus threshold, applied after the temperature.
        batch_size: rollouts decoded together.
    """

    concurrent = False

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Callable[[], Mapping[str, Tensor]],
        *,
        eod_id: int | None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 256,
    ) -> None:
        if temperature < 0 or not 0 < top_p <= 1 or batch_size < 1:
            raise ValueError(f"temperature={temperature} must be >= 0, top_p={top_p} in (0, 1], batch_size={batch_size} >= 1")
        self._config, self._weights = config, weights
        self._eod_id, self._temperature, self._top_p, self._batch_size = eod_id, temperature, top_p, batch_size
        self._decoder: LlamaDecoder | None = None
        self._version = -1

    def start(self) -> None:
        """Nothing to start."""

    def wait_ready(self) -> None:
        """Nothing to wait for."""

    def sync(self, version: int) -> None:
        """Read the policy's tensors anew; rollouts carry ``version`` from now on."""
        self._decoder = LlamaDecoder(self._config, self._weights())
        self._version = version

    def generate(
        self, prefixes: Sequence[Sequence[int]], num_rollouts: int, *, seeds: Sequence[int], max_tokens: int,
        allowed: Sequence[Sequence[int]] | None = None
    ) -> list[list[Rollout]]:
        """See :meth:`RolloutEngine.generate`.

        Args:
            allowed: of each prefix the only tokens that its rollouts may have, the same number for every prefix; ``logprobs`` stay those of the
                whole vocabulary.
        """
        decoder = self._decoder
        if decoder is None:
            raise RolloutError("no weights yet: call sync before generate")
        check_request(prefixes, num_rollouts, seeds, max_tokens, decoder.shape.vocab_size, decoder.shape.max_positions)
        rows = min(num_rollouts, self._batch_size)
        together = max(1, self._batch_size // rows)
        rollouts: list[list[Rollout]] = [[] for _ in prefixes]
        with torch.inference_mode():
            for first in range(0, len(prefixes), together):
                chunk = range(first, min(first + together, len(prefixes)))
                for row in range(0, num_rollouts, rows):
                    numbers = range(row, min(row + rows, num_rollouts))
                    uniforms = None if self._temperature == 0 else _uniforms([seeds[i] for i in chunk], numbers, max_tokens)
                    only = None if allowed is None else torch.tensor([list(allowed[i]) for i in chunk], device=decoder.device)
                    written = self._decode(decoder, [prefixes[i] for i in chunk], len(numbers), uniforms, max_tokens, only)
                    for index, new in zip(chunk, written):
                        rollouts[index] += new
        return rollouts

    def close(self) -> None:
        """Drop the references to the policy's tensors."""
        self._decoder = None

    def _decode(
        self, decoder: LlamaDecoder, prefixes: Sequence[Sequence[int]], num_rows: int, uniforms: Tensor | None, max_tokens: int, allowed: Tensor | None
    ) -> list[list[Rollout]]:
        device, count = decoder.device, len(prefixes)
        lengths = torch.tensor([len(p) for p in prefixes])
        ids = torch.zeros(count, int(lengths.max()), dtype=torch.int64)
        for number, prefix in enumerate(prefixes):
            ids[number, : len(prefix)] = torch.tensor(prefix)
        hidden, cache = decoder.prefill(ids.to(device), lengths.to(device), num_rows, max_tokens)
        hidden = hidden[:, None].expand(count, num_rows, -1)
        picker = TokenPicker(decoder.output, self._temperature, self._top_p)
        uniforms = uniforms.to(device) if uniforms is not None else None

        tokens = torch.zeros(count, num_rows, max_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(count, num_rows, max_tokens, dtype=torch.float32, device=device)
        # Where the rows that are still decoded stand in the two tables above.
        where = torch.arange(count, device=device)[:, None], torch.arange(num_rows, device=device).expand(count, num_rows)
        alive = torch.ones(count, num_rows, dtype=torch.bool, device=device)
        for step in range(max_tokens):
            chosen, chosen_logprobs = picker(
                hidden.flatten(0, 1), None if uniforms is None else uniforms[where[0], where[1], step].flatten(),
                None if allowed is None else allowed[where[0].expand_as(where[1])].flatten(0, 1),
            )
            chosen = chosen.view_as(alive)
            tokens[where[0], where[1], step] = chosen
            logprobs[where[0], where[1], step] = chosen_logprobs.view_as(alive)
            if step + 1 == max_tokens:
                break
            if self._eod_id is not None:
                alive = alive & (chosen != self._eod_id)
                if (step + 1) % _CHECK_EVERY == 0:
                    kept = _worth_keeping(alive)
                    if kept is not None:
                        keep_prefixes, keep_rows = kept
                        if len(keep_prefixes) == 0:
                            break
                        cache = cache.select(keep_prefixes, keep_rows, step + 1)
                        pick = keep_prefixes[:, None], keep_rows
                        chosen, alive, where = chosen[pick], alive[pick], (where[0][keep_prefixes], where[1][pick])
            hidden = decoder.step(chosen, cache, step)
        if not bool(logprobs.isfinite().all()):
            raise RolloutError(
                f"log-probabilities of rollouts are not finite: the policy's weights of version {self._version} have diverged"
            )
        return self._read(tokens.tolist(), logprobs.tolist())

    def _read(self, tokens: list[list[list[int]]], logprobs: list[list[list[float]]]) -> list[list[Rollout]]:
        def rollout(ids: list[int], values: list[float]) -> Rollout:
            end = ids.index(self._eod_id) + 1 if self._eod_id in ids else len(ids)
            return Rollout(tuple(ids[:end]), tuple(values[:end]), self._version)

        return [[rollout(i, v) for i, v in zip(*rows)] for rows in zip(tokens, logprobs)]


class TokenPicker:
    """Hidden states -> next tokens and their log-probabilities, for a whole batch at once.

    Args:
        output: [V, hidden], the output layer.
    """

    def __init__(self, output: Tensor, temperature: float, top_p: float) -> None:
        self._output, self._temperature, self._top_p = output, temperature, top_p
        self._buffer: Tensor | None = (
            None  # [rows, V rounded up to blocks] float32; a fresh one a step would cost more than the softmax
        )

    def __call__(self, hidden: Tensor, uniforms: Tensor | None, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[R, hidden], [R] float64 in [0, 1) and, where not every token may come, the ones that may, [R, C] int64 -> tokens [R] int64, natural
        log-probabilities at temperature 1 in the whole vocabulary [R] float32."""
        logits = self._logits(hidden)
        vocab = self._output.shape[0]
        if allowed is not None:
            return self._among(logits[:, :vocab], uniforms, allowed)
        peak, best = logits[:, :vocab].max(-1, keepdim=True)
        logits[:, :vocab].sub_(peak)
        if self._temperature == 0 or uniforms is None:
            return best.squeeze(1), -_mass(logits[:, :vocab].exp_()).log().float()
        if self._temperature == 1:
            weights = logits[:, :vocab].exp_()
            mass, divisor = _mass(weights), 1.0
        else:
            mass, divisor = _mass(logits[:, :vocab].exp()), self._temperature
            weights = logits[:, :vocab].div_(divisor).exp_()
        blocks = logits
        if self._top_p < 1:
            _keep_nucleus(weights, self._top_p)
        tokens = _invert(blocks, uniforms)
        # exp, then log: the difference from the logit itself is one float32 rounding
        shifted = weights.gather(1, tokens[:, None]).squeeze(1).double().log() * divisor
        return tokens, (shifted - mass.log()).float()

    def _among(self, logits: Tensor, uniforms: Tensor | None, allowed: Tensor) -> tuple[Tensor, Tensor]:
        few = logits.gather(1, allowed).double()
        if self._temperature == 0 or uniforms is None:
            place = few.argmax(-1, keepdim=True)
        else:
            weights = (few / self._temperature).softmax(-1)
            if self._top_p < 1:
                _keep_nucleus(weights, self._top_p)
            ends = weights.cumsum(-1)
            place = (ends <= (uniforms * _BELOW_ONE)[:, None] * ends[:, -1:]).sum(-1, keepdim=True)
        return allowed.gather(1, place).squeeze(1), (few.gather(1, place).squeeze(1) - logits.logsumexp(-1).double()).float()

    def _logits(self, hidden: Tensor) -> Tensor:
        rows, vocab = hidden.shape[0], self._output.shape[0]
        if self._buffer is None or self._buffer.shape[0] < rows:
            self._buffer = hidden.new_zeros(rows, -(-vocab // _BLOCK) * _BLOCK, dtype=torch.float32)
        logits = self._buffer[:rows]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, self._output.t(), out=logits[:, :vocab])
        else:
            logits[:, :vocab] = hidden @ self._output.t()
        return logits


def _mass(weights: Tensor) -> Tensor:
    return weights.sum(-1, dtype=torch.float32).double()


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative sum of each row of ``weights`` [R, n * _BLOCK] passes uniform * total, [R] int64."""
    blocks = weights.view(weights.shape[0], -1, _BLOCK)
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    target = (uniforms * _BELOW_ONE)[:, None] * ends[:, -1:]
    block = (ends <= target).sum(-1, keepdim=True)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    size = sums.gather(1, block)
    share = ((target - (ends.gather(1, block) - size)) / size).clamp_(
        0.0, _BELOW_ONE
    )  # of the block; float32 and float64 sums differ
    return block.squeeze(1) * _BLOCK + (inner <= share * inner[:, -1:]).sum(-1)


def _keep_nucleus(weights: Tensor, top_p: float) -> None:
    """Zero, in place, what is outside the smallest set of most probable tokens whose share reaches ``top_p``."""
    values, order = weights.sort(dim=-1, descending=True, stable=True)
    before = values.double().cumsum(-1) - values
    values[before >= top_p * values.sum(-1, keepdim=True)] = 0.0
    weights.scatter_(1, order, values)


def _uniforms(seeds: Sequence[int], numbers: range, max_tokens: int) -> Tensor:
    """[seeds, numbers, max_tokens] float64 in [0, 1); entry (s, k) depends on seed s and number k alone."""
    draws = [[np.random.default_rng((seed, number)).random(max_tokens) for number in numbers] for seed in seeds]
    return torch.from_numpy(np.array(draws))


def _worth_keeping(alive: Tensor) -> tuple[Tensor, Tensor] | None:
    """Prefixes [P'] and of each the rows [P', K'] that must go on; None if decoding the ended ones along is cheaper."""
    counts = alive.sum(-1)
    prefixes = counts.nonzero().squeeze(1)
    rows = int(counts.max())
    if len(prefixes) * rows > 0.75 * alive.numel():
        return None
    order = (~alive).to(torch.int8).argsort(dim=-1, stable=True)
    return prefixes, order[prefixes, :rows]
