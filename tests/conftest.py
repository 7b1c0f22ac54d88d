"""Settings of all tests: one thread and a time limit each, their order, and which of them share a worker."""

import atexit
import gc
import importlib.util
import os
import signal
import sys

import hypothesis
import pytest

from tests.cluster import Cluster, unavailable_reason
from tests.network_cluster import NetworkCluster, network_unavailable_reason

# Read when a test first imports torch or numpy, and inherited by every process that a test starts.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, in Python; read when Triton is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks would miss a GPU where there is one, and find other numbers on two

# A background job of a script ignores INT, QUIT and HUP, and so do its children; the tests send these signals.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

gc.disable()  # until all is imported: a collection would take a fifth of the time and find nothing

SLOW_TIMEOUT = 600  # seconds; the quick tests' limit is in pyproject.toml

# No deadline: a first call may compile for seconds. The same examples every time: a failure must be reproducible.
hypothesis.settings.register_profile("ssl_dist", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ssl_dist")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook, too
def pytest_collection_modifyitems(items):
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))
        if item.get_closest_marker("requires_ffcv") and not has_ffcv:
            item.add_marker(pytest.mark.skip(reason="FFCV is not installed (bash launch/install.sh)"))
        if (group := _group(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_start_order)


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("this pytest-xdist does not group tests under this pytest: see setup.py")


CLUSTERS = ("slurm", "network")  # the longest sequences of tests, which mostly wait


def _start_order(item):
    """Sort key: the longest tests start first, so that short groups of quick tests fill the workers at the end."""
    group = _group(item)
    if group in CLUSTERS:
        return CLUSTERS.index(group)
    return len(CLUSTERS) + (2 if not item.get_closest_marker("slow") else 0 if group else 1)


def _group(item):
    """For `--dist loadgroup`: the tests of a group run one after another in one worker. Those of a cluster; those of a
    file if they are quick or share a fixture. Other slow tests go to any free worker."""
    if {"_cluster", "_network_cluster"} & set(item.fixturenames):
        return "network" if "_network_cluster" in item.fixturenames else "slurm"
    shared = any(d.scope in ("module", "class") for defs in item._fixtureinfo.name2fixturedefs.values() for d in defs)
    return item.path.stem if shared or not item.get_closest_marker("slow") else None


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread again for each test: building an FFCV loader sets torch's number of threads for the whole process."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of the converted handwritten digits (train and test)."""
    from ssl_dist.convert.command import convert

    root = tmp_path_factory.mktemp("data") / "digits"
    convert("digits", None, root, workers=1, progress=False)
    return root


@pytest.fixture(scope="session")
def random_run(digits, tmp_path_factory):
    """The folder of a run of random weights on the digits. For reading: a test that writes makes a copy."""
    from ssl_dist import config
    from ssl_dist.train.loop import train

    run = tmp_path_factory.mktemp("runs") / "random"
    overrides = [f"data.root={digits}", f"run_dir={run}", "data.reader=arrays"]
    assert train(config.load("configs/digits/random_weights-conv4.yaml", overrides)) == 0
    return run


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory):
    yield from _started(Cluster, unavailable_reason(), tmp_path_factory)


@pytest.fixture(scope="session")
def _network_cluster(tmp_path_factory):
    yield from _started(NetworkCluster, network_unavailable_reason(), tmp_path_factory)


def _started(kind, obstacle, tmp_path_factory):
    if obstacle:
        pytest.skip(obstacle)
    with kind(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster):
    """A Slurm cluster of two nodes (tests/cluster.py); after the test no job runs and both nodes are up."""
    yield _cluster
    _cluster.clear()


@pytest.fixture
def network_cluster(_network_cluster):
    """The same with a network whose links can be cut."""
    yield _network_cluster
    _network_cluster.clear()
