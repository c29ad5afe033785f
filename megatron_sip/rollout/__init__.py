"""Continuations written by the policy with its current weights.

In: prefixes as token ids, one seed each. Out: K :class:`Rollout` a prefix, with the log-probabilities of their tokens.

- ``engine``       what every engine promises
- ``llama``        a Llama decoder on a dict of tensors: prefix computed once, shared by its K rollouts
- ``sampler``      the in-process engine: that decoder plus sampling
- ``vllm_client``  token ids in and out of vLLM servers, and new weights into them, over HTTP
- ``vllm_engine``  the engine on such servers: starts them, spreads prefixes over them, hands weights over
"""

from megatron_sip.rollout.engine import Rollout, RolloutEngine, RolloutError

__all__ = ["Rollout", "RolloutEngine", "RolloutError"]
