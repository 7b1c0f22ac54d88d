"""The choice of the images that a picture shows: by key, evenly over the classes."""

import numpy as np

from ssl_dist.keys import hash64, permutation


def evenly(labels: np.ndarray, limit: int, key: np.uint64) -> np.ndarray:
    """At most `limit` rows, int64 in rising order: in turn one of every class, of classes and rows in orders by `key`.

    labels: int64 [N]. So every class has as many rows as any other that has not run out, or one fewer.
    """
    order = permutation(key, len(labels))
    of_class = np.argsort(labels[order], kind="stable")
    classes, first = np.unique(labels[order][of_class], return_index=True)
    sizes = np.diff([*first, len(labels)])
    round_N = np.arange(len(labels)) - np.repeat(first, sizes)
    class_place_N = np.repeat(permutation(hash64(int(key), 1), len(classes)), sizes)
    return np.sort(order[of_class][np.lexsort((class_place_N, round_N))[:limit]])
