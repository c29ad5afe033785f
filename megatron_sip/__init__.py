"""Self-Improving Pretraining on Megatron-Core.

Documents become pairs, pairs become pools of candidates, a judge turns a pool into a preference,
the loss hook turns preferences into weights, and the weights write the next rollouts.
"""

import warnings

# Said at every import of Megatron-Core where a GPU's optional libraries are missing; the README names them as optional.
warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed|full scope is deprecated")
# Said by torch of Megatron's checkpoints at every load.
warnings.filterwarnings("ignore", message=r"`load_state_dict` is deprecated|Please use DTensor instead", category=FutureWarning)

__version__ = "0.1.0"
