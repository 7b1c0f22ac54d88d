"""The commands. Thin: they read arguments, call one function and turn what it raises into an exit code."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ssl_dist import outcome, quickstart, terminal  # noqa: F401 # quickstart is a command
from ssl_dist.command_line import Argument, argument, command, home_path, importing, parse
from ssl_dist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code; argparse exits by itself for a wrong command line (2) and --help (0)."""
    with terminal.lasting() as output:
        parsed = parse(arguments)
        return outcome.of(lambda: parsed.action(parsed), output)


def _overrides(help: str) -> Argument:
    return argument("overrides", help, nargs="*", metavar="key=value")


_PLUGINS = argument(
    "--plugins",
    "a Python file with a method, backbones or an evaluator of your own; may be repeated",
    type=home_path,
    action="append",
    default=[],
    metavar="FILE",
)
_CONFIG: tuple[Argument, ...] = (
    argument("config", "a YAML file; configs/ holds one for every row of the papers' tables"),
    _overrides("for example optim.lr=1e-3 data.limit=1000"),
    _PLUGINS,
)
_RUN_OR_FILE = argument("run", "a run's folder, or one checkpoint file", type=home_path, metavar="RUN")


def _plugged(args: argparse.Namespace) -> list[str]:
    """Load the files of --plugins. Returns the overrides that name them in a config."""
    from ssl_dist import plugins

    return plugins.choose(args.plugins)


# Imports stand inside the commands: torch and numba cost seconds that --help need not wait for.


@command(
    "convert",
    "write a data set as .beton files",
    argument(
        "dataset",
        "cifar10, cifar100, supercifar100, stl10, svhn, tiny-imagenet, slimagenet64, imagenet, food101, flowers102, "
        "pets, aircraft, cars, dtd, eurosat, digits; of your own: folder (<split>/<class>/), webdataset (tar shards), "
        "parquet, huggingface (what datasets saved)",
    ),
    argument(
        "--root", "where the images are (CIFAR, STL-10, SVHN: downloaded to), or 'train-{000..127}.tar'", type=home_path
    ),
    argument("--out", "where to write; becomes data.root (default data/<dataset>)", type=home_path),
    argument("--name", "name of images of your own (default: of ROOT); a catalog name brings its facts along"),
    argument("--image-key", "suffix of the images in webdataset; their column in parquet and huggingface"),
    argument("--label-key", "of labels in .json, not .cls, in webdataset; their column in parquet and huggingface"),
    argument("--max-side", "longer images are shrunk to this many pixels (default: catalog)", type=int),
    argument("--max-pixels", "largest picture that is read (default 178956970)", type=int),
    argument("--workers", "threads that encode (default: all cores)", type=int),
    argument("--skip-damaged", "leave out unreadable images, and name them in dataset.json", action="store_true"),
    argument("--unlabeled", "all images below ROOT are one split without labels", action="store_true"),
    argument("--ignore-orientation", "leave images of your own on their side where EXIF says so", action="store_true"),
    argument("--channels", "of images of your own, 1 to 32 of 8 or 16 bits: npy, TIFF, PNG (default: RGB)", type=int),
    argument("--recheck", "compare the bytes of the source's images with those of before", action="store_true"),
)
def _convert(args: argparse.Namespace) -> None:
    """Write <split>.beton for every split of a data set, and dataset.json. A killed conversion goes on after the last
    complete split."""
    from ssl_dist.convert.command import convert, usage

    manifest = convert(**{name: value for name, value in vars(args).items() if name != "action"})
    print(usage(args.out or Path("data", manifest.name), manifest))


@command("train", "pre-train, or go on with a run", *_CONFIG)
def _train(args: argparse.Namespace) -> int:
    """Pre-train by a config, alone or under torchrun (launch/torchrun_single.sh). The same command again resumes."""
    with importing():
        from ssl_dist import config
        from ssl_dist.train.loop import train

    return train(config.load(args.config, [*_plugged(args), *args.overrides], outcome.note))


@command(
    "explain",
    "what a config will do",
    *_CONFIG,
    argument("--world", "ranks (default 1)", type=int, default=1),
    argument("--ranks-per-node", "ranks of a node (default: all on one)", type=int),
    argument("--device", "that would train: cpu, cuda; v100, a100, h100, h200 for its time (default: what is here)"),
    argument("--rates", "for the time on a CPU: what tools/bench_rates.py wrote", type=home_path, metavar="FILE"),
)
def _explain(args: argparse.Namespace) -> None:
    """Print what a config will do, on any number of ranks, without starting anything. Mistakes show here first."""
    with importing():
        from ssl_dist import config
        from ssl_dist.train.explain import explain

    if args.world < 1:
        raise UserError(f"--world {args.world}: at least one rank is needed")
    if args.ranks_per_node is not None and (args.ranks_per_node < 1 or args.world % args.ranks_per_node):
        raise UserError(f"--ranks-per-node {args.ranks_per_node}: must divide --world {args.world}")
    settings = config.load(args.config, [*_plugged(args), *args.overrides], outcome.note)
    print(explain(settings, args.world, args.ranks_per_node, args.device, args.rates))


@command(
    "extract",
    "write features files",
    argument("weights", "a run's folder, or one checkpoint file", type=home_path, metavar="RUN|WEIGHTS"),
    _overrides(
        "data.root, data.name, data.reader of another set; data.image_size, data.eval_resize, data.eval_interpolation; "
        "layer=layer3, or class+patches: features of stages of the backbone in its output's place; "
        "for weights of others also backbone.name, views.normalize"
    ),
    argument("--out", "folder to write to (default RUN/features)", type=home_path),
    argument(
        "--split", "split to extract; may be repeated (default: training and test, or what there is)", action="append"
    ),
    _PLUGINS,
)
def _extract(args: argparse.Namespace) -> None:
    """Pass every image of a split through a run's frozen backbone: features/<dataset>-<split>.safetensors. Works under
    torchrun too; the file is the same. Weights of others need backbone.name and data.root."""
    with importing():
        from ssl_dist.evaluate.command import extract

    _plugged(args)
    for path in extract(args.weights, args.split or [], args.overrides, args.out):
        print(path)


@command(
    "evaluate",
    "measure a run",
    argument("run", "a run's folder, or a file of weights of others", type=home_path, metavar="RUN|WEIGHTS"),
    argument(
        "overrides",
        "knn, logistic, probe, finetune, classify, ...; knn.k=[20,200] sets an option; data.root=... another data set; "
        "data.image_size=... another size of images; layer=class+patches in the output's place; "
        "data.subset={per_class: 260} or a list of ids: what to learn from; of others also backbone.name",
        nargs="+",
        metavar="EVALUATOR|key=value",
    ),
    argument("--out", "for weights of others: the folder of their features and results", type=home_path),
    argument(
        "--split", "measure this split in the test split's place; without labels only retrieval, clusters, embedding"
    ),
    argument(
        "--validation",
        "measure on this share of the training split, held out of it, and leave the test split alone; "
        "{per_class: 260, start: 260} or a list of ids: on these images",
        metavar="SHARE|IMAGES",
    ),
    argument(
        "--search",
        "try every combination on a held-out share (0.1, or that of --validation), then measure the one with the "
        "highest top-1 on the test split",
        nargs="+",
        action="extend",
        default=[],
        metavar="EVALUATOR.OPTION=[a,b]",
    ),
    _PLUGINS,
)
def _evaluate(args: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint and print a table; every number goes to RUN/results.json. Features that are
    missing or stale are extracted first."""
    with importing():
        from ssl_dist.evaluate import search
        from ssl_dist.evaluate.command import evaluate
        from ssl_dist.results.records import table

    overrides = [word for word in args.overrides if "=" in word]
    evaluators = [word for word in args.overrides if "=" not in word]
    if not evaluators:
        raise UserError(f"evaluate {args.run}: name at least one evaluator, for example knn")
    _plugged(args)
    validation = None if args.validation is None else search.validation(args.validation)
    code, records = evaluate(args.run, evaluators, overrides, validation, args.search, args.split, args.out)
    if records and outcome.rank_info().is_rank0:
        print(table(records))
    return code


@command(
    "verify",
    "prove that the number of ranks does not matter",
    argument(
        "overrides",
        "a YAML file whose method and images are taken; optim.batch_size=32",
        nargs="*",
        metavar="CONFIG|key=value",
    ),
    argument("--method", "method to certify on digits; may be repeated (default: all)", action="append", default=[]),
    argument("--steps", "optimizer steps in float64 (default 10); one in float32", type=int, default=10),
    argument(
        "--device", "that trains; cuda is compared with the CPU in float64", choices=("cpu", "cuda"), default="cpu"
    ),
    _PLUGINS,
)
def _verify(args: argparse.Namespace) -> int:
    """The equality certificate: real steps of 2 and 4 ranks, on every grid, against one process. Exit code 1 when a
    bound does not hold."""
    with importing():
        from ssl_dist.verify.command import verify

    overrides = [*_plugged(args), *(word for word in args.overrides if "=" in word)]
    files = [word for word in args.overrides if "=" not in word]
    if len(files) > 1:
        raise UserError(f"verify {' '.join(files)}: one config at a time")
    return verify(files[0] if files else None, args.method, overrides, args.steps, args.device)


@command(
    "study",
    "make a table or figure of a paper: its runs, their evaluation, the page",
    argument("file", "YAML file of a study; configs/studies/ holds examples", type=home_path, metavar="FILE"),
    argument("overrides", "of every run", nargs="*", metavar="key=value"),
    argument("--ranks", "processes of every training (default 1)", type=int, default=1),
    argument("--only", "make and measure this run alone, also under torchrun or srun", metavar="NAME"),
    argument(
        "--collect", "train nothing: measure the runs that are complete, and write the table", action="store_true"
    ),
    argument(
        "--dry-run",
        "print the runs, their steps and what is left of them; needs no data set that papers use",
        action="store_true",
    ),
    argument("--device", "with --dry-run: the hours on --ranks of this GPU, one that `explain --device` knows"),
    _PLUGINS,
)
def _study(args: argparse.Namespace) -> int:
    """Make the runs of a study that are not complete, one after the other, measure them, and write table, numbers and
    figure. Stopped or killed, the same command does what is left. On a cluster: python slurm/submit.py study FILE."""
    with importing():
        from ssl_dist.study.command import run
        from ssl_dist.study.dry_run import describe

    overrides = [*_plugged(args), *args.overrides]
    if args.dry_run:
        print(describe(args.file, overrides, args.ranks, args.device))
        return 0
    return run(args.file, overrides, args.ranks, args.collect, args.only)


@command(
    "report",
    "make a page of a run, or of several side by side",
    argument("runs", "folders of runs", nargs="+", type=home_path, metavar="RUN"),
    argument(
        "--out",
        "page to write (default: report.html in the run's folder; of several runs, in the folder that they have in "
        "common)",
        type=home_path,
        metavar="FILE",
    ),
    argument("--csv", "file for the means as CSV, a line for each", type=home_path, metavar="FILE"),
    argument("--latex", "file for them as a tabular of LaTeX (booktabs)", type=home_path, metavar="FILE"),
    argument("--figures", "folder for plots against what was varied (PNG, SVG)", type=home_path, metavar="FOLDER"),
    _PLUGINS,
)
def _report(args: argparse.Namespace) -> None:
    """Write one HTML page that needs nothing else: health, results beside published ones, curves, views, pictures,
    config. Print the results as a table: mean ± standard deviation over seeds of what several runs share. Groups of
    runs are named by the keys that differ between them."""
    from ssl_dist.report import report

    _plugged(args)
    print(report(args.runs, args.out, args.csv, args.latex, args.figures))


@command(
    "export",
    "write a run's backbone for other programs",
    _RUN_OR_FILE,
    argument("out", "file or folder to write", nargs="*", action="extend", type=home_path, metavar="OUT"),
    argument("--format", "one of those above; docs/weights.md has more on each", required=True),
    argument("--out", "the same", action="append", type=home_path),
    argument("--overwrite", "write in the place of what is there", action="store_true"),
    _PLUGINS,
)
def _export(args: argparse.Namespace) -> None:
    """Write the encoder of a run's newest checkpoint as a file (torchvision, timm, detectron2, mmdet, onnx, pt2, and
    seed: the official code of relational reasoning) or a folder (timm-folder, huggingface: with a model card)."""
    from ssl_dist.export.command import export

    _plugged(args)
    print(export(args.run, args.format, args.out, args.overwrite))


@command(
    "import",
    "go on with a run of relational reasoning's official code",
    argument("file", "its archive: backbone, head and optimizer", type=home_path, metavar="FILE"),
    *_CONFIG,
    argument("--epoch", "that it was saved after (default: as its name says)", type=int),
)
def _import(args: argparse.Namespace) -> None:
    """Make the archive a checkpoint of a new run; `ssl-dist train` with the same config goes on from there."""
    with importing():
        from ssl_dist import config
        from ssl_dist.train.official import take_over

    settings = config.load(args.config, [*_plugged(args), *args.overrides], outcome.note)
    print(take_over(args.file, settings, args.epoch))


@command(
    "labels",
    "write the labels that a run gave its images, or those of SeLa's authors",
    argument(
        "run",
        "a run's folder, or one checkpoint file; with --images a checkpoint of SeLa's official code, or a list of "
        "file names and labels (CSV)",
        type=home_path,
        metavar="RUN|FILE",
    ),
    _overrides("data.root, data.reader: where the images are; with --images data.root and data.split"),
    argument("--out", "file to write", type=home_path, required=True, metavar="FILE"),
    argument("--images", "labels of others: the image folder that data.root was converted from", type=home_path),
    _PLUGINS,
)
def _labels(args: argparse.Namespace) -> None:
    """Write the labels that a run's method gave its training images to a CSV file: image_id, label_0, ... They are
    labels for another run by data.labels={file: FILE, column: 0}. With --images the labels are those of a file of
    SeLa's authors."""
    from ssl_dist.run.imported_labels import import_labels
    from ssl_dist.run.labels import export_labels

    _plugged(args)
    if args.images is None:
        print(export_labels(args.run, args.out, args.overrides))
    else:
        print(import_labels(args.run, args.images, args.out, args.overrides))


@command(
    "voc",
    "transfer to PASCAL VOC: classification, finetune, detection, segmentation",
    argument("task", choices=["classification", "finetune", "detection", "segmentation"]),
    argument("weights", "a run's folder, or a file of weights", type=home_path, metavar="RUN|WEIGHTS"),
    _overrides("options of the task, as batch_size=8; of weights of others also backbone.name"),
    argument(
        "--root",
        "VOCdevkit/VOC2007; may be repeated: trained on all, tested on the first",
        type=home_path,
        action="append",
        required=True,
    ),
    argument("--out", "folder of results.json, features and checkpoints", type=home_path, required=True),
    _PLUGINS,
)
def _voc(args: argparse.Namespace) -> int:
    """Fit SVMs on frozen features (classification), or fine-tune: a linear classifier (finetune), Faster R-CNN
    (detection) or FCN (segmentation), in one process; the numbers go to OUT/results.json. The same command again goes
    on with a training."""
    from ssl_dist.results.records import table
    from ssl_dist.voc.command import headline, run

    _plugged(args)
    code, records = run(args.task, args.weights, args.root, args.out, args.overrides)
    if records:
        print(table(headline(records)))
    return code


@command(
    "keys",
    "what a config may say",
    argument("section", "optim, method.relational, knn, voc.detection, optim.lr, ... (default: all)", nargs="?"),
    argument("--markdown", "write Markdown, as in docs/config.md", action="store_true"),
    _PLUGINS,
)
def _keys(args: argparse.Namespace) -> None:
    """Print every key of a config, and every option of methods, evaluators and VOC tasks, with its type, range, default
    and meaning."""
    from ssl_dist import key_tables

    _plugged(args)
    print(key_tables.show(args.section, args.markdown))


@command("doctor", "what is missing on this machine")
def _doctor(_args: argparse.Namespace) -> int:
    """Check this machine and say what mends it."""
    from ssl_dist.doctor import run

    return run()
