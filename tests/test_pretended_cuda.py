"""The code path of a GPU on a pretended one: no tensor on the wrong device, the CPU's numbers, one wait a step."""

import json
from collections import defaultdict

import pytest
import torch

from ssl_dist import cli, methods
from ssl_dist.device import Uploads, allow_tf32
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import World, one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.kernels import relation_cuda
from ssl_dist.methods import sela
from ssl_dist.methods.base import Rows, SSLMethod
from ssl_dist.storage import checkpoint
from ssl_dist.verify import command as verify
from tests import pretended_cuda, test_sela
from tests.pretended_cuda import CUDA, NOTES, pretended
from tests.pretended_training import fake_group, train, train_on_gpu

CONFIG = "configs/digits/relational-conv4.yaml"
ONE_WAIT = {("event", "device.py:wait"): 1}  # for whether any rank stops or has no finite loss
MEANT_IN_FLOAT64 = {
    "methods/base.py:accuracy",  # counts
    "device.py:to_device",  # draws of a prior, on their way to float32
}
SUMS_OF_THE_RELATION_HEAD = {  # over its rows, and what comes of them: a few numbers a hidden unit
    "kernels/relation_cuda.py:relation", "kernels/relation_cuda.py:_sums_over_rows", "methods/relational.py:sweep",
    "distributed/world.py:_all_reduce_sum", "nn/batchnorm.py:update_statistics",
}  # fmt: skip


NAMES = [name for name in methods.names() if name != "random_weights"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Every method with every option that is a choice, on the digits: name -> its configs."""
    configs = defaultdict(list)
    for case in verify.cases(tmp_path_factory.mktemp("verify"), steps=2):
        if case.config.precision == "fp64":
            configs[case.method].append(case.config)
    return configs


def no_new_labels(monkeypatch, name):
    """The method `name` goes on with the labels that it begins with."""
    monkeypatch.setattr(methods.find(name), "before_step", SSLMethod.before_step)


# Smaller than the cases of `verify`: Triton's interpreter takes 20 ms for a pair.
FEW = {"deepcluster": ["method.options.clusters=8"], "relational": ["views.num=3", "optim.batch_size=6"]}


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_cpu(name, cases, monkeypatch):
    few = FEW.get(name, [])
    for config in cases[name]:
        expected = train(config, few)
        training = train_on_gpu(monkeypatch, config, few)
        check_kernels(monkeypatch, config, training.all_notes.kernels)
        assert training.losses == pytest.approx(expected.losses, rel=1e-10), config.method
        if not of_labels(name):
            assert dict(training.notes.waits) == ONE_WAIT, config.method


def of_labels(name):
    return methods.find(name).before_step is not SSLMethod.before_step


MULTICROP = [
    "views.num=null", "method.options.general=[0,1]",
    "views.groups=[{num: 2, size: 32, random_resized_crop: {}},{num: 2, size: 16, random_resized_crop: {}}]",
]  # fmt: skip


def test_selas_scores_in_the_hosts_memory(monkeypatch):
    """The transport runs on the CPU, collectives get tensors of the GPU, and the labels are the CPU's."""
    expected, plain, devices = test_sela.make(), sela.sinkhorn.sinkhorn_knopp, []
    values = test_sela.PIXELS[:, [0, 1, 2, 3, 4, 0]]
    expected.relabel([0, 1], Rows(torch.arange(len(values)), values), one_process())
    with pretended(monkeypatch):
        world = one_process(CUDA)
        reduce = world.all_reduce_sum
        monkeypatch.setattr(world, "all_reduce_sum", lambda x: devices.append(("sums", x.device.type)) or reduce(x))
        monkeypatch.setattr(
            sela.sinkhorn,
            "sinkhorn_knopp",
            lambda x, *rest: devices.append(("scores", x.device.type)) or plain(x, *rest),
        )
        method = test_sela.make(sinkhorn_device="cpu").to(CUDA)
        method.relabel([0, 1], Rows(torch.arange(len(values), device=CUDA), values.to(CUDA)), world)
        assert torch.equal(method.labels.of_images.cpu(), expected.labels.of_images)
        assert set(devices) == {("sums", "cuda"), ("scores", "cpu")}
        assert "a rank, in the host's memory" in method.explain(2, "cuda")["a relabeling"]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("supervised", ["backbone.name=efficientnet_b0", "optim.batch_size=8"]),
        ("simclr", ["backbone.name=timm/test_byobnet"]),
        ("relational", [*FEW["relational"], "log.probe_every_epochs=9"]),
        ("sfrik", MULTICROP),
        ("relational", [*FEW["relational"], "method.options.labelled=0.5"]),
    ],
    ids=["keyed dropout", "an activation in BatchNorm", "online probe", "multicrop", "labels of pairs"],
)
def test_what_verify_leaves_out(name, more, cases, monkeypatch):
    [config, *_] = cases[name]
    expected, training = train(config, more), train_on_gpu(monkeypatch, config, more)
    assert training.losses == pytest.approx(expected.losses, rel=1e-9)
    assert dict(training.notes.waits) == ONE_WAIT


@pytest.mark.parametrize("name", NAMES)
def test_one_of_eight_ranks(name, cases, monkeypatch):
    """It waits once, computes no loss in half precision under autocast, and nothing in float64."""
    no_new_labels(monkeypatch, name)
    meant = MEANT_IN_FLOAT64 | (SUMS_OF_THE_RELATION_HEAD if name == "relational" else set())
    few = ["views.num=2"] if name == "relational" else []
    for config in cases[name]:
        words = ["precision=bf16", "optim.batch_size=16", f"backbone.recompute={str(name == 'relic').lower()}"]
        notes = train_on_gpu(monkeypatch, config, [*words, *few], 8).notes
        assert dict(notes.waits) == ONE_WAIT, config.method
        assert not notes.half, config.method
        assert {place for _, place in notes.wide} <= meant, config.method


def test_timms_batchnorm_on_one_of_eight_ranks(cases, monkeypatch):
    [config, *_] = cases["simclr"]
    words = ["precision=bf16", "optim.batch_size=16", "backbone.name=timm/test_byobnet"]
    training = train_on_gpu(monkeypatch, config, words, 8)
    assert training.notes.kernels["batch_norm_elemt"] >= 14, "of the twin"
    assert dict(training.notes.waits) == ONE_WAIT and not training.notes.half
    assert {place for _, place in training.notes.wide} <= MEANT_IN_FLOAT64


def test_the_online_probe_on_one_of_eight_ranks(cases, monkeypatch):
    [config, *_] = cases["simclr"]
    words = ["precision=bf16", "optim.batch_size=16", "log.probe_every_epochs=9"]
    without, training = (train_on_gpu(monkeypatch, config, words[:count], 8) for count in (2, 3))
    assert dict(training.notes.waits) == ONE_WAIT and not training.notes.half
    assert {place for _, place in training.notes.wide} <= MEANT_IN_FLOAT64
    names = "c10d.allreduce_", "optimizer _fused_adamw_"
    more = [training.notes.kernels[name] - without.notes.kernels[name] for name in names]
    assert more == [3, 1], "sums of moments and gradients, and a step"


def test_triton_scores_pairs_where_it_can(cases, monkeypatch):
    if relation_cuda.obstacle():
        pytest.skip(relation_cuda.obstacle())
    [config, *_] = cases["relational"]
    training = train_on_gpu(monkeypatch, config, FEW["relational"])
    launched = {kernel: count for kernel, count in training.notes.kernels.items() if kernel.startswith("triton ")}
    names = "moments", "normalization", "sweep_left", "weight_gradients", "gradient_scales", "sweep_right"
    assert launched == {f"triton {name}": 1 for name in names}

    monkeypatch.setattr(relation_cuda, "obstacle", lambda: "Triton is not installed")
    by_torch = train_on_gpu(monkeypatch, config, FEW["relational"])
    assert not any(kernel.startswith("triton ") for kernel in by_torch.notes.kernels)
    assert by_torch.losses == pytest.approx(training.losses, rel=1e-10)
    assert sum(by_torch.notes.kernels.values()) > sum(training.notes.kernels.values())


@pytest.mark.parametrize("optimizer", ["adam", "lars"])
def test_the_scale_of_the_loss_waits_for_nothing(optimizer, cases, monkeypatch):
    [config, *_] = cases["supervised"]
    training = train_on_gpu(monkeypatch, config, ["precision=fp16", f"optim.name={optimizer}"])
    assert dict(training.notes.waits) == ONE_WAIT
    assert training.notes.kernels["_amp_update_scale_"] == 1


# From the documentation of torch.use_deterministic_algorithms: what raises an error on a GPU.
NONDETERMINISTIC = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "max_pool3d_with_indices_backward", "fractional_max_pool2d_backward",
    "max_unpool2d", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
    "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "replication_pad2d_backward", "nll_loss2d_forward", "nll_loss2d_backward",
    "_ctc_loss_backward", "put_", "histc", "kthvalue", "median", "grid_sampler_2d_backward", "cumsum",
    "scatter_reduce",
}  # fmt: skip


def check_kernels(monkeypatch, config, kernels):
    """All have a deterministic version, or `deterministic` is refused with a remedy."""
    if {kernel.split()[-1] for kernel in kernels} & NONDETERMINISTIC:
        assert config.method.name == "infomax"
        with pytest.raises(UserError, match=r"deterministic = true: .*options\.alpha=0, or deterministic=false"):
            train_on_gpu(monkeypatch, config, ["deterministic=true"])
        torch.use_deterministic_algorithms(False)
        remedied = train_on_gpu(monkeypatch, config, ["method.options.alpha=0"])
        check_kernels(monkeypatch, remedied.config, remedied.all_notes.kernels)


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_or_tensorfloat32(tf32, cases, monkeypatch):
    [config, *_] = cases["supervised"]
    train_on_gpu(monkeypatch, config, ["precision=fp32", f"tf32={str(tf32).lower()}"])
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (tf32, tf32)
    allow_tf32(False)


def test_commands_on_one_gpu(digits, tmp_path, monkeypatch, capsys):
    """Training, resume, features and evaluations give on a GPU what they give on the CPU."""
    words = [
        f"data.root={digits}", "data.reader=arrays", "data.workers=1", "data.limit=40", "optim.batch_size=16",
        "optim.epochs=null", "views.num=2", "precision=fp64", "log.every_steps=1", "log.knn_every_epochs=1",
        "log.probe_every_epochs=1",
        "checkpoint.every_steps=2", "checkpoint.every_epochs=null",
    ]  # fmt: skip

    def results_of(run):
        for steps in (2, 4):
            assert cli.main(["train", CONFIG, *words, f"run_dir={run}", f"optim.steps={steps}"]) == 0
        trained = ["logistic_sgd", "probe", "finetune"]
        assert cli.main(["evaluate", str(run), "knn", *trained, *(f"{name}.epochs=1" for name in trained)]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            for name in ("images_per_s", "views_per_s", "data_wait", "seconds_per_step"):
                line.pop(name, None)
        numbers = {record["name"]: record["value"] for record in json.loads((run / "results.json").read_text())}
        return lines, numbers, checkpoint.load_newest(run)[1]["method"]

    cpu_lines, cpu_numbers, cpu_weights = results_of(tmp_path / "cpu")
    with pretended(monkeypatch, 1) as notes:
        lines, numbers, weights = results_of(tmp_path / "gpu")
    assert sum(notes.kernels.values()) > 1000, "did it run on the GPU?"
    files = {place.split(":")[0] for _, place in notes.waits}
    assert {"kernels/neighbours.py", "evaluators/logistic_sgd.py"} <= files, "did the evaluators?"
    assert numbers == cpu_numbers
    for line, of_cpu in zip(lines, cpu_lines, strict=True):
        assert line == pytest.approx(of_cpu, rel=1e-7)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, cpu_weights[name], rtol=1e-8, atol=1e-10, msg=name)


def test_the_watchdog_sees_what_the_gpu_still_has_to_do(monkeypatch):
    """NCCL's calls return at once: a rank whose GPU waits for the others has not left the collective."""
    with fake_group(8), pretended(monkeypatch, 8):
        world = World(RankInfo(0, 8, 0, 8), Grid(8, 1), CUDA)
        assert not world.state.is_waiting
        monkeypatch.setattr(torch.cuda.Event, "query", lambda event: False)
        world.all_reduce_sum(torch.ones(3, device=CUDA))
        assert not world.state.record["in_collective"] and world.state.is_waiting
        assert world.state.record["call_sites"][1].decode().startswith("all_reduce at test_pretended_cuda.py")


def test_batches_are_copied_on_a_stream_of_their_own(monkeypatch):
    with pretended(monkeypatch):
        computing, upload = torch.cuda.current_stream(), Uploads(CUDA)
        copies = upload([torch.arange(6).pin_memory(), torch.ones(2).pin_memory()])
        assert [copy.is_cuda for copy in copies] == [True, True] and not NOTES.waits
        [(copying, number)] = computing.waited_for
        assert copying is not computing and number == NOTES.kernels.total() == 2  # both copies are waited for
        assert all(any(copy is user for user in computing.users) for copy in copies)


def test_the_wait_comes_when_the_backward_pass_is_queued(cases, monkeypatch):
    has_backward = []
    wait = pretended_cuda._Event.synchronize

    def noted(event):
        has_backward.append(any(kernel.startswith("backward ") for kernel in NOTES.kernels))
        wait(event)

    monkeypatch.setattr(pretended_cuda._Event, "synchronize", noted)
    [config, *_] = cases["supervised"]
    train_on_gpu(monkeypatch, config)
    assert has_backward == [True] * 3


def test_a_logged_step_waits_once_more(cases, monkeypatch):
    [config, *_] = cases["relational"]
    notes = train_on_gpu(monkeypatch, config, FEW["relational"], log_every=1).notes
    assert dict(notes.waits) == {("event", "device.py:wait"): 2}


def test_the_notes_see_what_waits(monkeypatch):
    """The pretended GPU itself: were it blind, all tests above would pass."""
    with pretended(monkeypatch):
        x = torch.arange(4.0, device=CUDA)
        for number, wait in enumerate(
            (
                lambda: x.sum().item(),
                lambda: bool((x > 0).all()),
                lambda: x[x > 1],
                lambda: x.nonzero(),
                lambda: x.cpu(),
                lambda: x.tolist(),
                lambda: torch.ones(3).to(CUDA),
                lambda: torch.ones(3).to(CUDA, non_blocking=True),  # from pageable memory
                lambda: torch.tensor([1.0], device=CUDA),
                lambda: torch.equal(x, x),
                lambda: torch.cuda.synchronize(),
            )
        ):
            NOTES.take()
            wait()
            assert sum(NOTES.waits.values()) >= 1, number
        NOTES.take()
        y = torch.ones(3).pin_memory().to(CUDA, non_blocking=True) + x[:3] * 2
        host = y.to("cpu", non_blocking=True)
        assert not NOTES.waits and host.device.type == "cpu" and y.is_cuda
        for wrong in (lambda: x + torch.ones(4), lambda: x.numpy(), lambda: torch.ones(4)[x.long()]):
            with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
                wrong()
