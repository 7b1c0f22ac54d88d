"""Counter-based randomness: every draw is a pure function of integers, so nothing about it needs saving.

A *key* is 64 bits made from a tuple of integers with `hash64`; the n-th draw of a key is
`uniform(key, n)`. The functions are compiled with numba and are called from kernels and from Python alike.
The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
"""

import numpy as np

from ssl_dist.numba_cache import njit

# The purpose of a key is one of its words, so that two uses with the same seed never share a stream.
ORDER, VIEWS, INIT, METHOD, DROPOUT, RELABEL, LABELLED, EVALUATION, HELD_OUT, TRANSFER = range(1, 11)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ODD = np.uint64(0xD1342543DE82EF95)


@njit(inline="always", cache=True)
def mix64(z: np.uint64) -> np.uint64:
    """SplitMix64's finaliser: a bijection of 64-bit integers that spreads every input bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(inline="always", cache=True)
def fold(key: np.uint64, word: int | np.integer) -> np.uint64:
    """A new key from `key` and one more integer. `fold(fold(k, a), b)` differs from `fold(fold(k, b), a)`."""
    return mix64(key * _ODD + mix64(np.uint64(word) + _GOLDEN))


@njit(inline="always", cache=True)
def uniform(key: np.uint64, n: int) -> np.float64:
    """The n-th draw of `key`: float64 in [0, 1), 53 random bits."""
    return np.float64(mix64(key + np.uint64(n + 1) * _GOLDEN) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True, nogil=True)
def _draws(keys: np.ndarray, count: int) -> np.ndarray:
    """The 64 bits of draws 0 .. count - 1 of every key: uint64 [len(keys), count]."""
    out = np.empty((len(keys), count), np.uint64)
    for i in range(len(keys)):
        for n in range(count):
            out[i, n] = mix64(keys[i] + np.uint64(n + 1) * _GOLDEN)
    return out


@njit(cache=True, nogil=True)
def _folds(keys: np.ndarray, words: np.ndarray) -> np.ndarray:
    """`fold` of every key and every word: uint64 [len(keys), len(words)]."""
    out = np.empty((len(keys), len(words)), np.uint64)
    for i in range(len(keys)):
        for j in range(len(words)):
            out[i, j] = fold(keys[i], words[j])
    return out


def hash64(*words: int | np.integer) -> np.uint64:
    """The key of a tuple of integers (each taken modulo 2**64)."""
    key = np.uint64(0)
    for word in words:
        key = np.uint64(fold(key, np.uint64(int(word) & 0xFFFFFFFFFFFFFFFF)))
    return key


def permutation(key: np.uint64, n: int) -> np.ndarray:
    """A permutation of range(n), int64 [n], uniform over keys: the order of n draws of the key."""
    return np.argsort(_draws(np.array([key], np.uint64), n)[0], kind="stable").astype(np.int64)


def uniforms(key: np.uint64, count: int) -> np.ndarray:
    """Draws 0 .. count - 1 of `key`: float64 [count] in [0, 1)."""
    return (_draws(np.array([key], np.uint64), count)[0] >> np.uint64(11)) * 2.0**-53


def normals(key: np.uint64, count: int) -> np.ndarray:
    """Draws of the standard normal distribution, float64 [count]."""
    return _normal(uniforms(key, 2 * count))


def row_keys(key: np.uint64, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The keys of (*words of `key`, firsts[i], seconds[j]): uint64 [len(firsts), len(seconds)]."""
    keys = _folds(np.array([key], np.uint64), np.ascontiguousarray(firsts, np.int64))[0]
    return _folds(keys, np.ascontiguousarray(seconds, np.int64))


def uniform_rows(key: np.uint64, ids: np.ndarray, width: int) -> np.ndarray:
    """float64 [len(ids), width] in [0, 1): row i is a function of `key` and ids[i] alone."""
    keys = _folds(np.array([key], np.uint64), np.ascontiguousarray(ids, np.int64))[0]
    return (_draws(keys, width) >> np.uint64(11)) * 2.0**-53


def normal_rows(key: np.uint64, ids: np.ndarray, width: int) -> np.ndarray:
    """Draws of the standard normal distribution, float64 [len(ids), width]: row i is a function of `key` and ids[i]
    alone."""
    return _normal(uniform_rows(key, ids, 2 * width))


def _normal(uniform: np.ndarray) -> np.ndarray:
    """[..., n] of the standard normal distribution from [..., 2n] in [0, 1) (Box & Muller, 1958)."""
    first, second = np.split(uniform, 2, axis=-1)
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
