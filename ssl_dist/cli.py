"""The commands. Thin: they read arguments, call one function and turn what it raises into an exit code."""

import argparse
import atexit
import gc
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ssl_dist import __version__, outcome, terminal
from ssl_dist.errors import UserError, one_line

if TYPE_CHECKING:
    from ssl_dist.config.describe import Table

EXIT_CODES = (
    "exit codes: 0 done; 2 your mistake, one line says which; 75 stopped on request after a checkpoint, run the same "
    "command again; 1 a fault."
)
Action = Callable[[argparse.Namespace], int | None]  # returns the exit code; None: 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code; argparse exits by itself for a wrong command line (2) and --help (0)."""
    with terminal.lasting() as output:
        parsed = _parsed(arguments)
        return outcome.of(lambda: parsed.action(parsed), output)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed, unparsed = parser.parse_known_args(arguments)
    # argparse takes no positional arguments after an option; overrides may stand anywhere.
    if unparsed:
        if any("=" not in word or word.startswith("-") for word in unparsed) or not hasattr(parsed, "overrides"):
            parser.error(f"unknown argument: {' '.join(unparsed)}")
        parsed.overrides += unparsed
    return parsed


_Argument = tuple[str, dict[str, Any]]  # what `ArgumentParser.add_argument` is given
_COMMANDS: list[tuple[str, str, tuple[_Argument, ...], Action]] = []  # in the order of --help


def _path(text: str) -> Path:
    """Of `--out=~/x` no shell makes a home."""
    return Path(os.path.expanduser(text))


def _argument(name: str, help: str | None = None, **options: Any) -> _Argument:
    return name, {"help": help, **options}


def _command(name: str, help: str, *arguments: _Argument) -> Callable[[Action], Action]:
    """Make the function below it a command of the program; its docstring is the description."""

    def add(action: Action) -> Action:
        _COMMANDS.append((name, help, arguments, action))
        return action

    return add


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "ssl-dist",
        description="Pre-train an image backbone without labels, on one process or many, and evaluate it.",
        epilog="A first run: bash launch/quickstart.sh. " + EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"ssl-dist {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, help, arguments, action in _COMMANDS:
        command = commands.add_parser(name, help=help, description=action.__doc__, epilog=EXIT_CODES)
        command.set_defaults(action=action)
        for argument, options in arguments:
            command.add_argument(argument, **options)
    return parser


def _overrides(help: str) -> _Argument:
    return _argument("overrides", help, nargs="*", metavar="key=value")


_CONFIG = (
    _argument("config", "a YAML file; configs/ holds one for every row of the papers' tables"),
    _overrides("for example optim.lr=1e-3 data.limit=1000"),
)
_VOC_TASKS = ["classification", "detection", "segmentation"]
_RUN_OR_FILE = _argument("run", "a run's folder, or one checkpoint file", type=_path, metavar="RUN")

# Imports stand inside the commands: torch and numba cost seconds that --help need not wait for.


@contextmanager
def _importing() -> Iterator[None]:
    """Import without the garbage collector, which would take a fifth of the time and find nothing. It leaves alone what
    was imported until the process ends, when some libraries want to be collected."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)


@_command(
    "convert",
    "write a data set as .beton files",
    _argument(
        "dataset",
        "cifar10, cifar100, supercifar100, stl10, tiny-imagenet, slimagenet64, imagenet, digits, or folder for images "
        "of your own in <split>/<class>/",
    ),
    _argument("--root", "where the images are (torchvision sets are downloaded there)", type=_path),
    _argument("--out", "where to write; becomes data.root (default data/<dataset>)", type=_path),
    _argument("--name", "name of a folder's data set (default: of ROOT); a catalog name brings its facts along"),
    _argument("--max-side", "longer images are shrunk to this many pixels (default: catalog)", type=int),
    _argument("--max-pixels", "largest picture that is read (default 178956970)", type=int),
    _argument("--workers", "threads that encode (default: all cores)", type=int),
    _argument(
        "--skip-damaged", "leave out images that can not be read, and name them in dataset.json", action="store_true"
    ),
    _argument("--recheck", "compare the bytes of the source's images with those of before", action="store_true"),
)
def _convert(args: argparse.Namespace) -> None:
    """Write <split>.beton for every split of a data set, and dataset.json. A killed conversion goes on after the last
    complete split."""
    from ssl_dist.convert.command import convert

    names = ("name", "max_side", "max_pixels", "workers", "skip_damaged", "recheck")
    manifest = convert(args.dataset, args.root, args.out, **{name: getattr(args, name) for name in names})
    out = args.out or Path("data", manifest.name)
    print(f"{out}: done; use it with data.root={out}")


@_command("train", "pre-train, or go on with a run", *_CONFIG)
def _train(args: argparse.Namespace) -> int:
    """Pre-train by a config, alone or under torchrun (launch/torchrun_single.sh). The same command again resumes."""
    with _importing():
        from ssl_dist import config
        from ssl_dist.train.loop import train

    return train(config.load(args.config, args.overrides))


@_command(
    "explain",
    "what a config will do",
    *_CONFIG,
    _argument("--world", "ranks (default 1)", type=int, default=1),
    _argument("--ranks-per-node", "ranks of a node (default: all on one)", type=int),
    _argument("--device", "that would train (default: what this machine has)", choices=("cpu", "cuda")),
)
def _explain(args: argparse.Namespace) -> None:
    """Print what a config will do, on any number of ranks, without starting anything. Mistakes show here first."""
    with _importing():
        from ssl_dist import config
        from ssl_dist.train.explain import explain

    if args.world < 1:
        raise UserError(f"--world {args.world}: at least one rank is needed")
    if args.ranks_per_node is not None and (args.ranks_per_node < 1 or args.world % args.ranks_per_node):
        raise UserError(f"--ranks-per-node {args.ranks_per_node}: must divide --world {args.world}")
    print(explain(config.load(args.config, args.overrides), args.world, args.ranks_per_node, args.device))


@_command(
    "extract",
    "write features files",
    _argument("weights", "a run's folder, or one checkpoint file", type=_path, metavar="RUN|WEIGHTS"),
    _overrides(
        "data.root, data.name, data.reader of another set; data.image_size, data.eval_resize, data.eval_interpolation; "
        "for weights of others also backbone.name, views.normalize"
    ),
    _argument("--out", "folder to write to (default RUN/features)", type=_path),
    _argument("--split", "split to extract; may be repeated (default: training and test)", action="append"),
)
def _extract(args: argparse.Namespace) -> None:
    """Pass every image of a split through a run's frozen backbone: features/<dataset>-<split>.safetensors. Works under
    torchrun too; the file is the same. Weights of others need backbone.name, data.name and data.root."""
    with _importing():
        from ssl_dist.evaluate.command import extract

    for path in extract(args.weights, args.split or [], args.overrides, args.out):
        print(path)


@_command(
    "evaluate",
    "measure a run",
    _argument("run", type=_path, metavar="RUN"),
    _argument(
        "overrides",
        "knn, logistic, probe, finetune, classify, ...; knn.k=[20,200] sets an option; data.root=... another data set; "
        "data.image_size=... another size of images; "
        "data.subset={per_class: 260} or a list of ids: what to learn from",
        nargs="+",
        metavar="EVALUATOR|key=value",
    ),
    _argument(
        "--validation",
        "measure on this share of the training split, held out of it, and leave the test split alone; "
        "{per_class: 260, start: 260} or a list of ids: on these images",
        metavar="SHARE|IMAGES",
    ),
    _argument(
        "--search",
        "try every combination on a held-out share (0.1, or that of --validation), then measure the one with the "
        "highest top-1 on the test split",
        nargs="+",
        action="extend",
        default=[],
        metavar="EVALUATOR.OPTION=[a,b]",
    ),
)
def _evaluate(args: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint and print a table; every number goes to RUN/results.json. Features that are
    missing or stale are extracted first."""
    with _importing():
        from ssl_dist.evaluate import search
        from ssl_dist.evaluate.command import evaluate
        from ssl_dist.results.records import table

    overrides = [word for word in args.overrides if "=" in word]
    evaluators = [word for word in args.overrides if "=" not in word]
    if not evaluators:
        raise UserError(f"evaluate {args.run}: name at least one evaluator, for example knn")
    validation = None if args.validation is None else search.validation(args.validation)
    code, records = evaluate(args.run, evaluators, overrides, validation, args.search)
    if outcome.rank_info().is_rank0:
        print(table(records))
    return code


@_command(
    "verify",
    "prove that the number of ranks does not matter",
    _argument(
        "overrides",
        "a YAML file whose method and images are taken; optim.batch_size=32",
        nargs="*",
        metavar="CONFIG|key=value",
    ),
    _argument("--method", "method to certify on digits; may be repeated (default: all)", action="append", default=[]),
    _argument("--steps", "optimizer steps in float64 (default 10); one in float32", type=int, default=10),
    _argument(
        "--device", "that trains; cuda is compared with the CPU in float64", choices=("cpu", "cuda"), default="cpu"
    ),
)
def _verify(args: argparse.Namespace) -> int:
    """The equality certificate: real steps of 2 and 4 ranks, on every grid, against one process. Exit code 1 when a
    bound does not hold."""
    with _importing():
        from ssl_dist.verify.command import verify

    overrides = [word for word in args.overrides if "=" in word]
    files = [word for word in args.overrides if "=" not in word]
    if len(files) > 1:
        raise UserError(f"verify {' '.join(files)}: one config at a time")
    return verify(files[0] if files else None, args.method, overrides, args.steps, args.device)


@_command(
    "study",
    "make a table or figure of a paper: its runs, their evaluation, the page",
    _argument("file", "YAML file of a study; configs/studies/ holds examples", type=_path, metavar="FILE"),
    _argument("overrides", "of every run", nargs="*", metavar="key=value"),
    _argument("--ranks", "processes of every training (default 1)", type=int, default=1),
    _argument(
        "--collect", "train nothing: measure the runs that are complete, and write the table", action="store_true"
    ),
    _argument("--dry-run", "print the runs, their steps and what is left of them", action="store_true"),
)
def _study(args: argparse.Namespace) -> int:
    """Make the runs of a study that are not complete, one after the other, measure them, and write table, numbers and
    figure. Stopped or killed, the same command does what is left. On a cluster: python slurm/submit.py study FILE."""
    with _importing():
        from ssl_dist.study import command

    if args.dry_run:
        print(command.describe(args.file, args.overrides))
        return 0
    return command.run(args.file, args.overrides, args.ranks, args.collect)


@_command(
    "report",
    "make a page of a run, or of several side by side",
    _argument("runs", "folders of runs", nargs="+", type=_path, metavar="RUN"),
    _argument(
        "--out",
        "page to write (default: report.html in the run's folder; of several runs, in the folder that they have in "
        "common)",
        type=_path,
        metavar="FILE",
    ),
)
def _report(args: argparse.Namespace) -> None:
    """Write one HTML page that needs nothing else: health, results beside published ones, curves, views, pictures,
    config. Print the results as a table: mean ± standard deviation over seeds of what several runs share."""
    from ssl_dist.report import report

    print(report(args.runs, args.out))


@_command(
    "export",
    "write a run's backbone for other programs",
    _RUN_OR_FILE,
    _argument("--format", required=True, choices=["torchvision", "timm", "seed"]),
    _argument("--out", "file to write (safetensors; seed: of torch.save)", type=_path, required=True),
)
def _export(args: argparse.Namespace) -> None:
    """Write the encoder of a run's newest checkpoint, by the names that torchvision, timm or the official code of
    relational reasoning (seed) load."""
    from ssl_dist.run.export import export

    line = export(args.run, args.format, args.out)
    print(f"{args.out}: written; load it with\n{line}")


@_command(
    "labels",
    "write the labels that a run gave its images",
    _RUN_OR_FILE,
    _overrides("data.root, data.reader: where the images are"),
    _argument("--out", "file to write", type=_path, required=True, metavar="FILE"),
)
def _labels(args: argparse.Namespace) -> None:
    """Write the labels that a run's method gave its training images to a CSV file: image_id, label_0, ... They are
    labels for another run by data.labels={file: FILE, column: 0}."""
    from ssl_dist.run.labels import export_labels

    print(export_labels(args.run, args.out, args.overrides))


@_command(
    "voc",
    "transfer to PASCAL VOC: classification, detection, segmentation",
    _argument("task", choices=_VOC_TASKS),
    _argument("weights", "a run's folder, or a file of weights", type=_path, metavar="RUN|WEIGHTS"),
    _overrides("options of the task, as batch_size=8; of weights of others also backbone.name"),
    _argument(
        "--root",
        "VOCdevkit/VOC2007; may be repeated: trained on all, tested on the first",
        type=_path,
        action="append",
        required=True,
    ),
    _argument("--out", "folder of results.json, features and checkpoints", type=_path, required=True),
)
def _voc(args: argparse.Namespace) -> int:
    """Fit SVMs on frozen features (classification), or fine-tune Faster R-CNN (detection) or FCN (segmentation), in one
    process; the numbers go to OUT/results.json. The same command again goes on with a training."""
    from ssl_dist.results.records import table
    from ssl_dist.voc import command

    code, records = command.run(args.task, args.weights, args.root, args.out, args.overrides)
    if records:
        print(table(command.headline(records)))
    return code


@_command(
    "keys",
    "what a config may say",
    _argument("section", "optim, method.relational, knn, voc.detection, optim.lr, ... (default: all)", nargs="?"),
    _argument("--markdown", "write Markdown, as in docs/config.md", action="store_true"),
)
def _keys(args: argparse.Namespace) -> None:
    """Print every key of a config, and every option of methods, evaluators and VOC tasks, with its type, range, default
    and meaning."""
    from ssl_dist.config import Config, describe

    tables = describe.tables(Config, "config", "")
    if args.section is None or not describe.find(tables, args.section):
        tables += _option_tables()
    if args.section is not None:
        all_tables, tables = tables, describe.find(tables, args.section)
        if not tables:
            raise describe.unknown(all_tables, args.section)
    columns = shutil.get_terminal_size().columns
    print(describe.as_markdown(tables) if args.markdown else describe.as_text(tables, columns))


def _option_tables() -> "list[Table]":
    """The tables of the options of every method, evaluator and VOC task."""
    from ssl_dist import evaluators, methods
    from ssl_dist.config import describe

    modules = [(f"ssl_dist.methods.{name}", f"method.{name}", "method.options.") for name in methods.names()]
    modules += [(f"ssl_dist.evaluators.{name}", name, f"{name}.") for name in evaluators.names()]
    modules += [(f"ssl_dist.voc.{task}", f"voc.{task}", "") for task in _VOC_TASKS]
    tables = []
    for name, title, path in modules:
        module = importlib.import_module(name)
        tables += describe.tables(module.Options, title, path, module.__doc__)
    return tables


@_command("doctor", "what is missing on this machine")
def _doctor(_args: argparse.Namespace) -> int:
    """Check this machine and say what mends it."""
    from ssl_dist.doctor import run

    return run()
