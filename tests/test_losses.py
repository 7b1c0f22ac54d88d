"""The losses for loops of one's own: against slow references, over ranks, and on wrong shapes."""

import math

import pytest
import torch
import torch.nn.functional as F

import ssl_dist
from ssl_dist import losses
from ssl_dist.methods import lejepa, relational
from tests import ranks

NUM_IMAGES, DIM = 6, 5
LABELS = torch.tensor([0, 1, -1, 1, 1, -1])
MAPS = torch.randn(NUM_IMAGES, 4, 18, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


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


def test_they_equal_those_of_other_libraries():
    """Of lightly 1.6.0 and, the first two, of pytorch-metric-learning 2.9.0 on these views, defaults but for the
    temperature."""
    z1, z2, _ = views(3)
    assert losses.nt_xent(z1, z2, 0.2).item() == pytest.approx(3.080122347967526, rel=1e-15)
    assert losses.vicreg(z1, z2).item() == pytest.approx(56.03621507428187, rel=1e-15)
    assert losses.barlow_twins(z1, z2, 0.0051).item() == pytest.approx(2.0576938074640996, rel=1e-15)
    assert losses.simsiam([z1, z2], [z1, z2]).item() == pytest.approx(-0.23905918461328302, rel=1e-15)


def slow_decoupled(z1, z2, temperature, sigma=None):
    """The other views of other images alone are the rivals; with sigma, partners that are less alike weigh more."""
    z = [[row / row.norm() for row in view] for view in (z1, z2)]
    likeness = [(a @ b / (sigma or 1)).exp() for a, b in zip(*z, strict=True)]
    total = 0.0
    for i in range(NUM_IMAGES):
        weight = 2 - NUM_IMAGES * likeness[i] / sum(likeness) if sigma else 1
        for v in range(2):
            rivals = sum((z[v][i] @ z[w][j] / temperature).exp() for w in range(2) for j in range(NUM_IMAGES) if j != i)
            total += math.log(rivals) - weight * z[0][i] @ z[1][i] / temperature
    return float(total / (2 * NUM_IMAGES))


def test_decoupled_losses():
    z1, z2 = views(2)
    assert losses.dcl(z1, z2, 0.2).item() == pytest.approx(slow_decoupled(z1, z2, 0.2), rel=1e-12)
    weighted = losses.dcl(z1, z2, 0.2, sigma=0.3)
    assert weighted.item() == pytest.approx(slow_decoupled(z1, z2, 0.2, 0.3), rel=1e-12)


def test_dino_pair_by_pair():
    z, center = views(3), torch.linspace(-1, 1, DIM).double()
    q = ((z[:2] - center) / 0.2).softmax(-1)
    pairs = [(g, v) for g in range(2) for v in range(3) if g != v]
    log_p = (z / 0.5).log_softmax(-1)
    expected = sum(-(q[g] * log_p[v]).sum(-1).mean() for g, v in pairs) / len(pairs)
    torch.testing.assert_close(losses.dino(z, z[:2], center, 0.5, 0.2), expected)
    mean = torch.stack([row for view in z[:2] for row in view]).mean(0)
    torch.testing.assert_close(losses.dino_center(z[:2], center, 0.9), 0.9 * center + 0.1 * mean)


def slow_sigreg(z_KMD, step, seed, slices, knots, t_max):
    """As of the paper's algorithm 1: complex numbers and a trapezoidal rule over all knots."""
    t = torch.linspace(-t_max, t_max, knots, dtype=torch.float64)
    normal = torch.exp(-t.square() / 2)
    directions = torch.from_numpy(lejepa.drawn_slices(seed, step, DIM, 0, slices))
    statistics = []
    for z_MD in z_KMD:
        for direction in directions:
            empirical = torch.exp(1j * (z_MD @ direction)[:, None] * t).mean(0)
            statistics.append(NUM_IMAGES * torch.trapezoid((empirical - normal).abs().square() * normal, t))
    return torch.stack(statistics).mean()


def test_lejepa_is_a_distance_and_sigreg():
    z = views(3)
    sigreg = slow_sigreg(z, 4, 9, 20, 17, 3.0)
    torch.testing.assert_close(losses.sigreg(z, 4, 9, 20, t_max=3.0), sigreg)
    for chosen, centre in ((None, z.mean(0)), ([0, 2], (z[0] + z[2]) / 2)):
        expected = 0.9 * (z - centre).square().mean() + 0.1 * sigreg
        ours = losses.lejepa(z, 4, 9, lambd=0.1, slices=20, t_max=3.0, global_views=chosen)
        torch.testing.assert_close(ours, expected)
    assert losses.sigreg([z[0]], 4).item() == pytest.approx(losses.sigreg(z[:1], 4).item(), rel=1e-12)
    assert losses.sigreg(z, 4) != losses.sigreg(z, 5)


def squares(z_BD):
    """Images of one patch of 2 x 2 pixels [B, 1, 2, 2]."""
    return z_BD[:, None, :4].unflatten(2, (2, 2)).detach()


def test_mae_of_patches_of_one_channel():
    z = views(2)
    error = (z[0, :, :4] - z[1, :, :4]).square().mean(1)
    hidden = torch.tensor([1, 0, 1, 1, 0, 0])[:, None] > 0
    ours = losses.mae(z[0][:, None, :4], squares(z[1]), hidden, 2, norm_pix_loss=False)
    torch.testing.assert_close(ours, error[[0, 2, 3]].mean())


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


def slow_infomax(module, y, maps, drawn):
    """Pairs one by one: place by place of the map, and as a whole."""
    local = other = 0.0
    for b in range(len(y)):
        for place in maps[b].flatten(1).T:
            for sign, feature in ((-1, y[b]), (1, y[b - 1])):
                hidden = torch.cat([place, feature])
                for layer in (module.local_net.l0, module.local_net.l1):
                    hidden = layer(hidden).relu()
                local += F.softplus(sign * module.local_net.l2(hidden))
        of_map = module.global_net.c1(module.global_net.c0(maps[b : b + 1]).relu())
        for sign, feature in ((-1, y[b]), (1, y[b - 1])):
            hidden = torch.cat([feature, module.global_net.pool(of_map).flatten()])
            for layer in (module.global_net.l0, module.global_net.l1):
                hidden = layer(hidden).relu()
            other += F.softplus(sign * module.global_net.l2(hidden))
    prior = -(module.prior_net(drawn).sigmoid().log() + (1 - module.prior_net(y).sigmoid()).log()).mean()
    return 0.5 * other / len(y) + local / maps[:, 0].numel() + 0.1 * prior


def infomax():
    torch.manual_seed(0)
    return losses.DeepInfoMax(DIM, 4, alpha=0.5, hidden=7).double()


def test_infomax_of_maps():
    y, drawn = views(2)
    torch.testing.assert_close(infomax()(y, MAPS, drawn), slow_infomax(infomax(), y, MAPS, drawn)[0])


def test_deepcluster_is_as_if_clusters_were_drawn_equally_often():
    logits, labels, sizes = views(1)[0], LABELS.clamp(min=0), torch.tensor([6, 1, 0, 1, 2])
    weights = [1 - sizes[label] / 10 for label in labels]
    per_image = [-F.log_softmax(row, 0)[label] for row, label in zip(logits, labels, strict=True)]
    expected = sum(w * loss for w, loss in zip(weights, per_image, strict=True)) / sum(weights)
    torch.testing.assert_close(losses.deepcluster(logits, labels, sizes), expected)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(losses.deepcluster(logits, labels, torch.full((DIM,), 9)), expected)


def test_sela_gives_labels_of_equal_size_and_learns_them():
    scores = views(1, seed=3)[0].repeat(10, 1)[:, :3] + torch.tensor([5.0, 0.0, -5.0])  # by argmax nearly all are 0
    before = scores.clone()
    labels = losses.sela_labels(scores, tolerance=1e-3)
    assert torch.equal(scores, before) and labels.bincount(minlength=3).tolist() == [20, 20, 20]
    two = torch.stack([scores, -scores])
    expected = (F.cross_entropy(scores, labels) + F.cross_entropy(-scores, labels.flip(0))) / 2
    torch.testing.assert_close(losses.sela(two, torch.stack([labels, labels.flip(0)])), expected)
    torch.testing.assert_close(losses.sela([scores], [labels]), F.cross_entropy(scores, labels))


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
    "barlow_twins": lambda z, _: losses.barlow_twins(z[0], z[1]),
    "byol": lambda z, _: losses.byol(z[:2], z[1:]),
    "simsiam": lambda z, _: losses.simsiam(z[:2], z[1:]),
    "mocov2": lambda z, _: losses.mocov2(z[0], z[1], F.normalize(views(1, seed=4)[0], dim=1)),
    "mocov3": lambda z, _: losses.mocov3(z[:2], z[1:], 0.2),
    "dcl": lambda z, _: losses.dcl(z[0], z[1]),
    "dino": lambda z, _: losses.dino(z, z[:2], losses.dino_center(z[:2], torch.ones(DIM).double(), 0.3)),
    "dclw": lambda z, _: losses.dcl(z[0], z[1], sigma=0.5),
    "lejepa": lambda z, _: losses.lejepa(z, 7, slices=9, lambd=0.5),
    "sigreg": lambda z, _: losses.sigreg(z[:1], 7, slices=9),
    "mae": lambda z, _: losses.mae(z[0][:, None, :4], squares(z[1]), torch.ones(len(z[0]), 1), 2),
    "infomax": lambda z, labels: infomax()(z[0], z[1][:, :4, None, None].expand(-1, -1, 18, 18), z[2].detach()),
    "deepcluster": lambda z, labels: losses.deepcluster(z[0], labels.clamp(min=0), torch.arange(1, DIM + 1)),
    "sela": lambda z, labels: losses.sela(z, labels.clamp(min=0).expand(3, -1)),
    "sela_labels": lambda z, labels: (losses.sela_labels(z[0], lamb=2.0) * z[1, :, 0]).mean(),
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
        (lambda z: losses.byol(z, z), r"\[3, 6, 5\] and \[3, 6, 5\]: give two of one shape \[2, B, D\]"),
        (lambda z: losses.simsiam(z[:2], z[:2, :3]), r"\[2, 6, 5\] and \[2, 3, 5\]: give two of one shape"),
        (lambda z: losses.mocov2(z[0], z[1], z[0, :, :2]), r"queue is torch.float64 \[6, 2\]: give \[Q, 5\]"),
        (lambda z: losses.mocov3(z[:2], z[:1]), "give two of one shape"),
        (lambda z: losses.barlow_twins(z[0], z[1], lambd=-1.0), "lambd = -1.0"),
        (lambda z: losses.lejepa(z, 0, lambd=2.0), "lambd = 2.0"),
        (lambda z: losses.lejepa(z, 0, global_views=[0, 3]), r"global_views = \[0, 3\]: give different numbers of 3"),
        (lambda z: losses.lejepa(z[:1], 0), r"\[1, 6, 5\]: give 2 or more"),
        (lambda z: losses.sigreg(z[0], 0), "give each as"),
        (
            lambda z: losses.mae(z[0], squares(z[1]), z[0], 3),
            r"\[6, 1, 2, 2\]: give \[B, C, S, S\] of whole patches of 3",
        ),
        (lambda z: losses.mae(z[0], squares(z[1]), z[0], 2), r"predicted is torch.float64 \[6, 5\]: give \[6, 1, 4\]"),
        (lambda z: losses.dcl(z[0], z[1], sigma=0.0), "sigma = 0.0"),
        (lambda z: losses.dino(z[:2], z, z[0, 0]), r"targets \[3, 6, 5\]: give 2 views or more, and no more targets"),
        (lambda z: losses.dino(z, z[:2], z[0]), r"center \[6, 5\] are not those of \[3, 6, 5\]"),
        (lambda z: losses.dino(z, z[0], z[0, 0]), "give each as"),
        (lambda z: losses.dino(z, z[:2], z[0, 0], temperature=0.0), "temperature = 0.0"),
        (lambda z: infomax()(z[0], MAPS[:2]), r"features \[6, 5\] and maps \[2, 4, 18, 18\]: give \[B, D\]"),
        (lambda z: infomax()(z[0, :1], MAPS[:1]), "one image has no other"),
        (lambda z: losses.DeepInfoMax(5, 4, beta=-1.0), "beta = -1.0"),
        (lambda z: losses.DeepInfoMax(5, 4, beta=0.0, gamma=0.0), "every term is left out"),
        (lambda z: losses.deepcluster(z[0], LABELS, torch.ones(5)), "labels go from -1 to 1: give 0 to 4"),
        (lambda z: losses.deepcluster(z[0], LABELS.clamp(min=0), torch.ones(4)), r"sizes are torch.float32 \[4\]"),
        (lambda z: losses.sela(z, LABELS[None]), "labels of 1 heads are not those of 3"),
        (lambda z: losses.sela(z[:1], LABELS[None].double()), r"labels are torch.float64 \[6\]: give int64 \[6\]"),
        (lambda z: losses.sela(z[0], [LABELS] * 6), r"give \[B, K\] of each head"),
        (lambda z: losses.sela_labels(z), r"scores are torch.float64 \[3, 6, 5\]"),
        (lambda z: losses.sela_labels(z[0, :4]), "4 images cannot fill 5 clusters"),
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
