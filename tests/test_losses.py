"""The losses for loops of one's own: against slow references, over ranks, and on wrong shapes."""

import math

import pytest
import torch
import torch.nn.functional as F

import ssl_dist
from ssl_dist import losses
from ssl_dist.methods import relational
from tests import ranks

NUM_IMAGES, DIM = 6, 5
LABELS = torch.tensor([0, 1, -1, 1, 1, -1])


def views(number, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, NUM_IMAGES, DIM, generator=generator, dtype=dtype)


def slow_nt_xent(z1, z2, temperature):
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    total = 0.0
    for i, row in enumerate(z):
        partner = (i + len(z1)) % len(z)
        terms = [(row @ other / temperature).exp() for k, other in enumerate(z) if k != i]
        total -= math.log((row @ z[partner] / temperature).exp() / sum(terms))
    return total / len(z)


def slow_vicreg(z1, z2):
    loss = 25 * ((z1 - z2) ** 2).mean()
    for z in (z1, z2):
        loss += 25 * torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        covariance = torch.cov(z.T)
        loss += sum(covariance[i, j] ** 2 for i in range(DIM) for j in range(DIM) if i != j) / DIM
    return loss


def wang_isola(z1, z2):
    """align_loss + uniform_loss with alpha = t = 2."""
    x, y = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    spread = [torch.pdist(z).pow(2).mul(-2).exp().mean().log() for z in (x, y)]
    return (x - y).norm(dim=1).pow(2).mean() + sum(spread) / 2


def slow_relational(z_KMD, head, labels=None):
    left, right, target = relational.relation_pairs(len(z_KMD), z_KMD.shape[1])
    if labels is not None:
        one, other = labels[left % NUM_IMAGES], labels[right % NUM_IMAGES]
        target = target.bool() | ((one == other) & (one >= 0))
    logits = head(z_KMD.flatten(0, 1), left, right)
    probability = torch.where(target > 0, logits.sigmoid(), 1 - logits.sigmoid())
    return (0.5 * (1 - probability) ** 2 * -probability.log()).mean()


def test_they_equal_slow_references():
    z1, z2 = views(2)
    assert losses.nt_xent(z1, z2, 0.2).item() == pytest.approx(slow_nt_xent(z1, z2, 0.2), rel=1e-12)
    torch.testing.assert_close(losses.vicreg(z1, z2), slow_vicreg(z1, z2))
    torch.testing.assert_close(losses.align_uniform(z1, z2, sim_coeff=DIM, scale=2), wang_isola(z1, z2))
    module = losses.Relational(DIM, hidden=7).double()
    for labels in (None, LABELS):
        torch.testing.assert_close(module(views(3), labels), slow_relational(views(3), module.head, labels))


def test_they_equal_lightlys():
    """Its NTXentLoss and VICRegLoss (e8d317fc) on these views, defaults but for the temperature."""
    z1, z2, _ = views(3)
    assert losses.nt_xent(z1, z2, 0.2).item() == pytest.approx(3.080122347967526, rel=1e-15)
    assert losses.vicreg(z1, z2).item() == pytest.approx(56.03621507428187, rel=1e-15)


def test_two_views_of_sfrik_are_mean_kernels():
    """psi(t) = t: the discrepancy is the squared mean embedding."""
    z = F.normalize(views(2), dim=-1)
    expected = 3 * (z[0] - z[1]).pow(2).mean() + 2 * z.mean(1).pow(2).sum(1).mean()
    torch.testing.assert_close(losses.sfrik(views(2), 3.0, 2.0, weights=(1.0,)), expected)


def test_relic_of_two_views():
    z1, z2 = views(2)
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T * 3
    answer = torch.arange(NUM_IMAGES)
    backward = (logits.T, logits)
    values = losses.relic(views(2), views(2), log_tau=math.log(3), options=losses.ReLIC().options)
    pairs = [F.cross_entropy(z, answer) for z in backward]
    kl = [F.kl_div(z.log_softmax(1), z.T.log_softmax(1), reduction="batchmean", log_target=True) for z in backward]
    alpha = losses.ReLIC().options.alpha
    torch.testing.assert_close(values, sum(pairs) / 2 + alpha * sum(kl) / 2)


@pytest.mark.parametrize(
    ("module", "number"),
    [
        (losses.NTXent(0.3), 2), (losses.VICReg(), 2), (losses.AlignUniform(), 2), (losses.SFRIK(), 3),
        (losses.ReLIC(), 2), (losses.Relational(DIM, 7), 3),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_modules_take_half_precision_and_have_gradients(module, number):
    z = views(number, dtype=torch.bfloat16).requires_grad_()
    arguments = z.unbind() if isinstance(module, losses.NTXent | losses.VICReg | losses.AlignUniform) else [z]
    loss = module(z, z.detach()) if isinstance(module, losses.ReLIC) else module(*arguments)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    loss.backward()
    assert z.grad.isfinite().all() and z.grad.any()


# ---------------------------------------------------------------------------------------------------- ranks

ALL = {  # of views and labels
    "nt_xent": lambda z, _: losses.nt_xent(z[0], z[1], 0.2),
    "vicreg": lambda z, _: losses.vicreg(z[0], z[1]),
    "align_uniform": lambda z, _: losses.align_uniform(z[0], z[1]),
    "sfrik": lambda z, _: losses.sfrik(z),
    "relic": lambda z, _: losses.relic(z[:2], z[:2].detach()),
    "relational": lambda z, _: losses.relational(z, head()),
    "labelled": lambda z, labels: losses.relational(z, head(), labels=labels),
}


def head():
    torch.manual_seed(0)
    return relational.RelationModule(DIM, 7, "cat").double()


def of_rank(rank, size):
    """Loss and gradient of this rank's images, by name."""
    values = {}
    for name, loss_of in ALL.items():
        own = slice(rank * NUM_IMAGES // size, (rank + 1) * NUM_IMAGES // size)
        z = views(3)[:, own].clone().requires_grad_()
        loss = loss_of(z, LABELS[own])
        loss.backward()
        values[name] = (loss.item(), z.grad.numpy())
    return values


def test_ranks_compute_the_loss_of_their_common_batch(tmp_path):
    """The mean over the ranks of losses and, as DistributedDataParallel takes it, of gradients."""
    [one] = ranks.run(of_rank, 1, tmp_path)
    both = ranks.run(of_rank, 2, tmp_path)
    for name, (loss, gradient) in one.items():
        assert sum(values[name][0] for values in both) / 2 == pytest.approx(loss, rel=1e-12), name
        gradients = [torch.tensor(values[name][1]) / 2 for values in both]
        torch.testing.assert_close(torch.cat(gradients, 1), torch.tensor(gradient), msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: losses.nt_xent(z[0], z[1][:2]), r"\[6, 5\] and \[2, 5\]: give each as \[B, D\], all of one shape"),
        (lambda z: losses.vicreg(z, z), r"\[3, 6, 5\] and \[3, 6, 5\]: give each as \[B, D\]"),
        (lambda z: losses.sfrik(z[:1]), r"\[1, 6, 5\]: give 2 or more"),
        (lambda z: losses.nt_xent(z[0, :1], z[1, :1]), "one image has no other"),
        (lambda z: losses.vicreg(z[0].long(), z[1].long()), "in floating point"),
        (lambda z: losses.sfrik(z, general=[3]), "there are 3 views, 0 to 2"),
        (lambda z: losses.relational(z, head(), labels=torch.zeros(5).long()), r"labels \[5\] are not those"),
        (lambda z: losses.relic(z[:2], z), r"targets \[3, 6, 5\] are not those of the first online views \[2, 6, 5\]"),
        (lambda z: losses.nt_xent(z[0], z[1], temperature=0.0), "temperature = 0.0: input should"),
        (lambda z: losses.nt_xent(z[0].numpy(), z[1].numpy()), "views are ndarray, ndarray: give tensors"),
        (lambda z: losses.nt_xent(None, None), "views are NoneType"),
        (lambda z: losses.sfrik(view for view in z), "views are generator"),
        (lambda z: losses.sfrik(z[0, 0, 0]), "views are "),
        (lambda z: losses.sfrik(z, general=0), "general = 0"),
        (lambda z: losses.sfrik(z[..., :1]), "2 dimensions or more"),
        (lambda z: losses.relational(z, head(), gamma="a"), "gamma = 'a'"),
        (lambda z: losses.relational(z, head(), labels=[0] * 6), "labels are list: give a tensor of whole numbers"),
    ],
)
def test_wrong_shapes_are_said(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(views(3))
    assert "\n" not in str(caught.value)


def test_one_argument_is_no_pair_of_views():
    with pytest.raises(TypeError):
        losses.nt_xent(torch.cat([*views(2)]))
    assert set(losses.__all__) <= set(dir(losses)) and ssl_dist.losses is losses
