"""How many samples a pass takes of regularisation images: as many as of the images that they stand beside.

S: sources of the index. K: buckets of the run.
"""

from collections.abc import Sequence

import numpy as np


def balanced(samples_SK: np.ndarray, is_reg_S: np.ndarray, dataset_S: np.ndarray) -> np.ndarray:
    """The samples of a pass with those of regularisation images repeated or cut to the number of the others.

    Each data set is balanced by itself. Shares are rounded cell by cell of the running total, so that the sum is exact
    and every source and bucket gets its share to one sample; the reference takes the first images and leaves the
    last ones out. Below 4 billion samples a data set nothing overflows.
    """
    if not is_reg_S.any():
        return samples_SK
    result_SK = samples_SK.astype(np.int64)
    for dataset in np.unique(dataset_S[is_reg_S]):
        reg_S = (dataset_S == dataset) & is_reg_S
        wanted = int(samples_SK[(dataset_S == dataset) & ~is_reg_S].sum(dtype=np.int64))
        given = samples_SK[reg_S].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(given)])
        total = int(ends[-1])
        whole, rest = divmod(wanted, total)
        result_SK[reg_S] = np.diff(ends * whole + ends * rest // total).reshape(given.shape)
    return result_SK


def regularisation_lines(
    images_SK: np.ndarray, samples_SK: np.ndarray, is_reg_S: np.ndarray, prior_loss_weight: float
) -> Sequence[str]:
    """How many regularisation images there are, and what an epoch takes of them; nothing where there are none.

    Args:
        samples_SK: after balancing.
    """
    if not is_reg_S.any():
        return []
    images, samples = images_SK[is_reg_S].astype(np.int64), samples_SK[is_reg_S]
    used, total = int(np.minimum(images, samples).sum()), int(samples.sum())
    return [
        f"{int(samples_SK[~is_reg_S].sum())} train images with repeats.",
        f"{int(images.sum())} reg images, of which an epoch uses {used}, {total} with repeats; their loss counts "
        f"{prior_loss_weight:g} times (--prior_loss_weight)",
    ]
