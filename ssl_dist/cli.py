"""The commands. Thin: they read arguments, call one function and turn what it raises into an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_dist import __version__
from ssl_dist.errors import Fault, RaisedOn, UserError

EXIT_CODES = (
    "exit codes: 0 done; 2 your mistake, one line says which; 75 stopped on request after a checkpoint, run the same "
    "command again; 1 a fault."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code; argparse exits by itself for a wrong command line (2) and --help (0)."""
    parser = _parser()
    parsed, others = parser.parse_known_args(arguments)
    # argparse takes no positional arguments after an option; overrides may stand anywhere.
    if any("=" not in word or word.startswith("-") for word in others) or (others and not hasattr(parsed, "overrides")):
        parser.error(f"unknown argument: {' '.join(others)}")
    if others:
        parsed.overrides += others
    exit_file = os.environ.get("SSL_DIST_EXIT_FILE")
    first_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"
    if exit_file and first_of_machine:
        Path(exit_file).unlink(missing_ok=True)  # of a start before this one
    try:
        code = parsed.action(parsed)
    except (UserError, Fault) as error:
        if _prints(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.code if isinstance(error, Fault) else 2
    except KeyboardInterrupt:
        code = 130
    if exit_file:
        # torchrun tells its caller 1 whatever the ranks say, so the first rank of a machine leaves its code in a file.
        if first_of_machine:
            Path(exit_file).write_text(f"{code}\n")
        if code in (2, 75):
            return 0  # or torchrun would start the ranks again: a stop and a mistake are no faults to it
    return code


def _prints(error: UserError | Fault) -> bool:
    """Whether this rank is the one to print an error that other ranks may have met too."""
    if error.raised_on is RaisedOn.THIS_RANK:
        return True
    return os.environ.get("RANK" if error.raised_on is RaisedOn.EVERY_RANK else "LOCAL_RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ssl-dist",
        description="Pre-train an image backbone without labels, on one process or many, and evaluate it.",
        epilog="A first run: bash launch/quickstart.sh. " + EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"ssl-dist {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, action, help: str, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=description, epilog=EXIT_CODES)
        sub.set_defaults(action=action)
        return sub

    sub = command(
        "convert", _convert, "write a data set as .beton files",
        "Write <split>.beton for every split of a data set, and dataset.json. A killed conversion "
        "goes on after the last complete split.",
    )  # fmt: skip
    sub.add_argument("dataset", help="cifar10, cifar100, supercifar100, stl10, tiny-imagenet, slimagenet64, imagenet, "
                     "digits, or folder for images of your own in <split>/<class>/")  # fmt: skip
    sub.add_argument("--root", type=Path, help="where the images are (torchvision sets are downloaded there)")
    sub.add_argument("--out", type=Path, help="where to write; becomes data.root (default data/<dataset>)")
    sub.add_argument(
        "--name", help="name of a folder's data set (default: of ROOT); a catalog name brings its facts along"
    )
    sub.add_argument("--max-side", type=int, help="longer images are shrunk to this many pixels (default: catalog)")
    sub.add_argument("--workers", type=int, help="threads that encode (default: all cores)")

    sub = command(
        "train", _train, "pre-train, or go on with a run",
        "Pre-train by a config, alone or under torchrun (launch/torchrun_single.sh). The same command again resumes.",
    )  # fmt: skip
    _add_config(sub)

    sub = command(
        "explain", _explain, "what a config will do",
        "Print what a config will do, on any number of ranks, without starting anything. Mistakes show here first.",
    )  # fmt: skip
    _add_config(sub)
    sub.add_argument("--world", type=int, default=1, help="ranks (default 1)")
    sub.add_argument("--ranks-per-node", type=int, help="ranks of a node (default: all on one)")

    sub = command(
        "extract", _extract, "write features files",
        "Pass every image of a split through a run's frozen backbone: features/<dataset>-<split>.safetensors. Works "
        "under torchrun too; the file is the same. Weights of others need backbone.name, data.name and data.root.",
    )  # fmt: skip
    sub.add_argument("weights", type=Path, metavar="RUN|WEIGHTS", help="a run's folder, or one checkpoint file")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="data.root, data.name, data.reader of another set; for weights of others also backbone.name, "
        "data.image_size, data.eval_resize, views.normalize",
    )  # fmt: skip
    sub.add_argument("--out", type=Path, help="folder to write to (default RUN/features)")
    sub.add_argument("--split", action="append", help="split to extract; may be repeated (default: training and test)")

    sub = command(
        "evaluate", _evaluate, "measure a run",
        "Evaluate a run's newest checkpoint and print a table; every number goes to RUN/results.json. Features that "
        "are missing or stale are extracted first.",
    )  # fmt: skip
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("overrides", nargs="+", metavar="EVALUATOR|key=value",
                     help="knn, logistic, probe, finetune, classify, ...; knn.k=[20,200] sets an option; data.root=... "
                     "another data set; data.subset={per_class: 260} or a list of ids: what to learn from")  # fmt: skip
    sub.add_argument(
        "--validation", type=float, metavar="SHARE",
        help="measure on this share of the training split, held out of it, and leave the test split alone",
    )  # fmt: skip
    sub.add_argument(
        "--search", nargs="+", action="extend", default=[], metavar="EVALUATOR.OPTION=[a,b]",
        help="try every combination on a held-out share (0.1, or that of --validation), then measure the one with "
        "the highest top-1 on the test split",
    )  # fmt: skip

    sub = command(
        "verify", _verify, "prove that the number of ranks does not matter",
        "The equality certificate: real steps of 2 and 4 ranks, on every grid, against one process. Exit code 1 when "
        "a bound does not hold.",
    )  # fmt: skip
    sub.add_argument("overrides", nargs="*", metavar="CONFIG|key=value",
                     help="a YAML file whose method and images are taken; optim.batch_size=32")  # fmt: skip
    sub.add_argument(
        "--method", action="append", default=[], help="method to certify on digits; may be repeated (default: all)"
    )
    sub.add_argument("--steps", type=int, default=10, help="optimizer steps in float64 (default 10); one in float32")

    sub = command(
        "report", _report, "make a page of a run, or of several side by side",
        "Write one HTML page that needs nothing else: health, results beside published ones, curves, views, pictures, "
        "config. Print the results as a table: mean ± standard deviation over seeds of what several runs share.",
    )  # fmt: skip
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    sub.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: report.html in the run's "
                     "folder; of several runs, in the folder that they have in common)")  # fmt: skip

    sub = command(
        "export", _export, "write a run's backbone for other programs",
        "Write the encoder of a run's newest checkpoint, by the names that torchvision, timm or the official code of "
        "relational reasoning (seed) load.",
    )  # fmt: skip
    sub.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one checkpoint file")
    sub.add_argument("--format", required=True, choices=["torchvision", "timm", "seed"])
    sub.add_argument("--out", type=Path, required=True, help="file to write (safetensors; seed: of torch.save)")

    sub = command(
        "labels", _labels, "write the labels that a run gave its images",
        "Write the labels that a run's method gave its training images to a CSV file: image_id, label_0, ... They are "
        "labels for another run by data.labels={file: FILE, column: 0}.",
    )  # fmt: skip
    sub.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one checkpoint file")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="data.root, data.reader: where the images are")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")

    sub = command(
        "voc", _voc, "transfer to PASCAL VOC: classification, detection, segmentation",
        "Fit SVMs on frozen features (classification), or fine-tune Faster R-CNN (detection) or FCN (segmentation), in "
        "one process; the numbers go to OUT/results.json. The same command again goes on with a training.",
    )  # fmt: skip
    sub.add_argument("task", choices=["classification", "detection", "segmentation"])
    sub.add_argument("weights", type=Path, metavar="RUN|WEIGHTS", help="a run's folder, or a file of weights")
    sub.add_argument("overrides", nargs="*", metavar="key=value",
                     help="options of the task, as batch_size=8; of weights of others also backbone.name")  # fmt: skip
    sub.add_argument("--root", type=Path, action="append", required=True,
                     help="VOCdevkit/VOC2007; may be repeated: trained on all, tested on the first")  # fmt: skip
    sub.add_argument("--out", type=Path, required=True, help="folder of results.json, features and checkpoints")

    sub = command("doctor", _doctor, "what is missing on this machine", "Check this machine and say what mends it.")
    return parser


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", help="a YAML file; configs/ holds one for every row of the papers' tables")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-3 data.limit=1000")


# Imports stand inside the commands: torch and numba cost seconds that --help need not wait for.


def _convert(args) -> int:
    from ssl_dist.convert.command import convert

    made = convert(args.dataset, args.root, args.out, name=args.name, max_side=args.max_side, workers=args.workers)
    out = args.out or Path("data", made.name)
    print(f"{out}: done; use it with data.root={out}")
    return 0


def _train(args) -> int:
    from ssl_dist import config
    from ssl_dist.train.loop import train

    return train(config.load(args.config, args.overrides))


def _explain(args) -> int:
    from ssl_dist import config
    from ssl_dist.train.explain import explain

    if args.world < 1:
        raise UserError(f"--world {args.world}: at least one rank is needed")
    if args.ranks_per_node is not None and (args.ranks_per_node < 1 or args.world % args.ranks_per_node):
        raise UserError(f"--ranks-per-node {args.ranks_per_node}: must divide --world {args.world}")
    print(explain(config.load(args.config, args.overrides), args.world, args.ranks_per_node))
    return 0


def _extract(args) -> int:
    from ssl_dist.evaluate.command import extract

    for path in extract(args.weights, args.split or [], args.overrides, args.out):
        print(path)
    return 0


def _evaluate(args) -> int:
    from ssl_dist.evaluate.command import evaluate
    from ssl_dist.results.records import table

    overrides = [word for word in args.overrides if "=" in word]
    chosen = [word for word in args.overrides if "=" not in word]
    if not chosen:
        raise UserError(f"evaluate {args.run}: name at least one evaluator, for example knn")
    code, records = evaluate(args.run, chosen, overrides, args.validation, args.search)
    if os.environ.get("RANK", "0") == "0":
        print(table(records))
    return code


def _verify(args) -> int:
    from ssl_dist.verify.command import verify

    overrides = [word for word in args.overrides if "=" in word]
    files = [word for word in args.overrides if "=" not in word]
    if len(files) > 1:
        raise UserError(f"verify {' '.join(files)}: one config at a time")
    return verify(files[0] if files else None, args.method, overrides, args.steps)


def _report(args) -> int:
    from ssl_dist.report import report

    print(report(args.runs, args.out))
    return 0


def _export(args) -> int:
    from ssl_dist.run.export import export

    line = export(args.run, args.format, args.out)
    print(f"{args.out}: written; load it with\n{line}")
    return 0


def _labels(args) -> int:
    from ssl_dist.run.labels import export_labels

    print(export_labels(args.run, args.out, args.overrides))
    return 0


def _voc(args) -> int:
    from ssl_dist.results.records import table
    from ssl_dist.voc import command

    code, made = command.run(args.task, args.weights, args.root, args.out, args.overrides)
    if made:
        print(table(command.headline(made)))
    return code


def _doctor(_args) -> int:
    from ssl_dist.doctor import run

    return run()
