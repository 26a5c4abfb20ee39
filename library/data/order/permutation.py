"""A keyed shuffle of 0 … n-1 that is computed entry by entry, in no memory, at any n.

A Feistel network over the pairs (left, right) of an a × b rectangle that just holds n: each round adds to one half a
hash of the other, which can be undone, so the whole is a permutation; what lands outside n walks on along its cycle
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002: generalised Feistel, cycle walking).
"""

import math

import numpy as np

ROUNDS = 12  # six for each half; four are proven to look random to whoever sees few entries


def permute(places: np.ndarray, n: int, round_keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0 … n-1 sends each of some places.

    Args:
        places: whole numbers in 0 … n-1, any shape.
        n: 1 <= n < 2**62.
        round_keys: (ROUNDS,) uint64; they choose the permutation.

    Returns:
        int64 of the shape of places.
    """
    left_size = math.isqrt(n - 1) + 1
    right_size = -(-n // left_size)
    result = _encrypt(np.asarray(places).astype(np.uint64), left_size, right_size, round_keys)
    while (outside := result >= n).any():
        result[outside] = _encrypt(result[outside], left_size, right_size, round_keys)
    return result.astype(np.int64)


def _encrypt(values: np.ndarray, left_size: int, right_size: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass of the network over 0 … left_size * right_size - 1."""
    a, b = np.uint64(left_size), np.uint64(right_size)
    left, right = np.atleast_1d(values) // b, np.atleast_1d(values) % b
    for number, key in enumerate(round_keys):
        if number % 2:
            right = (right + _hash(left, key) % b) % b
        else:
            left = (left + _hash(right, key) % a) % a
    return (left * b + right).reshape(values.shape)


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)."""
    mixed = values + key  # unsigned, so it wraps
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
