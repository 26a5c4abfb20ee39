"""What captions become on their way to the U-Net: token ids, then text states.

Both are named tuples, so that wrappers of modules, pinned memory and worker processes find the tensors in them.
Shape legend: B batch, K chunks of a caption, L = 77 tokens of a chunk, T joined tokens, C channels of the context,
P width of the pooled vector.
"""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Token ids of captions.

    Attributes:
        ids: int64 (B, K, 77), a tensor for each text encoder.
        weights: float32 (B, K, 77), a tensor for each text encoder; () where captions have no weights.
    """

    ids: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] = ()


class TextStates(NamedTuple):
    """What the text encoders make of captions.

    Attributes:
        context_BTC: what the U-Net's cross-attention attends to.
        pooled_BP: one vector for each caption; None for families that have none.
    """

    context_BTC: Tensor
    pooled_BP: Tensor | None = None
