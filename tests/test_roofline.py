"""The time of a step on a device of made-up rates, by hand; the table of GPUs; what explain says of it."""

import json

import pytest
import torch
from torch import nn

from ssl_dist import backbones, cli
from ssl_dist.config import load, validate
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import UserError
from ssl_dist.run.blueprint import derive
from ssl_dist.train import operations, roofline
from ssl_dist.train.operations import Collective, Operation, Step
from tests.tool_module import tool_module

ROW = {
    "name": "made-up", "kind": "cuda", "sources": ["none"], "flop_per_s": {"fp32": 1e12, "bf16": 4e12},
    "byte_per_s": 1e11, "efficiency": {"fp32": 0.5, "memory": 0.5, "network": 0.5}, "start_s": 1e-6, "launch_s": 1e-5,
    "node": {"byte_per_s": 2e9, "latency_s": 1e-4}, "network": {"byte_per_s": 1e8, "latency_s": 1e-3},
    "upload_byte_per_s": 1e9, "cores": 4,
    "loader": {"image_s": 1e-4, "decoded": 1e8,
               "views": [{"side": 32, "plain": 1e8, "blurred": 5e7}, {"side": 224, "plain": 2e8, "blurred": 1e8}]},
}  # fmt: skip


def device(**changes):
    return validate(roofline.Device, ROW | changes)


def plan_of(digits, tmp_path, ranks=1, per_node=None, *overrides):
    base = [
        f"data.root={digits}",
        f"run_dir={tmp_path / 'run'}",
        "data.reader=arrays",
        "optim.batch_size=8",
        *overrides,
    ]
    return derive(load("configs/digits/simclr-conv4.yaml", base), RankInfo(0, ranks, 0, per_node or ranks))


def test_an_operation_takes_the_longer_of_arithmetic_and_memory():
    matrix = Operation("mm", 5e9, 1e8)
    assert device().seconds(matrix, "fp32") == pytest.approx((1e-6 + 1e-2, 1e-6 + 2e-3))
    assert device().seconds(matrix, "bf16")[0] == pytest.approx(1e-6 + 5e9 / 4e12), (
        "an efficiency of 1 if none is given"
    )
    in_float32 = Operation("mm", 5e9, 1e8, in_float32=True)
    assert device().seconds(in_float32, "bf16") == device().seconds(matrix, "fp32")
    own = device(operations={"mm": {"start_s": 0.5, "byte_per_s": 1e8}})
    assert own.seconds(matrix, "fp32") == pytest.approx((0.5 + 1e-2, 0.5 + 1))


def test_a_convolution_has_the_rate_of_the_nearest_shape():
    rates = [
        {"shape": [8, 16, 3, 16], "forward": 1e9, "backward": 2e9},
        {"shape": [512, 512, 3, 2], "forward": 3e9, "backward": 4e9},
    ]
    of_cpu = device(convolutions=rates)
    small, large = (16, 32, 3, 8), (256, 512, 3, 4)
    for name, shape, rate in (
        ("convolution", small, 1e9), ("convolution_backward", small, 2e9), ("convolution_backward", large, 4e9)
    ):  # fmt: skip
        assert of_cpu.seconds(Operation(name, 1e9, 0, shape), "fp32")[0] == pytest.approx(1e-6 + 1e9 / rate)


def test_a_ring_sends_its_parts_once_or_twice():
    """4 ranks of one node: 3/4 of 8 MB gathered, 2 x 3/4 reduced. 16 ranks of 4 nodes: all 4 cards of a node send."""
    gathered, reduced = (Collective(name, "x", 8_000_000, 4) for name in ("all_gather", "all_reduce"))
    assert (gathered.sent, reduced.sent) == (6e6, 12e6)
    assert device().sending(gathered, 4) == pytest.approx(1e-4 + 6e6 / 1e9)
    over_nodes = Collective("all_reduce", "x", 16_000_000, 16)
    assert device().sending(over_nodes, 4) == pytest.approx(1e-4 + 2 * 1e-3 + 30e6 / (4 * 1e8 * 0.5))


def test_gradients_hide_behind_the_backward_pass(digits, tmp_path):
    plan = plan_of(digits, tmp_path, 2)
    forward, backward, update = Operation("a", 0, 5e7), Operation("b", 0, 1e8), Operation("c", 0, 5e7)
    for num_bytes, exposed in ((1_000_000, 0.0), (10_000_000, 1e-2 - 2e-3)):
        gradients = Collective("all_reduce", "gradients", num_bytes, 2, overlapped=True)
        step = Step([forward, backward, update], [gradients], 1, 2)
        times = roofline.estimate(step, plan, device())
        assert times.memory == pytest.approx(4e-3, rel=1e-2)
        assert times.network == pytest.approx(exposed + (exposed > 0) * 1e-4, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "step", "bound"),
    [
        ({}, Step([Operation("mm", 1e12, 1e6)]), "arithmetic"),
        ({}, Step([Operation("add", 0, 1e10)]), "memory"),
        ({}, Step([Operation("add", 0, 1e8)], [Collective("all_reduce", "x", 10**9, 2)]), "the network"),
        ({}, Step([Operation("add", 0, 8)] * 10_000), "the host that starts operations"),
        ({}, Step([Operation("add", 0, 8)], pixel_bytes=10**9), "the copy to the GPU"),
        ({}, Step([Operation("add", 0, 8)]), "the loader's cores"),
        ({"kind": "cpu"}, Step([Operation("add", 0, 8)]), "the loader's cores"),
    ],
)  # fmt: skip
def test_what_bounds_a_step(digits, tmp_path, changes, step, bound):
    times = roofline.estimate(step, plan_of(digits, tmp_path, 2), device(**changes))
    assert times.bound == bound
    assert times.step == max(times.device, times.host, times.upload, times.loader)


def test_views_of_a_step_by_hand(digits, tmp_path):
    """8 images of 32 px, two views of each; ranks of a CPU share its cores with their loaders."""
    plan, step = plan_of(digits, tmp_path), Step([Operation("add", 0, 1e8)])
    seconds = 8 * (1e-4 + 32**2 / 1e8) + 16 * 32**2 / 1e8
    assert roofline.estimate(step, plan, device()).loader == pytest.approx(seconds / 4)
    on_cpu = roofline.estimate(step, plan, device(kind="cpu", cores=1))
    assert on_cpu.loader == pytest.approx(seconds + on_cpu.computing)
    slow = device(kind="cpu", cores=1, node=ROW["node"] | {"host_s": 0.5})
    sending = Step(step.operations, [Collective("all_reduce", "x", 8, 2)] * 3)
    assert roofline.estimate(sending, plan, slow).computing == pytest.approx(on_cpu.computing + 3 * (0.5 + 1e-5))
    rate = validate(roofline.LoaderRate, ROW["loader"])
    assert rate.seconds_a_pixel(200, 0.5) == pytest.approx(0.5 / 2e8 + 0.5 / 1e8)


def test_what_has_no_rate_is_refused(digits, tmp_path):
    step = Step([Operation("add", 0, 8)])
    with pytest.raises(UserError, match="precision = fp64: made-up has rates of fp32, bf16"):
        roofline.estimate(step, plan_of(digits, tmp_path, 1, None, "precision=fp64"), device())
    with pytest.raises(UserError, match="made-up has no rates between nodes"):
        roofline.estimate(step, plan_of(digits, tmp_path, 4, 2), device(network=None))
    with pytest.raises(UserError, match="did you mean 'h100'"):
        roofline.named("h10")


def test_the_table_of_gpus_names_its_sources():
    table = roofline.read_table()
    assert {"a100", "h100", "h200"} <= table.keys()
    for name, row in table.items():
        assert (row.name, row.kind, row.ranks) == (name, "cuda", None)
        assert len(row.sources) >= 2 and {*row.flop_per_s, "memory", "network"} <= row.efficiency.keys()


def test_efficiencies_give_what_nvidia_publishes():
    """Within 15 %, where its ResNet-50 was published; tools/bench_prediction.py names the source."""
    for (name, precision), published in tool_module("bench_prediction").PUBLISHED.items():
        dtype = torch.float32 if precision in ("fp32", "tf32") else torch.bfloat16
        with torch.device("meta"):
            network = nn.Sequential(backbones.build("resnet50"), nn.Linear(2048, 1000)).to(dtype).train()
            step = operations.count_network(network, torch.empty(256, 3, 224, 224, dtype=dtype))
        gpu = roofline.named(name)
        seconds = sum(max(gpu.seconds(operation, precision)) for operation in step.operations)
        assert 256 / seconds == pytest.approx(published, rel=0.15), (name, precision)


# ---------------------------------------------------------------------------------------------------- explain


def explained(capsys, digits, tmp_path, *words):
    settings = [f"data.root={digits}", f"run_dir={tmp_path / 'run'}", "data.reader=arrays", "optim.batch_size=8"]
    code = cli.main(["explain", "configs/digits/simclr-conv4.yaml", *settings, *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_explain_says_work_and_communication_and_the_time_on_a_named_device(capsys, digits, tmp_path):
    _, text = explained(capsys, digits, tmp_path)
    assert "work of a step  a rank: 0." in text and "none: one rank" in text and "--device a100" in text
    _, text = explained(capsys, digits, tmp_path, "--world", 4, "--ranks-per-node", 2, "--device", "h100")
    assert "ms a step" in text and "on h100; bound by" in text and "efficiencies" in text
    assert "sent by a rank in 18 collectives: " in text
    assert explained(capsys, digits, tmp_path, "--device", "h10") == (
        2, "error: --device 'h10': did you mean 'h100'? known: cpu, cuda, a100, v100, h100, h200\n"
    )  # fmt: skip


def test_explain_takes_rates_from_a_file(capsys, digits, tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(ROW | {"kind": "cpu", "ranks": 1}))
    code, text = explained(capsys, digits, tmp_path, "--rates", file)
    assert code == 0 and "on made-up; bound by" in text and "by none" in text
    code, text = explained(capsys, digits, tmp_path, "--rates", file, "--device", "cuda")
    assert code == 2 and "has rates of a cpu" in text
    file.write_text(json.dumps(ROW | {"cores": 0}))
    code, text = explained(capsys, digits, tmp_path, "--rates", file)
    assert code == 2 and "cores = 0" in text
    code, text = explained(capsys, digits, tmp_path, "--rates", tmp_path / "no")
    assert code == 2 and "bench_rates.py --out FILE" in text
