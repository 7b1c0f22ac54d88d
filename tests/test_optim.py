import json
import math

import pytest
import torch
from torch import nn

from ssl_dist import backbones, config
from ssl_dist.clock import Clock
from ssl_dist.config import Optim, validate
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.signals import StopRequest
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.run.blueprint import derive
from ssl_dist.storage import checkpoint
from ssl_dist.train import optim
from ssl_dist.train.loop import claimed, fit
from ssl_dist.train.state import TrainState

CPU = torch.device("cpu")


def rates(options, total=100, per_epoch=10):
    return [optim.lr(options, Clock(step, per_epoch, total)) for step in range(total)]


def test_constant():
    assert set(rates(Optim(lr=0.5))) == {0.5}


def test_warmup_then_cosine_to_zero():
    values = rates(Optim(lr=1.0, warmup_epochs=2.0, schedule="cosine"))
    assert values[:20] == pytest.approx([s / 20 for s in range(20)])
    assert values[20] == 1.0
    assert values[60] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 79 / 80)))


def test_step_falls_at_the_milestones():
    values = rates(Optim(lr=1.0, schedule="step"))
    assert values[49] == 1.0 and values[50] == pytest.approx(0.1) and values[75] == pytest.approx(0.01)


def test_step_may_fall_after_epochs():
    values = rates(Optim(lr=1.0, schedule="step", milestone_epochs=[2, 3.5]))
    assert values[19] == 1.0 and values[20] == pytest.approx(0.1)
    assert values[34] == pytest.approx(0.1) and values[35] == pytest.approx(0.01)


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.55, 0.56, 0.57])  # 100 times these is above the whole number
def test_a_milestone_is_not_late_for_rounding(share):
    values = rates(Optim(lr=1.0, schedule="step", milestones=[share]))
    assert values.count(1.0) == round(100 * share)


def test_cosine_ends_at_its_share():
    values = rates(Optim(lr=2.0, schedule="cosine", lr_final=0.25), total=10**6, per_epoch=10)
    assert values[0] == 2.0 and values[-1] == pytest.approx(0.5, abs=1e-9)


def test_the_rate_is_scaled_by_the_batch():
    assert set(rates(Optim(lr=0.5, lr_batch=256, batch_size=2048))) == {4.0}
    warm = rates(Optim(lr=0.5, lr_batch=256, batch_size=64, warmup_epochs=2.0, schedule="step", milestones=[0.5]))
    assert warm[10] == pytest.approx(0.0625) and warm[20] == 0.125 and warm[50] == pytest.approx(0.0125)


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD"), ("lars", "LARS")])
def test_build(name, kind):
    layer = nn.Linear(2, 2)
    optimizer = optim.build(Optim(name=name, lr=0.25, weight_decay=0.5), [{"params": list(layer.parameters())}], CPU)
    assert type(optimizer).__name__ == kind and optimizer.param_groups[0]["weight_decay"] == 0.5
    optim.set_lr(optimizer, 0.125)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_reset_state_forgets_only_what_was_redrawn():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = optim.build(Optim(), [{"params": [a, b]}], CPU)
    (a.sum() + b.sum()).backward()
    optimizer.step()
    optim.reset_state(optimizer, [a])
    assert a not in optimizer.state and b in optimizer.state
    optimizer.step()


def reference_lars(p, gradients, lr, decay, momentum, adapt):
    """The update written out for one tensor of plain numbers."""
    p, m = list(p), [0.0] * len(p)
    for gradient in gradients:
        g = [g + decay * x for g, x in zip(gradient, p, strict=True)]
        p_norm, g_norm = (math.sqrt(sum(x * x for x in v)) for v in (p, g))
        factor = 0.001 * p_norm / g_norm if adapt and p_norm and g_norm else 1.0
        m = [momentum * old + factor * new for old, new in zip(m, g, strict=True)]
        p = [x - lr * step for x, step in zip(p, m, strict=True)]
    return p


@pytest.mark.parametrize("start", [[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]])
def test_lars_is_what_its_docstring_says(start):
    weight = nn.Parameter(torch.tensor(start, dtype=torch.float64).view(2, 2))
    bias = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = optim.build(
        Optim(name="lars", lr=0.5, weight_decay=0.1, momentum=0.8), [{"params": [bias, weight]}], CPU
    )
    gradients = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients[1] = 0
    for gradient in gradients:
        weight.grad, bias.grad = gradient.view(2, 2).clone(), gradient.clone()
        optimizer.step()
    expected = reference_lars(start, gradients.tolist(), 0.5, 0.1, 0.8, adapt=True)
    assert weight.detach().flatten().tolist() == pytest.approx(expected, rel=1e-12)
    expected = reference_lars(start, gradients.tolist(), 0.5, 0.0, 0.8, adapt=False)
    assert bias.detach().tolist() == pytest.approx(expected, rel=1e-12)


def test_lars_leaves_scalars_as_it_leaves_biases():
    """A learnt temperature has no direction whose length could be compared, and must not decay towards 1."""
    scalar, weight = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(2, 2))
    optimizer = optim.build(Optim(name="lars", lr=0.5, weight_decay=0.1), [{"params": [scalar, weight]}], CPU)
    scalar.grad, weight.grad = torch.tensor(3.0), torch.ones(2, 2)
    optimizer.step()
    assert scalar.item() == 2.0 - 0.5 * 3.0


@pytest.mark.parametrize("name", ["adam", "sgd", "lars"])
def test_a_gradient_that_overflows_changes_nothing_but_the_scale(name):
    """In fp16; the steps around it are those of an optimizer that never saw it."""

    def steps(gradients):
        p = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
        optimizer, scaler = optim.build(Optim(name=name, lr=0.5), [{"params": [p]}], CPU), optim.LossScaler("cpu")
        for gradient in gradients:
            optimizer.zero_grad()
            scaler.scale((p * gradient).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return p.detach(), scaler.state()

    (p, state), (expected, _) = steps([1.0, math.inf, 0.25]), steps([1.0, 0.25])
    assert torch.equal(p, expected) and state == {"scale": 2.0**15, "growth_tracker": 1}


def test_lars_resumes_exactly():
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        return net, optim.build(Optim(name="lars", lr=0.5, weight_decay=0.1), [{"params": list(net.parameters())}], CPU)

    def step(net, optimizer, seed):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    whole, first, second = make(), make(), make()
    for seed in range(4):
        step(*whole, seed)
    for seed in range(2):
        step(*first, seed)
    second[0].load_state_dict(first[0].state_dict())
    state = first[1].state_dict()
    assert all(isinstance(v, torch.Tensor) for entry in state["state"].values() for v in entry.values())
    second[1].load_state_dict(state)
    for seed in range(2, 4):
        step(*second, seed)
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name]), name


def test_a_rate_of_biases_is_of_lars_alone():
    with pytest.raises(UserError, match=r"bias_lr: of lars alone, not of adam; set it to null"):
        validate(Optim, {"bias_lr": 0.1})
    optimizer = optim.build(
        Optim(name="lars", lr=0.2, bias_lr=0.05), [{"params": [*nn.Linear(3, 2).parameters()]}], CPU
    )
    optim.set_lr(optimizer, 0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]


# ---------------------------------------------------------------------------------------------------- of transformers


def test_weight_decay_follows_half_a_cosine():
    options = Optim(weight_decay=0.04, weight_decay_final=0.4)
    decays = [optim.weight_decay(options, Clock(step, 10, 100)) for step in range(101)]
    assert decays[0] == pytest.approx(0.04) and decays[50] == pytest.approx(0.22) and decays[100] == pytest.approx(0.4)
    assert decays[25] == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2)
    assert optim.weight_decay(Optim(weight_decay=0.04), Clock(50, 10, 100)) == 0.04


def network():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_vectors_decay_unless_told(name):
    net = network()
    for decay_vectors in (True, False):
        options = Optim(name=name, weight_decay=0.5, weight_decay_final=1.0, decay_vectors=decay_vectors)
        optimizer = optim.build(options, [{"params": list(net.parameters())}], CPU)
        optim.set_rates(optimizer, options, Clock(50, 10, 100))
        decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        of_vectors = 0.75 if decay_vectors and name != "lars" else 0.0
        assert len(decays) == 4  # every parameter in one group
        assert [decays[p] for p in net.parameters()] == pytest.approx([0.75, of_vectors, of_vectors, of_vectors])


def test_blocks_learn_more_slowly_the_deeper_they_lie():
    pytest.importorskip("timm")
    backbone = backbones.build("timm/vit_tiny_patch16_224", image_size=32)
    head = nn.Linear(192, 3)
    options = Optim(name="adamw", lr=0.5, layer_decay=0.75, decay_vectors=False)
    groups = [{"params": [*backbone.parameters(), *head.parameters()]}]
    optimizer = optim.build(options, groups, CPU, backbone)
    optim.set_rates(optimizer, options, Clock(0, 10, 100))
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len([*backbone.parameters(), *head.parameters()])
    # the official fine-tuning of MAE, util/lr_decay.py: 12 blocks, so 13 layers below the head
    for name, p in backbone.named_parameters():
        part = name.removeprefix("model.").split(".")
        depth = 0 if part[0] in ("cls_token", "pos_embed", "patch_embed") else 13
        depth = int(part[1]) + 1 if part[0] == "blocks" else depth
        assert rates[p] == pytest.approx(0.5 * 0.75 ** (13 - depth)), name
    assert rates[head.weight] == rates[head.bias] == 0.5


def test_clipping_is_torchs():
    options = Optim(clip_norm=0.7)
    for scale in (0.01, 100.0):
        ours, theirs = network(), network()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p) * scale
            q.grad = p.grad.clone()
        optimizer = optim.build(options, [{"params": list(ours.parameters())}], CPU)
        norm = optim.clip(optimizer, options)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.7))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert optim.clip(optimizer, Optim()) is None


def test_each_tensor_is_clipped_by_itself():
    long, short, without = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    long.grad, short.grad = torch.tensor([3.0, 0.0, 4.0]), torch.full((2, 2), 0.25)
    options = Optim(clip_norm=1.0, clip_of="each_tensor")
    norm = optim.clip(optim.build(options, [{"params": [long, short, without]}], CPU), options)
    assert norm.item() == pytest.approx(math.sqrt(25 + 0.25)) and without.grad is None
    assert long.grad.tolist() == pytest.approx([0.6, 0.0, 0.8], rel=1e-5) and torch.all(short.grad == 0.25)


def test_betas_reach_adam():
    for name in ("adam", "adamw"):
        optimizer = optim.build(
            validate(Optim, {"name": name, "betas": [0.9, 0.95]}), [{"params": [nn.Parameter(torch.ones(2))]}], CPU
        )
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "sgd", "betas": [0.9, 0.95]}, "betas: of adam and adamw, not of sgd; leave them out"),
        ({"clip_of": "each_tensor"}, "clip_of: each_tensor has no clip_norm; give one"),
        ({"betas": [0.9, 1.0]}, "betas.1 = 1.0"),
        ({"layer_decay": 0.0}, "layer_decay = 0.0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(UserError) as caught:
        validate(Optim, given, "optim.")
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------------- in a training


def trained(digits, folder, name, *overrides):
    """The method before and after three steps of its digits config, and the lines of the log."""
    settings = config.load(
        f"configs/digits/{name}-conv4.yaml",
        [
            f"data.root={digits}", f"run_dir={folder}", "data.limit=72", "data.reader=arrays", "data.workers=1",
            "optim.batch_size=16", "optim.epochs=null", "optim.steps=3", "optim.warmup_epochs=0", "log.every_steps=1",
            *overrides,
        ],
    )  # fmt: skip
    plan = derive(settings, RankInfo())
    code, run = train_in_one_process(plan)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert code == 0
    return dict(plan.build().named_parameters()), dict(run.method.named_parameters()), lines


def train_in_one_process(plan):
    world = one_process()
    with claimed(plan, world):
        run = TrainState(plan, world)
        return fit(run, StopRequest()), run


def test_what_is_frozen_does_not_move(digits, tmp_path):
    """Not by weight decay either; epochs have four steps."""
    for epochs in (1, 0.5):
        options = f"method.options.freeze_last_layer_epochs={epochs}"
        before, after, _ = trained(digits, tmp_path / str(epochs), "dino", options, "optim.weight_decay=0.5")
        assert torch.equal(before["head.direction"], after["head.direction"]) is (epochs == 1)
        assert not torch.equal(before["head.mlp.0.weight"], after["head.mlp.0.weight"])


def test_a_step_is_as_long_as_its_clipped_gradient(digits, tmp_path):
    """SGD without momentum, in three steps of rate 2: no farther than 3 times 2 times the norm that is left."""
    words = "optim.name=sgd", "optim.momentum=0", "optim.lr=2", "optim.clip_norm=1e-3", "precision=fp64"
    before, after, lines = trained(digits, tmp_path / "run", "simclr", *words)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item()
    assert 1e-3 < moved <= 6e-3 * (1 + 1e-9)
    assert all(line["grad_norm"] > 1e-2 for line in lines), "before it is clipped"


def test_weight_decay_and_rates_by_depth_reach_the_optimizer(digits, tmp_path):
    words = "optim.name=adamw", "optim.weight_decay=0.1", "optim.weight_decay_final=0.3", "optim.layer_decay=0.5"
    *_, lines = trained(digits, tmp_path / "run", "simclr", *words)
    assert [line["lr"] for line in lines] == [1e-3] * 3, "that of parameters without a factor of their own"
    groups = checkpoint.load(checkpoint.newest(tmp_path / "run"))["optimizer"]["param_groups"]
    rates = sorted({group["lr"] for group in groups})
    assert rates[-1] == 1e-3 and rates[-2] == 5e-4 and len(rates) > 2
    last = 0.3 + (0.1 - 0.3) * 0.5 * (1 + math.cos(math.pi * 2 / 3))
    assert [group["weight_decay"] for group in groups] == pytest.approx([last] * len(groups))
