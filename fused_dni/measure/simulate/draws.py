"""Random numbers that belong to what they are drawn for, not to the order in which it happens.

The delay of the 7th message between two stages is the same for every mode, latency and order of
events: modes are compared under the same luck, and a seed gives the same run.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
#: What is drawn; part of a key.
FORWARD, BACKWARD, CREDIT, GAP, SPELL = range(5)


def _mixed(x: Keys) -> Keys:
    """Return the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Keys = x ^ (x >> np.uint64(31))
    return mixed


def keys(seed: int, purpose: int, who: npt.NDArray[np.int64]) -> Keys:
    """Return a key for each of ``who``, for one purpose."""
    start = _mixed(np.array([seed], np.uint64) + _GOLDEN * np.array([purpose + 1], np.uint64))
    return _mixed(start + _GOLDEN * (who.astype(np.uint64) + np.uint64(1)))


def uniform(key: Keys, number: npt.NDArray[np.int64], lane: int = 0) -> Floats:
    """Uniform numbers in (0, 1): for each key the one of that number."""
    counted = (number.astype(np.uint64) << np.uint64(1)) + np.uint64(lane + 1)
    bits = _mixed(key + _GOLDEN * counted) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def exponential(key: Keys, number: npt.NDArray[np.int64]) -> Floats:
    """Exponential numbers of mean 1."""
    return -np.log(uniform(key, number))


def delay(shape: str, key: Keys, number: npt.NDArray[np.int64]) -> Floats:
    """Random delays of mean 1 of that shape (:data:`settings.JITTERS`)."""
    if shape == "uniform":
        return 2.0 * uniform(key, number)
    if shape == "exponential":
        return exponential(key, number)
    # exp(z - 1/2) with z normal, by Box and Muller, has mean 1.
    radius = np.sqrt(-2.0 * np.log(uniform(key, number)))
    normal = radius * np.cos(2.0 * np.pi * uniform(key, number, 1))
    lengths: Floats = np.exp(normal - 0.5)
    return lengths
