"""ReLIC: losses against loops, the target network and its schedule, pairs of views, one batch on any grid of ranks."""

import copy
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_dist import config, methods
from ssl_dist.clock import Clock
from ssl_dist.distributed.world import one_process
from ssl_dist.errors import UserError
from ssl_dist.grid import Grid
from ssl_dist.methods import relic
from ssl_dist.methods.base import Batch, Info
from tests import grids, thread_world

LOSSES = ("softmax", "sigmoid")
COPY_STEPS = 2  # by default
CLOSE = {"rtol": 1e-10, "atol": 1e-13}


class Backbone(nn.Module):
    """The mean of every channel, Linear and, unless told otherwise, BatchNorm."""

    feature_dim = 6

    def __init__(self, batchnorm=True):
        super().__init__()
        self.linear = nn.Linear(3, self.feature_dim, bias=False)
        self.bn = nn.BatchNorm1d(self.feature_dim) if batchnorm else nn.Identity()

    def forward(self, x):
        return self.bn(self.linear(x.mean((2, 3))))


def make(groups=((2, 4), (3, 2)), batchnorm=True, batch_size=8, epochs=2.0, per_epoch=3, seed=0, **options):
    torch.manual_seed(seed)
    backbone = Backbone(batchnorm)
    info = Info(100, 0, groups, batch_size, epochs, backbone.feature_dim, steps_per_epoch=per_epoch)
    return relic.Method(backbone, info, relic.Options(hidden=7, dim=5, **options)).double().train()


def batch_of(groups, step=0):
    """views [V, B, 3, S, S] of every group."""
    ids, images = torch.arange(sum(map(len, groups))).split([len(g) for g in groups]), torch.arange(groups[0].shape[1])
    return Batch(list(groups), list(ids), images, torch.full_like(images, -1), images, step)


def draw(method, num_images=8, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(num, num_images, 3, s, s, dtype=torch.float64) for num, s in method.info.view_groups]


def apart(method):
    """As after some steps: the target is no copy any more."""
    with torch.no_grad():
        for tensor in (*method.target_backbone.parameters(), *method.target_head.parameters()):
            tensor.add_(0.3 * torch.randn_like(tensor))
        method.log_tau.add_(0.3)
    return method


# ---------------------------------------------------------------------------------------------------- losses


def softmax(values):
    top = max(values)
    exponentials = [math.exp(v - top) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def slow_terms(online, target, log_tau, bias, max_tau, kind):
    """Instance loss, invariance and share of images found, by loops over lists."""

    def unit(row):
        return [x / math.sqrt(sum(y * y for y in row)) for x in row]

    factor = min(math.exp(log_tau), max_tau)
    xs, ts = [unit(row) for row in online.tolist()], [unit(row) for row in target.tolist()]
    z = [[factor * sum(a * b for a, b in zip(x, t, strict=True)) + bias for t in ts] for x in xs]
    n, instance, invariance = len(z), 0.0, 0.0
    for i in range(n):
        p1, p2 = softmax(z[i]), softmax([z[j][i] for j in range(n)])
        invariance += sum(b * (math.log(b) - math.log(a)) for a, b in zip(p1, p2, strict=True)) / n
        if kind == "softmax":
            instance -= math.log(p1[i]) / n
        else:
            instance += sum(math.log1p(math.exp(-z[i][j] if i == j else z[i][j])) for j in range(n)) / n
    return instance, invariance, sum(z[i][i] == max(z[i]) for i in range(n)) / n


@settings(max_examples=40)
@given(st.sampled_from(LOSSES), st.integers(2, 7), st.floats(-1, 3), st.floats(-12, 3), st.integers(0, 99))
def test_the_terms_are_those_of_the_loops(kind, num_images, log_tau, bias, seed):
    torch.manual_seed(seed)
    online, target = torch.randn(2, num_images, 4, dtype=torch.float64)
    z = relic.logits(online, target, torch.tensor(log_tau).double(), torch.tensor(bias).double(), 5.0)
    log_tau, bias = torch.tensor(log_tau).item(), torch.tensor(bias).item()  # both rounded to float32
    instance, invariance, _ = slow_terms(online, target, log_tau, bias, 5.0, kind)
    assert relic.instance_loss(z, kind).item() == pytest.approx(instance, rel=1e-9, abs=1e-12)
    assert relic.invariance_loss(z).item() == pytest.approx(invariance, rel=1e-9, abs=1e-12)


def test_extreme_logits_are_finite():
    z = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], requires_grad=True)
    for z_MM in (z, z.flip(0)):
        for kind in LOSSES:
            loss = relic.instance_loss(z_MM, kind) + relic.invariance_loss(z_MM)
            loss.backward()
            assert loss.isfinite() and z.grad.isfinite().all()


def test_invariance_is_zero_for_symmetric_logits_and_moves_both_sides():
    z = torch.randn(5, 5, dtype=torch.float64)
    assert relic.invariance_loss(z + z.T).item() == pytest.approx(0, abs=1e-15)
    online, target = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    zero = torch.zeros((), dtype=torch.float64)
    relic.invariance_loss(relic.logits(online, target, zero, zero, 5.0)).backward()
    assert online.grad.abs().sum() > 0 and target.grad.abs().sum() > 0


def test_above_its_limit_the_factor_is_constant():
    rows = torch.randn(2, 5, 4, dtype=torch.float64)
    for log_tau, moves in ((math.log(4.9), True), (math.log(5.1), False)):
        log_tau = torch.tensor(log_tau, dtype=torch.float64, requires_grad=True)
        z = relic.logits(*rows, log_tau, torch.zeros(()), 5.0)
        relic.instance_loss(z, "softmax").backward()
        assert (log_tau.grad != 0) == moves
        assert z.abs().max() <= 5


@pytest.mark.parametrize(("kind", "expected"), [("softmax", 1.8996149213437485), ("sigmoid", 8.452546348367692)])
def test_the_older_version_of_the_authors(kind, expected):
    """Numbers of filipbasara0/relic at 125dde7: dot products, factor 1, bias 0, pairs that weigh 10 and 0.1, alpha
    1.5."""
    places = torch.arange(12.0, dtype=torch.float64)
    online, target = (places * 0.7).sin(), (places * 1.3 + 0.5).cos()
    zero = torch.zeros((), dtype=torch.float64)
    z = relic.logits(online.view(4, 3), target.view(4, 3), zero, zero, 5.0, "dot_product")
    invariance = relic.invariance_loss(z)
    loss = relic.instance_loss(z, kind, 10.0, 0.1) + 1.5 * invariance
    assert [float(loss), float(invariance)] == pytest.approx(
        [expected, 0.05456589606730099], rel=1e-8
    )  # its 0.1 is a float32


# ---------------------------------------------------------------------------------------------------- schedule


@settings(max_examples=60)
@given(st.integers(3, 2000), st.floats(0, 1))
def test_gamma_rises_from_its_base_to_one(total, base):
    values = [relic.gamma_of(step, total, base) for step in range(total + 2)]
    assert values[:COPY_STEPS] == [0.0] * COPY_STEPS
    averages = values[COPY_STEPS:]
    assert averages[0] == pytest.approx(base, abs=1e-6) and averages[-1] == pytest.approx(1, abs=1e-6)
    assert all(0 <= a <= b + 1e-6 and b <= 1 for a, b in pairwise(averages))
    for k in (0, total // 3, total):
        expected = 1 - (1 - base) * (math.cos(math.pi * k / total) + 1) / 2
        assert relic.cosine_gamma(k, total, base) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("copies", "every"), [(2, 1), (4, 3), (1, 2)])
def test_averages_after_some_steps_and_every_so_many(copies, every):
    """The authors' loop: from its flag update_gamma_after_step on, every update_gamma_every_n_steps steps."""
    total, base, after = 40, 0.9, copies - 1
    gamma, expected = base, []
    for step in range(total):
        expected.append(1.0)
        if step > after and step % every == 0:
            expected[-1] = gamma
            gamma = relic.cosine_gamma(step, total, base)
        if step <= after:
            expected[-1] = 0.0
    ours = [relic.gamma_of(step, total, base, copies, every) for step in range(total)]
    assert ours == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "total"), [(2.0, 3, 11), (1.0, 3, 8), (100.0, 195, 19889), (0.5, 4, 9)]
)
def test_the_schedule_would_end_two_epochs_after_the_training(epochs, per_epoch, total):
    assert make(epochs=epochs, per_epoch=per_epoch).total == total


# ---------------------------------------------------------------------------------------------------- target network


def networks(method):
    for name, target in (("backbone", method.target_backbone), ("head", method.target_head)):
        online = getattr(method, name)
        for key, value in target.state_dict().items():
            yield f"{name}.{key}", value.clone(), online.state_dict()[key].clone()


def after_a_step(method, steps_done):
    """One pass and step of SGD, then what the method does after it."""
    output = method(batch_of(draw(method, seed=steps_done), steps_done), one_process())
    trained = [p for p in method.parameters() if p.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(output.loss, trained), strict=True):
        parameter.data.sub_(0.1 * gradient)
    before = list(networks(method))
    method.after_step(Clock(steps_done + 1, 3, 6))
    return before, output


def test_the_target_is_a_copy_and_then_an_average():
    method = make(gamma=0.75)
    for step in range(5):
        before, output = after_a_step(method, step)
        gamma = relic.gamma_of(step, method.total, 0.75)
        assert output.metrics["gamma"] == gamma and (gamma == 0) == (step < 2)
        for (name, target, online), (_, now, _) in zip(before, networks(method), strict=True):
            assert not torch.equal(target, online), f"{name}: nothing to see"
            if step < 2:
                expected = online
            else:
                expected = gamma * target + (1 - gamma) * online if target.is_floating_point() else target
            torch.testing.assert_close(now, expected, rtol=1e-12, atol=0 if step < 2 else 1e-15, msg=f"{step} {name}")


def test_a_temperature_that_is_not_learnt():
    method = apart(make(learn_temperature=False))
    method(batch_of(draw(method)), one_process()).loss.backward()
    assert {name for name, p in method.named_parameters() if not p.requires_grad} >= {"log_tau", "bias"}


def test_averages_every_so_many_steps_leave_the_target_alone_between():
    method = make(gamma=0.75, copy_steps=1, average_every=2)
    for step in range(5):
        before, _ = after_a_step(method, step)
        stays = all(torch.equal(now, was) for (_, was, _), (_, now, _) in zip(before, networks(method), strict=True))
        assert stays == (step % 2 == 1)


def test_the_target_takes_part_in_training_mode_and_without_gradient():
    method = apart(make())
    mean = method.target_backbone.bn.running_mean.clone()
    method(batch_of(draw(method)), one_process()).loss.backward()
    without = {name for name, p in method.named_parameters() if p.grad is None}
    assert without == {name for name, _ in method.named_parameters() if name.startswith("target_")}
    assert not any(p.requires_grad for name, p in method.named_parameters() if name in without)
    assert not torch.equal(method.target_backbone.bn.running_mean, mean)
    assert method.target_backbone.bn.num_batches_tracked == 2, "the global views only"
    assert method.encoder() is method.target_backbone


def test_state_is_all_there_is():
    """A method that gets another's state goes on as that one."""
    one, other = make(seed=0), make(seed=1)
    for step in range(4):
        after_a_step(one, step)
    other.load_state_dict(one.state_dict())
    for step in range(4, 6):
        after_a_step(one, step), after_a_step(other, step)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


# ---------------------------------------------------------------------------------------------------- pairs


def slow_loss(method, views):
    """Every view passes alone; every pair by the loops. The official list of online views is written out here."""
    global_views, local_views = list(views[0]), [view for group in views[1:] for view in group]
    online = global_views + local_views
    if method.options.pairing == "official":
        online = global_views + (global_views + local_views)
    method = copy.deepcopy(method)
    with torch.no_grad():
        z_online = [method.head(method.backbone(view)) for view in online]
        z_target = [method.target_head(method.target_backbone(view)) for view in global_views]
    arguments = (method.log_tau.item(), method.bias.item(), method.max_tau, method.options.loss)
    terms = [
        slow_terms(z_online[v], z_target[g], *arguments)
        for g in range(len(global_views))
        for v in range(len(online))
        if v != g
    ]
    instance, invariance, accuracy = (sum(column) / len(terms) for column in zip(*terms, strict=True))
    return instance, invariance, 100 * accuracy, method


@pytest.mark.parametrize("groups", [((2, 4),), ((2, 4), (3, 2)), ((3, 4), (1, 2))], ids=str)
@pytest.mark.parametrize("pairing", ["distinct", "official"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_method_is_the_loop_over_pairs_of_views(loss, pairing, groups):
    method = apart(make(groups, loss=loss, pairing=pairing, alpha=0.7))
    views = draw(method)
    instance, invariance, accuracy, passed = slow_loss(method, views)
    output = method(batch_of(views), one_process())
    assert output.loss.item() == pytest.approx(instance + 0.7 * invariance, rel=1e-9)
    assert output.metrics["instance"].item() == pytest.approx(instance, rel=1e-9)
    assert output.metrics["invariance"].item() == pytest.approx(invariance, rel=1e-9)
    assert output.metrics["accuracy"].item() == pytest.approx(accuracy)
    assert output.metrics["temperature"].item() == pytest.approx(min(math.exp(method.log_tau.item()), method.max_tau))
    num_global, num_views = groups[0][0], sum(num for num, _ in groups)
    assert output.representations.shape[0] == num_views + (num_global if pairing == "official" else 0)
    for name, value in passed.named_buffers():
        torch.testing.assert_close(dict(method.named_buffers())[name], value, **CLOSE)


def test_distinct_views_each_count_once_and_official_ones_do_not():
    """The stated deviation: the authors' local views are the global ones again: a view is compared with itself."""
    counts = {}
    for pairing in ("distinct", "official"):
        method = make(((2, 4), (2, 2)), batchnorm=False, pairing=pairing)
        views = draw(method)
        calls = []
        method.backbone.register_forward_hook(lambda _m, inputs, _o, calls=calls: calls.append(inputs[0]))
        method(batch_of(views), one_process())
        everything = [view for group in views for view in group]
        counts[pairing] = [
            sum(torch.equal(call, view) for call in calls if call.shape == view.shape) for view in everything
        ]
    assert counts == {"distinct": [1, 1, 1, 1], "official": [2, 2, 1, 1]}


# ---------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("pairing", ["distinct", "official"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("grid", [Grid(1, 2), Grid(2, 1), Grid(2, 2), Grid(4, 1)], ids=str)
def test_any_grid_of_ranks_equals_one(grid, loss, pairing):
    """BatchNorm where all views of an image are on one rank; on other grids `ssl-dist verify` has it."""
    method = apart(make(((2, 4), (2, 2)), batchnorm=grid.views == 1, loss=loss, pairing=pairing))
    views = draw(method)
    alone = copy.deepcopy(method)
    expected = alone(batch_of(views), one_process())
    expected.loss.backward()
    batch = batch_of(views)

    def rank(world):
        own = world.synchronize_batchnorm(copy.deepcopy(method)).train()
        of_views, of_images = (f(world.rank_info.rank, n) for f, n in ((grid.view_range, 2), (grid.image_range, 8)))
        view, image = slice(of_views.start, of_views.stop), slice(of_images.start, of_images.stop)
        part = Batch(
            [group[view, image] for group in batch.views], [ids[view] for ids in batch.view_ids],
            batch.image_ids[image], batch.labels[image], batch.positions[image],
        )  # fmt: skip
        output = own(part, world)
        output.loss.backward()
        return own, output

    methods_of_ranks, outputs = zip(*thread_world.run(rank, grid), strict=True)
    mean = torch.stack([output.loss.detach() for output in outputs]).mean()
    torch.testing.assert_close(mean, expected.loss.detach(), **CLOSE)
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            gradient = torch.stack([own.get_parameter(name).grad for own in methods_of_ranks]).mean(0)  # as DDP does
            torch.testing.assert_close(
                gradient, parameter.grad, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n} {m}"
            )
    for output in outputs:
        for name, value in expected.metrics.items():
            torch.testing.assert_close(torch.as_tensor(output.metrics[name]), torch.as_tensor(value), **CLOSE)


def test_without_a_use_the_bias_stays_where_it_is():
    method = make(bias=0.25).float()
    adam = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 1e-2)
    for step in range(3):
        views = [view.float() for view in draw(method, seed=step)]
        method(batch_of(views, step), one_process()).loss.backward()
        adam.step()
    assert method.bias.item() == 0.25 and method.bias.grad == 0


def test_half_precision_is_compared_in_float32():
    method = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = method(batch_of([view.float() for view in draw(method)]), one_process())
    assert output.loss.dtype == output.representations.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns_what_views_share(loss):
    """Views of an image share two channels; the third, the largest, is noise of each view's own."""
    method, accuracies = make(loss=loss, gamma=0.9), []
    adam = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 2e-2)
    for step in range(150):
        torch.manual_seed(step)
        image = torch.randn(1, 8, 3, 1, 1) * torch.tensor([1, 1, 0])[:, None, None]
        noise = [torch.randn(num, 8, 3, 1, 1) * torch.tensor([0.05, 0.05, 2])[:, None, None] for num in (2, 3)]
        views = [(image + own).double() for own in noise]
        adam.zero_grad()
        output = method(batch_of(views, step), one_process())
        output.loss.backward()
        adam.step()
        method.after_step(Clock(step + 1, 3, 150))
        accuracies.append(float(output.metrics["accuracy"]))
    assert sum(accuracies[-10:]) / 10 > 75 and sum(accuracies[:3]) / 3 < 60


# ---------------------------------------------------------------------------------------------------- configs

ROWS = [path for path in sorted(Path("configs").rglob("relic-*.yaml")) if re.search(r"resnet(?!.*2views)", path.name)]
OLDER = sorted(Path("configs").rglob("relic-*-2views.yaml"))


@pytest.mark.parametrize("path", ROWS, ids=str)
def test_the_configs_views_are_those_of_the_authors(path):
    """Local views of 3/7 of the side; the blur's kernel by the full side; only global views are solarized."""
    settings = config.load(path)
    size, (global_views, local_views) = settings.data.image_size, settings.views.groups
    assert (global_views.num, local_views.num) == (2, 4) and global_views.size is None
    assert local_views.size == int(size * 3 / 7) == {32: 13, 64: 27, 96: 41, 192: 82}[size]
    kernel = {32: 3, 64: 7, 96: 9, 192: 19}[size]
    for group in (global_views, local_views):
        assert group.gaussian_blur.kernel == kernel and group.gaussian_blur.p == 1
    assert global_views.solarize.threshold == 127 and local_views.solarize is None
    assert settings.views.normalize == "none"


# ---------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"views\.groups.*3 groups"):
        make(((2, 4), (2, 2), (2, 2)))
    with pytest.raises(UserError, match=r"groups\[0\]\.num = 1.*give 2"):
        make(((1, 4), (2, 2)))
    with pytest.raises(UserError, match=r"optim\.batch_size = 1"):
        make(batch_size=1)
    for options, word in (({"loss": "siglip"}, "'sigmoid'"), ({"gamma": 1.5}, "gamma"), ({"max_tau": 0.0}, "max_tau")):
        with pytest.raises(UserError) as caught:
            methods.build_options(relic.Method, options)
        assert word in str(caught.value) and "\n" not in str(caught.value)


def test_options_have_the_papers_defaults():
    options = methods.build_options(methods.find("relic"), {})
    assert (options.loss, options.alpha, options.gamma, options.pairing) == ("softmax", 1.0, 0.995, "distinct")
    assert (options.hidden, options.dim) == (512, 64)
    for loss, factor, limit, bias in (("softmax", 1, 5, 0), ("sigmoid", 10, 15, -10)):
        method = make(loss=loss)
        assert method.log_tau.exp().item() == pytest.approx(factor)
        assert (method.max_tau, method.bias.item()) == (limit, bias)
    method = make(loss="sigmoid", bias=0.0, log_tau=0.0, max_tau=2.0)
    assert (method.log_tau.item(), method.max_tau, method.bias.item()) == (0, 2, 0)
    assert "invariance" in " ".join(grids.explained(relic, 6, 256).values())


@pytest.mark.parametrize("path", OLDER, ids=str)
def test_configs_of_the_older_version(path):
    """Views of aug.py and values of run_training.py at 125dde7; the README there gives gamma and alpha for CIFAR-10."""
    settings = config.load(path)
    [group] = settings.views.groups
    assert group.num == 2 and group.random_resized_crop.scale == (0.08, 1.0)
    assert (group.solarize.p, group.solarize.threshold) == (0.5, 127)
    assert group.gaussian_blur.kernel == int(settings.data.image_size * 0.1) // 2 * 2 + 1
    options = methods.build_options(relic.Method, settings.method.options)
    assert (options.similarity, options.learn_temperature) == ("dot_product", False)
    assert (options.gamma, options.alpha) == ((0.99, 1.0) if settings.data.name == "cifar10" else (0.996, 1.5))
