"""Self-Improving Pretraining on Megatron-Core.

Documents become pairs, pairs become pools of candidates, a judge turns a pool into a preference,
the loss hook turns preferences into weights, and the weights write the next rollouts.
"""

__version__ = "0.1.0"
