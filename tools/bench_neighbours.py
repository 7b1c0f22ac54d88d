"""kNN by cosine: ssl_dist's beside the loop of published scripts, scikit-learn, and faiss where it is installed.

    python tools/bench_neighbours.py [--images 50000] [--queries 10000] [--features 64] [--rounds 5] [--threads 2]

Every side gets the same float32 features of random clusters and gives the k = 20 nearest images of every query, nearest
first, in the environment that `ssl-dist` makes for itself. "torch" is what DINO's and others' scripts do: unit rows, a
product with all images a hundred queries at a time, topk. Interleaved in one process; wall time, medians; "alike" is
the share of neighbours that are the same image as in float64.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import rows  # beside this file

from ssl_dist import outcome, process

process.prepare()  # before the libraries whose threads read it

import torch  # noqa: E402
from sklearn.neighbors import NearestNeighbors  # noqa: E402
from torch.nn import functional  # noqa: E402

from ssl_dist.kernels.neighbours import neighbours  # noqa: E402

K, MEMORY = 20, 512 * 2**20
Search = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Rows:
    """Features in memory, as the kernel reads them."""

    def __init__(self, features: np.ndarray):
        self._features, self.dim = features, features.shape[1]

    def __len__(self) -> int:
        return len(self._features)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._features[start:stop].copy()


def ours(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    blocks = neighbours(Rows(train), Rows(test), K, torch.float32, MEMORY)
    return np.concatenate([ids.numpy() for _, _, ids in blocks])


def by_torch(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    images, queries = (functional.normalize(torch.from_numpy(x), dim=1) for x in (train, test))
    return np.concatenate([(part @ images.T).topk(K, largest=True, sorted=True)[1] for part in queries.split(100)])


def by_scikit_learn(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    index = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute", n_jobs=torch.get_num_threads())
    return index.fit(train).kneighbors(test, return_distance=False)


def by_faiss() -> Search | None:
    try:
        import faiss
    except ImportError:
        return None

    def search(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        faiss.omp_set_num_threads(torch.get_num_threads())
        images, queries = train.copy(), test.copy()
        faiss.normalize_L2(images)
        faiss.normalize_L2(queries)
        index = faiss.IndexFlatIP(images.shape[1])
        index.add(images)
        return index.search(queries, K)[1]

    return search


def exact(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    images, queries = (functional.normalize(torch.from_numpy(x).double(), dim=1) for x in (train, test))
    return np.concatenate([(part @ images.T).topk(K)[1] for part in queries.split(100)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((10, arguments.features), np.float32)
    train, test = (
        centres[np.arange(num) % 10] + generator.standard_normal((num, arguments.features), np.float32)
        for num in (arguments.images, arguments.queries)
    )
    sides: dict[str, Search] = {"ssl_dist": ours, "torch": by_torch, "scikit-learn": by_scikit_learn}
    if faiss := by_faiss():
        sides["faiss"] = faiss
    few = slice(min(len(test), 1000))
    expected = exact(train, test[few])
    alike = {name: (side(train, test[few]) == expected).mean() for name, side in sides.items()}  # and warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side(train, test)
            seconds[name].append(time.perf_counter() - start)
    print(f"{len(test)} queries among {len(train)} x {arguments.features}, k = {K}, {arguments.threads} threads")
    base = statistics.median(seconds["ssl_dist"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:<13} {middle:8.3f} s {middle / base:6.2f} x as long; alike {100 * alike[name]:.2f} %")
    if "faiss" not in sides:
        print("faiss is not installed")
    what = (
        f"{K} neighbours of {len(test):,} queries among {len(train):,} x {arguments.features},"
        f" {arguments.threads} thread(s)"
    )
    ours_s = seconds.pop("ssl_dist")
    rows.show([(what, rows.beside(ours_s, {f"of {name}": values for name, values in seconds.items()}, " s"))])


if __name__ == "__main__":
    sys.exit(outcome.of_program(main))
