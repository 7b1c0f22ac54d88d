"""The equality certificate: it holds for every method, and fails for every mutation of the program."""

import math
import os
import time
from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch

from ssl_dist import cli, methods
from ssl_dist.config import Section
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.errors import Fault
from ssl_dist.grid import Grid
from ssl_dist.run.blueprint import derive
from ssl_dist.verify import command as verify
from ssl_dist.verify import ranks as verify_ranks
from tests import mutations

CONFIG = "configs/digits/relational-conv4.yaml"
ALL = {"2x1", "1x2", "4x1", "2x2", "1x4"}
VIEWS_SHARDED = {"1x2", "2x2", "1x4"}


@pytest.fixture
def relational(digits, tmp_path):
    """The method with its default options in float64, three steps of two epochs."""
    return next(verify.cases(tmp_path, CONFIG, [], [f"data.root={digits}", "data.reader=arrays"], steps=3))


def failing_grids(rows):
    """The grids of the rows that do not hold."""
    return {str(row.grid) for row in rows if not row.holds}


@pytest.mark.slow
def test_two_ranks_equal_one(relational, tmp_path):
    rows = verify.certify([relational], tmp_path, sizes=(2,))
    assert [row.grid for row in rows] == [Grid(2, 1), Grid(1, 2)]
    assert failing_grids(rows) == set(), verify.table(rows)
    assert all(set(row.figures) == set(verify.KINDS) for row in rows)
    assert any(row.figures["weights"] > 0 for row in rows), "sums in another order leave some rounding"


def test_without_a_gpu_a_gpu_is_refused(capsys):
    assert cli.main(["verify", "--device", "cuda"]) == 2
    assert "--device cuda: no GPU is visible here" in capsys.readouterr().err


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """Cases and rows of all methods, in one group of ranks of every size. Three steps are two epochs."""
    folder = tmp_path_factory.mktemp("verify")
    others = [name for name in methods.names() if name != "deepcluster"]
    cases = list(verify.cases(folder, names=others, steps=3))
    # k-means++ takes three collectives a cluster; 30 of them take longer than all other methods' steps.
    cases += verify.cases(folder, names=["deepcluster"], overrides=["method.options.clusters=8"], steps=3)
    # An option changes the arithmetic, which float64 shows; float32 has its own kernels, of which one option is enough.
    defaults = {case.method: case.variant for case in reversed(cases)}
    cases = [case for case in cases if case.config.precision == "fp64" or case.variant == defaults[case.method]]
    return cases, verify.certify(cases, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_certified(name, certified):
    cases, rows = ([one for one in group if getattr(one, "case", one).method == name] for group in certified)
    assert rows and all(row.holds for row in rows), verify.table(rows)
    if methods.find(name).trainable:
        assert {case.config.precision for case in cases} == {"fp64", "fp32"}
        assert {case.config.optim.steps for case in cases if case.config.precision == "fp64"} == {3}
    if methods.find(name).free_views:
        by_four = all(num % 4 == 0 for num, _ in derive(cases[0].config, RankInfo()).info.view_groups)
        assert {str(row.grid) for row in rows} == (ALL if by_four else ALL - {"1x4"})


# ---------------------------------------------------------------------------------------------------- mutations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "grids"),
    [
        (mutations.lose_the_backward_sum, ALL),
        (mutations.shift_a_share, ALL),
        (mutations.normalize_locally, ALL),
        (mutations.reuse_a_view_id, VIEWS_SHARDED),
    ],
)
def test_a_mutated_program_fails_the_certificate(relational, tmp_path, mutation, grids):
    rows = verify.certify([relational], tmp_path, mutation)
    print(verify.table(rows))
    assert failing_grids(rows) == grids, verify.table(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation",
    [
        mutations.lose_the_backward_sum,
        mutations.average_a_sum,
        mutations.be_normal_locally,
        mutations.draw_slices_of_the_rank,
    ],
)
def test_a_mutated_lejepa_fails_on_every_grid(tmp_path, mutation):
    case = next(verify.cases(tmp_path, names=["lejepa"], steps=1))
    rows = verify.certify([case], tmp_path, mutation)
    print(verify.table(rows))
    assert failing_grids(rows) == ALL - {"1x4"}, verify.table(rows)


TOY = '''
from typing import Literal

from torch import nn

from ssl_dist.config import Section
from ssl_dist.methods.base import Output, SSLMethod


class Options(Section):
    pull: Literal["all", "class"] = "all"


class Method(SSLMethod):
    """Two views of an image are alike, images differ; or those of two classes, with pull: class."""

    Options = Options
    num_views = 2
    needs_labels = True

    def __init__(self, backbone, info, options):
        super().__init__(backbone, info, options)
        self.head = nn.Sequential(nn.Linear(info.feature_dim, 8, bias=False), nn.BatchNorm1d(8))

    def forward(self, batch, world):
        [z] = self.represent(batch, lambda images: self.head(self.backbone(images)))
        labels = batch.labels
        GATHER
        a, b = z
        other = labels[:, None] != labels if self.options.pull == "class" else labels[:, None] >= 0
        return Output((a - b).square().mean() + ((a @ b.T).square() * other).sum() / len(a) ** 2)
'''
GATHER = "z, labels = world.gather_views(z), world.gather_images(labels)"


@pytest.mark.slow
def test_a_new_file_is_certified(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY.replace("GATHER", GATHER))
    (tmp_path / "local_toy.py").write_text(TOY.replace("GATHER", "pass"))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    cases = list(verify.cases(tmp_path, names=["toy", "local_toy"], steps=3))
    rows = verify.certify(cases, tmp_path, partial(mutations.add_methods, tmp_path))
    outcomes = {(row.case.method, row.case.variant, str(row.grid), row.holds) for row in rows}
    assert outcomes == {
        (name, f"pull={pull}", grid, name == "toy")
        for name in ("toy", "local_toy") for pull in ("all", "class") for grid in ("2x1", "4x1")
    }, verify.table(rows)  # fmt: skip
    assert "views are not sharded" in cases[0].note and "verify's own" in cases[0].note


ALONE = '''
import torch
from torch import nn
from ssl_dist.config import Section
from ssl_dist.methods.base import Output, SSLMethod
from ssl_dist.nn import KeyedDropout


class Options(Section):
    pass


class Method(SSLMethod):
    """Every view passes alone; views of an image are alike and images differ. Starts from means of all images."""

    Options = Options
    free_views = True
    views_together = TOGETHER

    def __init__(self, backbone, info, options):
        super().__init__(backbone, info, options)
        self.num_views = sum(num for num, _ in info.view_groups)
        self.head = nn.Sequential(
            nn.Linear(info.feature_dim, 8, bias=False), nn.BatchNorm1d(8), KeyedDropout(0.25, 0), nn.Linear(8, 8)
        )

    def forward(self, batch, world):
        z_KMD = self.gathered(batch, world, lambda images: self.head(self.backbone(images)))
        centre = z_KMD.mean(0)
        return Output((z_KMD - centre).square().mean() - 0.1 * centre.std(0).mean(), representations=z_KMD)
'''
ALONE_CONFIG = """
run_dir: none
data: {name: digits, root: none}
views:
  groups:
    - {num: 2, random_resized_crop: {}}
    - {num: 2, size: 24, random_resized_crop: {scale: [0.2, 0.6]}}
    - {num: 2, horizontal_flip: 0.5}
optim: {batch_size: 16, epochs: 1}
method: {name: NAME}
"""


@pytest.mark.slow
def test_views_that_pass_alone_or_together_may_be_sharded(tmp_path, monkeypatch):
    """Groups of two sizes, dropout, BatchNorm of one view or of all of one size, on every grid."""
    for name, together in (("alone", "False"), ("together", "True")):
        (tmp_path / f"{name}.py").write_text(ALONE.replace("TOGETHER", together))
        (tmp_path / f"{name}-conv4.yaml").write_text(ALONE_CONFIG.replace("NAME", name))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(verify, "CONFIGS", tmp_path)
    cases = list(verify.cases(tmp_path, names=["alone", "together"], steps=3))
    rows = verify.certify(cases, tmp_path, partial(mutations.add_methods, tmp_path))
    assert len(rows) == 2 * 2 * 4, "no grid of four view shards: every group has two views"
    assert all(row.holds for row in rows), verify.table(rows)
    alone, together = (float(torch.load(tmp_path / f"pages-{n}" / "1.pt")["loss"]["loss"]) for n in (0, 2))
    assert alone != together


@pytest.mark.slow
def test_timms_batchnorm_is_synchronised(tmp_path):
    """With the activation inside, also where each view passes alone and the views are sharded."""
    case = next(verify.cases(tmp_path, names=["sfrik"], overrides=["backbone.name=timm/test_byobnet"], steps=3))
    rows = verify.certify([case], tmp_path)
    assert {str(row.grid) for row in rows} == ALL and all(row.holds for row in rows), verify.table(rows)


EVONORM = """
from torch import nn
from timm.layers import EvoNorm2dB0
from ssl_dist.nn.backbone import Backbone


class Evo(Backbone):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), EvoNorm2dB0(8))
        self.stages, self.feature_dim = {"body": 8}, 8

    def steps(self):
        return [("body", self.body)]


BACKBONES = {"evo": Evo}
"""


@pytest.mark.parametrize("command", [["explain", CONFIG, "--world", "2"], ["verify", CONFIG]])
def test_a_layer_that_sees_a_rank_alone_is_refused_before_ranks_start(digits, tmp_path, capsys, command):
    (tmp_path / "evo.py").write_text(EVONORM)
    words = [f"data.root={digits}", "data.reader=arrays", "backbone.name=evo", f"plugins=[{tmp_path / 'evo.py'}]"]
    assert cli.main([*command, *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "its layer body.1 (EvoNorm2dB0) cannot be synchronised over several ranks; train on one rank" in line
    assert cli.main(["explain", CONFIG, "--world", "1", *words]) == 0


# ---------------------------------------------------------------------------------------------------- the measure


def tensors(**values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


ONE_PROCESS = tensors(large=[1000.0, 3.0, -4.0], small=[0.5, 0.0, 0.0], zero=[0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 0.0),
        ({"large": [1000.0, 3.0, -5.0]}, 1e-3),  # 1 / 1000
        ({"large": [998.0, 3.0, -4.0]}, 2e-3),
        ({"small": [0.5, 0.0, 0.25]}, 0.25),  # 0.25 / 1: the floor is a thousandth of 1000
        ({"zero": [0.0, 1e-6, 0.0]}, 1e-6),
        ({"zero": [0.0, 1e-6, 0.0], "large": [1000.0, 3.0, -5.0]}, 1e-3),
        ({"zero": [0.0, math.nan, 0.0]}, math.inf),
        ({"zero": [0.0, math.inf, 0.0]}, math.inf),
        ({"small": [0.5, 0.0]}, math.inf),
        ({"another": [0.0]}, math.inf),
    ],
)
def test_differences_are_found(changed, expected):
    assert verify_ranks.difference(ONE_PROCESS | tensors(**changed), ONE_PROCESS, math.inf) == pytest.approx(expected)


def test_missing_or_incomparable_tensors_differ():
    some = {name: ONE_PROCESS[name] for name in ("large", "small")}
    assert verify_ranks.difference(some, ONE_PROCESS, math.inf) == math.inf
    nan = tensors(a=[math.nan])
    assert verify_ranks.difference(nan, nan, math.inf) == math.inf
    zero = tensors(a=[0.0])
    assert verify_ranks.difference(tensors(a=[1e-300]), zero, math.inf) == math.inf  # nothing to compare it with
    count = {"num_batches_tracked": torch.tensor(7)} | tensors(running_mean=[1e9])
    assert verify_ranks.difference(count, count, math.inf) == 0.0
    assert verify_ranks.difference(count | {"num_batches_tracked": torch.tensor(8)}, count, math.inf) == math.inf


def test_the_measure_of_float32_is_that_of_the_whole_tensor():
    one = {"a": torch.full((100,), 1.0)}
    other = {"a": torch.full((100,), 1.0)}
    other["a"][3] += 0.125
    assert verify_ranks.difference(other, one, verify_ranks.NORM["fp32"]) == pytest.approx(0.0125)
    assert verify_ranks.difference(other, one, verify_ranks.NORM["fp64"]) == pytest.approx(0.125)


@pytest.mark.parametrize("kind", verify.KINDS)
def test_each_bound_counts(relational, kind, capsys, monkeypatch):
    good = verify.Row(relational, Grid(2, 1), dict.fromkeys(verify.KINDS, 1e-9))
    assert good.holds
    for figure in (1.01e-9, math.inf, math.nan):
        assert not replace(good, figures=good.figures | {kind: figure}).holds
    bad = replace(good, figures=good.figures | {kind: 1e-8})
    for rows, code, words in (
        ([good, good], 0, ("2 of 2 hold",)),
        ([good, bad], 1, ("DIFFERENT", "1 of 2 hold", "1.0e-08")),
    ):
        monkeypatch.setattr(verify, "certify", lambda *_, rows=rows: rows)
        monkeypatch.setattr(verify, "cases", lambda *_: [relational])
        assert cli.main(["verify", CONFIG]) == code
        stdout = capsys.readouterr().out
        assert all(word in stdout for word in (*words, "1e-09", CONFIG)), stdout


# ---------------------------------------------------------------------------------------------------- cases


class Choices(Section):
    kind: Literal["a", "b", "c"] = "b"
    rate: float = 1.0
    level: Literal[1, 2] | None = None


def test_every_value_of_every_literal_is_tried_once():
    assert list(verify.variants(Choices())) == [
        ("kind=b,level=None", []),
        ("kind=a", ['method.options.kind="a"']),
        ("kind=c", ['method.options.kind="c"']),
        ("level=1", ["method.options.level=1"]),
        ("level=2", ["method.options.level=2"]),
    ]
    assert [name for name, _ in verify.variants(Section())] == ["-"]


def test_the_cases_of_a_config(digits, tmp_path):
    words = [f"data.root={digits}", "data.reader=arrays"]
    cases = list(verify.cases(tmp_path, CONFIG, [], [*words, "method.options.aggregation=max", "seed=5"], steps=4))
    variants = [
        "aggregation=max,head=relation,negatives=in_turn",
        *(f"aggregation={name}" for name in ("cat", "sum", "mean")),
    ]
    variants += ["head=encoder", "head=dot_product", "negatives=random"]
    assert [(case.variant, case.config.precision) for case in cases] == [
        (variant, precision) for variant in variants for precision in ("fp64", "fp32")
    ]
    for case in cases:
        chosen = case.config.method.options
        for choice in case.variant.split(","):
            name, _, value = choice.partition("=")
            assert chosen.get(name, {"head": "relation", "negatives": "in_turn"}.get(name)) == value
        assert case.config.seed == 5 and case.config.views.num == 4
        assert case.config.optim.steps == (4 if case.config.precision == "fp64" else 1)
        assert case.config.data.limit // case.config.optim.batch_size == 2, "four steps must reach a second epoch"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([CONFIG, "--method", "relational"], ["not both"]),
        ([CONFIG, "other.yaml"], ["one config"]),
        (["--method", "relatonal"], ["relatonal", "'relational'"]),
        (["--steps", "0"], ["--steps 0"]),
        ([CONFIG, "precision=bf16"], ["precision", "itself"]),
        ([CONFIG, "data.reader=arrays", "data.root=ROOT", "optim.batch_size=6"], ["optim.batch_size = 6", "4 ranks"]),
        (["nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_verify_refuses(digits, capsys, arguments, words):
    assert cli.main(["verify", *(word.replace("ROOT", str(digits)) for word in arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


# ---------------------------------------------------------------------------------------------------- bad ranks


def _second_rank():
    return os.environ["RANK"] == "1"


def fail():
    if _second_rank():
        raise ValueError("planted")


def die():
    if _second_rank():
        os._exit(9)


def hang():
    if _second_rank():
        time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "step_timeout_s", "words"),
    [
        (fail, 60, "rank 1 of 2 failed at relational .* 2x1: ValueError: planted"),
        (die, 60, r"rank 1 of 2 \(exit code 9\) died"),
        (hang, 3, "no step of any of 2 ranks within 3 s at relational .* 2x1"),
    ],
)
def test_a_rank_that_ends_or_hangs_ends_all(relational, tmp_path, capsys, prepare, step_timeout_s, words):
    with pytest.raises(Fault, match=words):
        verify_ranks.run(2, [relational.on_grid(Grid(2, 1), tmp_path)], prepare, step_timeout_s=step_timeout_s)
    assert ("in fail" in capsys.readouterr().err) == (prepare is fail)
