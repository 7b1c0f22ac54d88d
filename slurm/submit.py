"""Sends trainings and evaluations to Slurm, and says how they are.

    python slurm/submit.py train CONFIG [key=value ...] --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu
    python slurm/submit.py train CONFIG --nodes 2 --tasks-per-node 4 --seeds 0 1 2 --then knn logistic
    python slurm/submit.py train CONFIG ... --sweep optim.lr=[1e-3,3e-3] views.num=[4,8]
    python slurm/submit.py train CONFIG ... --dry-run           prints the batch script and its elements; needs no data
    python slurm/submit.py train CONFIG ... --cluster local     the same job object here, without Slurm
    python slurm/submit.py evaluate RUN probe [key=value ...] --gpus-per-node 8     on any number of ranks too
    python slurm/submit.py study FILE [key=value ...] --gpus-per-node 8     what is left of a study, as an array
    python slurm/submit.py status [RUN ...]                     a line a job

What a site always wants stands in a small YAML that the user keeps (slurm/site.yaml shows every key): --site FILE, or
the file that SSL_DIST_SLURM names. Options on the command line come before it. A training that is asked to stop (time
limit, preemption) saves and is queued again; one that crashes is, at most `crashes` times; a cancelled one never.
Exit codes: 0 submitted; 2 a mistake, named before anything is submitted.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ssl_dist import plugins, terminal
from ssl_dist.errors import UserError, of_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="submit a training")
    train.add_argument("config")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("--seeds", type=int, nargs="+", help="a job array with an element a seed: run_dir-seed<N>")
    train.add_argument("--sweep", nargs="+", metavar="key=[a,b]", help="every combination is an element of the array")
    train.add_argument("--then", nargs="+", metavar="EVALUATOR|key=value", help="evaluate when the training is done")
    train.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    _add_site(train)
    evaluate = verbs.add_parser("evaluate", help="submit an evaluation of a run")
    evaluate.add_argument("run", type=_path)
    evaluate.add_argument("overrides", nargs="+", metavar="EVALUATOR|key=value")
    evaluate.add_argument("--validation", metavar="SHARE|IMAGES", help="as of ssl-dist evaluate")
    evaluate.add_argument("--split", help="as of ssl-dist evaluate")
    evaluate.add_argument("--search", nargs="+", action="extend", default=[], metavar="EVALUATOR.OPTION=[a,b]",
                          help="as of ssl-dist evaluate")  # fmt: skip
    _add_site(evaluate)
    study = verbs.add_parser("study", help="submit the runs of a study, and what lays them out")
    study.add_argument("file", type=_path)
    study.add_argument("overrides", nargs="*", metavar="key=value")
    _add_site(study)
    status = verbs.add_parser("status", help="a line a job")
    status.add_argument("runs", nargs="*", type=_path, help="run folders (default: all in runs/)")
    options, others = parser.parse_known_args()
    if any("=" not in word or word.startswith("-") for word in others) or (others and options.verb == "status"):
        parser.error(f"unknown argument: {' '.join(others)}")
    with terminal.lasting():
        return _perform(options, others)


def _perform(options: argparse.Namespace, others: list[str]) -> int:
    try:
        if options.verb == "status":
            from ssl_dist.slurm import status

            print(status.table(options.runs))
            return 0
        options.overrides += others
        own = plugins.choose(options.plugins)
        if options.verb != "evaluate":
            options.overrides += own
        if options.verb == "study":
            from ssl_dist.slurm import study

            return study.submit(options)
        from ssl_dist.slurm import submit

        return submit.train(options) if options.verb == "train" else submit.evaluate(options)
    except (UserError, OSError) as error:
        print(f"error: {error}" if isinstance(error, UserError) else f"error: {of_system(error)}", file=sys.stderr)
        return 2


def _path(text: str) -> Path:
    """Of `--site=~/x` no shell makes a home."""
    return Path(os.path.expanduser(text))


def _add_site(verb: argparse.ArgumentParser) -> None:
    """What a job asks of the cluster."""
    size = verb.add_mutually_exclusive_group()
    size.add_argument("--gpus-per-node", type=int, help="GPUs of a node, and a rank on each")
    size.add_argument("--tasks-per-node", type=int, help="ranks of a node, on its CPUs")
    verb.add_argument("--nodes", type=int)
    verb.add_argument("--time", help="HH:MM:SS, or D-HH:MM:SS")
    for name in ("partition", "account", "qos", "constraint"):
        verb.add_argument(f"--{name}")
    verb.add_argument("--cpus-per-task", type=int, help="cores of a rank (default: the share of its GPU in the node's)")
    verb.add_argument("--gres", help="how the site wants GPUs asked for, as in gpu:h100 (default: --gpus-per-node)")
    verb.add_argument("--mem-gb", type=float, help="memory of a node")
    verb.add_argument("--array-parallelism", type=int, metavar="N", help="elements of an array that run at a time")
    verb.add_argument("--site", type=_path, default=os.environ.get("SSL_DIST_SLURM"), help="YAML of the site")
    verb.add_argument("--plugins", type=_path, action="append", default=[], metavar="FILE", help="as of ssl-dist")
    verb.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")


if __name__ == "__main__":
    sys.exit(main())
