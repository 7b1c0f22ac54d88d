"""Ranks that do not belong together are refused before the first step, by all of them and with one message."""

import pytest

from ssl_dist import config
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.distributed.world import join_world, one_process
from ssl_dist.errors import RaisedOn, UserError
from ssl_dist.run.blueprint import derive
from tests import ranks
from tests.messages import naming
from tests.test_train import CONFIG, overrides


def agreed(rank, size, data, run, second=(), broken=None):
    """The name of the start, or the message of the refusal. `second` are overrides of the second rank."""
    from ssl_dist.run import folder as run_folder
    from ssl_dist.storage import checkpoint
    from ssl_dist.train import preflight

    if rank == 1 and broken == "versions":
        checkpoint.versions = lambda: {"torch": "1.0"}
    if rank == 1 and broken == "images":
        preflight.RunPlan.data_identity = {"split": "other", "ids": "other"}
    if rank == 1 and broken == "folder":
        preflight._appears = lambda path: False
    rank_info = RankInfo.from_environment()
    more = second if rank == 1 else ()
    blueprint = derive(config.load(CONFIG, overrides(data, run, *more)), rank_info)
    with join_world(rank_info, blueprint.grid) as world:
        world.on_rank0(lambda: run_folder.claim(blueprint.run))
        try:
            return preflight.agree(blueprint, world)
        except UserError as error:
            assert error.raised_on is RaisedOn.EVERY_RANK
            return str(error)


def test_a_start_has_one_name_and_leaves_nothing(digits, tmp_path):
    run = tmp_path / "run"
    first, second = ranks.launch(agreed, 2, tmp_path, digits, run)
    assert first == second and len(first) == 16
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["board", "starts.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "broken", "message"),
    [
        (["optim.lr=0.5"], None, naming("optim.lr", "rank 0", 0.001, "rank 1", 0.5)),
        (["run_dir=elsewhere"], None, naming("run_dir", "rank 0", "rank 1") + ".*elsewhere"),
        (["data.workers=2"], None, "^[0-9a-f]{16}$"),
        ([], "versions", r"(numpy|torch|python|ssl_dist): rank 0 on \S+ has "),
        ([], "images", r"images \(ids\): rank 0"),
        (
            [],
            "folder",
            naming("run_dir =", "rank 1", "rank 0", "choose"),
        ),
    ],
)
def test_what_differs_is_named(digits, tmp_path, second, broken, message):
    import re

    for answer in ranks.launch(agreed, 2, tmp_path, digits, tmp_path / "run", second, broken):
        assert re.search(message, answer), answer


def test_one_process_agrees_with_itself(digits, tmp_path):
    blueprint = derive(config.load(CONFIG, overrides(digits, tmp_path / "run")), RankInfo())
    (tmp_path / "run" / "logs").mkdir(parents=True)
    from ssl_dist.train.preflight import agree

    with one_process() as world:
        assert len(agree(blueprint, world)) == 16
