"""python -m tests.compile_kernels: compile what most tests call, or many of their processes begin with doing so.

In a fresh clone numba's cache is empty; each of the first processes would spend 30 seconds of CPU on the same loops.
"""

import tempfile

from ssl_dist import config, views
from ssl_dist.convert.command import convert
from ssl_dist.distributed.rank import RankInfo
from ssl_dist.kernels import moments
from ssl_dist.run.blueprint import RunPlan, derive


def compile_kernels(plan: RunPlan) -> None:
    for spec in plan.specs:
        views.warm_up(spec)
        for bits in (8, 16):
            views.warm_up(spec, views.PixelFormat(5, bits))
    plan.method_class.warm_up(plan.options, plan.dtype)
    moments.warm_up(plan.dtype)
    with plan.open_reader() as reader:
        list(reader.batches([[0]]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        convert("digits", None, folder, workers=1, progress=False)
        for method in ("relational", "sela", "infomax"):
            for precision in ("fp32", "fp64"):
                overrides = [f"data.root={folder}", "data.reader=arrays", "run_dir=none", f"precision={precision}"]
                compile_kernels(derive(config.load(f"configs/digits/{method}-conv4.yaml", overrides), RankInfo()))
