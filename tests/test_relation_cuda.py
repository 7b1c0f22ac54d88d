"""The relation head's Triton kernels, run by Triton's interpreter on the CPU: against torch and the CPU's kernel; and
compiled for GPUs that are not there. tests/test_pretended_cuda.py has the trainings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_dist.kernels import relation_cuda
from ssl_dist.train.explain import Alive
from tests.programs import script
from tests.test_kernels_relation import Problem, compare

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch's CUDA builds alone")

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def by_triton(problem, lo=0, hi=None, reduce=lambda x: x):
    return problem.by_sweep(lo, hi, reduce, relation_cuda.relation_loss)


@pytest.mark.parametrize(
    ("num_views", "num_images", "hidden", "gamma", "alpha", "seed", "dtype"),
    [  # seeds that 3 divides know no label, with the others some images of a negative pair have the same
        (2, 2, 3, 0.0, None, 0, torch.float64),
        (3, 4, 37, 2.0, 0.3, 2, torch.float64),
        (4, 3, 16, 1.5, None, 2, torch.float64),
        (3, 3, 256, 2.0, 0.5, 4, torch.float32),
        (2, 5, 70, 1.5, 0.3, 3, torch.float32),
    ],
)
def test_it_equals_torch(num_views, num_images, hidden, gamma, alpha, seed, dtype):
    problem = Problem(num_views, num_images, hidden, gamma, alpha, seed, dtype)
    compare(by_triton(problem), problem.by_torch(), TOLERANCES[dtype])


@pytest.mark.parametrize("cuts", [(2, 7), (6, 6)])
def test_shares_of_three_ranks_add_up(cuts):
    """Cut inside a couple of views; one rank without a unit. In place of its sums a rank gets those of one process."""
    problem = Problem(3, 3, 20, 1.0, 0.3, seed=8)
    sums = []
    compare(by_triton(problem, reduce=lambda x: sums.append(x) or x), problem.by_torch(), 1e-10)
    bounds, parts, given = [0, *cuts, problem.num_units], [], []
    for rank in range(3):
        of_all = iter(sums)
        parts.append(
            by_triton(problem, *bounds[rank : rank + 2], lambda x, of_all=of_all: given.append(x) or next(of_all))
        )
    for number, total in enumerate(sums):
        torch.testing.assert_close(sum(given[number :: len(sums)]), total)
    joined = (
        sum(part[0] for part in parts),
        torch.cat([part[1] for part in parts], 1),
        [sum(grads) for grads in zip(*(part[2] for part in parts), strict=True)],
        *parts[0][3:],
    )
    compare(joined, problem.by_torch(), 1e-10)


def test_a_share_of_many_views_equals_that_of_the_cpu():
    problem = Problem(32, 2, 5, seed=1)
    compare(by_triton(problem, 401, 414), problem.by_sweep(401, 414), 1e-10)


def test_extreme_logits_and_a_batchnorm_weight_of_zero():
    problem = Problem(2, 3, 8)
    problem.last.weight.data *= 1e4
    compare(by_triton(problem), problem.by_torch(), 1e-9)
    nn.init.zeros_(problem.bn.weight)
    compare(by_triton(problem), problem.by_torch(), 1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_the_loss(bad):
    problem = Problem(2, 2, 8)
    problem.A[2, 5] = bad
    assert not by_triton(problem)[0].isfinite()


def test_backward_can_run_twice():
    problem = Problem(2, 2, 8)
    A = problem.A.requires_grad_()
    rest = problem.bn, 0.01, problem.last, 2.0, 0.5, problem.share(), problem.labels, lambda x: x
    loss, *_ = relation_cuda.relation_loss(A, problem.B, *rest)
    (one,) = torch.autograd.grad(loss, A, retain_graph=True)
    (three,) = torch.autograd.grad(3 * loss, A)
    torch.testing.assert_close(three, 3 * one)


def test_memory_grows_as_explain_says():
    """With the rows; what there is of vectors over the hidden units is left out."""
    held, expected = [], []
    for num_images in (2, 6):
        problem = Problem(2, num_images, 512, dtype=torch.float32)
        with Alive([problem.A, problem.B]) as alive:
            rest = problem.bn, 0.01, problem.last, 2.0, 0.5, problem.share(), problem.labels, lambda x: x
            relation_cuda.relation_loss(problem.A, problem.B, *rest)
        held.append(alive.peak + problem.A.nbytes + problem.B.nbytes)
        expected.append(relation_cuda.memory(len(problem.A), problem.num_units, 512))
    assert held[1] - held[0] == pytest.approx(expected[1] - expected[0], rel=0.02)


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (("importlib.util.find_spec", lambda name: None), "Triton is not installed"),
        (("shutil.which", lambda name, path: None), "Triton finds no C compiler"),
        (("sysconfig.get_path", lambda *names: "/nowhere"), "Triton finds no Python.h"),
        (("torch.cuda.get_device_capability", lambda: (6, 1)), "this GPU is too old for Triton"),
    ],
)
def test_what_is_lacking_is_named(lacking, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 0))
    for name in ("shutil.which", "sysconfig.get_path"):  # as on a machine that lacks nothing
        monkeypatch.setattr(name, lambda *names, path=None: str(Path(__file__).parent))
    monkeypatch.setattr("pathlib.Path.exists", lambda path: "nowhere" not in str(path))
    monkeypatch.setattr(*lacking)
    assert relation_cuda._obstacle.__wrapped__(None, "/bin") == words


def test_what_was_lacking_on_another_path_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    script(tmp_path / "gcc", "true")
    for path, is_lacking in (("/nowhere", True), (str(tmp_path), False), ("/nowhere", True)):
        monkeypatch.setenv("PATH", path)
        assert (relation_cuda.obstacle() == "Triton finds no C compiler") == is_lacking


@pytest.mark.slow
def test_the_kernels_compile_for_gpus(tmp_path):
    """A100 (sm_80) and H100 (sm_90): registers spilled to memory, and constants that float32 would round."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_sweeps"], cwd=Path(__file__).parent.parent, text=True, check=False,
        capture_output=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 6 * 2 * 2
    for kernel in kernels:
        assert kernel["STACK"] == 0 and kernel["REG"] <= 160 and not kernel["rounded"], kernel
