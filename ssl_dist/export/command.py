"""`ssl-dist export`: a run's encoder in a file or folder that other programs load."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_dist.errors import UserError, did_you_mean
from ssl_dist.export import folders, graphs, libraries, trained
from ssl_dist.export.card import card
from ssl_dist.export.folders import is_of_timm
from ssl_dist.export.preprocessing import FILE, preprocessing
from ssl_dist.export.trained import Trained
from ssl_dist.storage.durable import write_together_or_refuse


@dataclass(frozen=True)
class Format:
    """What a format's file holds and how it is loaded, as a function of a run and of its name; or the files of a
    folder, by their names.

    takes: whether there is one for a backbone; backbones: those, in words. suffix: that its reader asks for. channels:
    of images, where it has one number alone.
    """

    takes: Callable[[str], bool] = lambda backbone: True
    backbones: str = ""
    suffix: str = ""
    channels: int | None = None
    file: Callable[[Trained, str], tuple[bytes, str]] | None = None
    folder: Callable[[Trained], dict[str, bytes]] = folders.folder


def _listed(names: tuple[str, ...]) -> tuple[Callable[[str], bool], str]:
    return lambda backbone: backbone in names, ", ".join(names)


_OF_TIMM = is_of_timm, ", ".join(libraries.OF_TIMM) + " and timm/<name>"
FORMATS = {
    "torchvision": Format(*_listed(libraries.OF_TORCHVISION), channels=3, file=libraries.torchvision),
    "timm": Format(*_OF_TIMM, file=libraries.timm),
    "timm-folder": Format(*_OF_TIMM),
    "huggingface": Format(folder=lambda run: {**folders.folder(run), "README.md": card(run)}),
    "detectron2": Format(*_listed(libraries.OF_DETECTORS), ".pth", 3, libraries.detectron2),
    "mmdet": Format(*_listed(libraries.OF_DETECTORS), ".pth", 3, libraries.mmdet),
    "onnx": Format(file=graphs.onnx),
    "pt2": Format(suffix=".pt2", file=graphs.pt2),
    "seed": Format(file=libraries.seed),
}


def export(run: Path, form: str, outs: Sequence[Path], overwrite: bool = False) -> str:
    """Write the encoder of a run (or of a checkpoint file) to the one of `outs`, beside it or in it how images are
    prepared; returns what to tell the user, with Python that loads it.

    Raises `UserError` where the format's library has no such backbone, and for what is there unless `overwrite`.
    """
    if form not in FORMATS:
        hint = did_you_mean(form, FORMATS)
        raise UserError(f"--format {form}: no such format; {hint}formats: {', '.join(FORMATS)}")
    if len(outs) != 1:
        raise UserError(f"export {run}: give one file or folder to write: ssl-dist export {run} OUT --format {form}")
    of, out = FORMATS[form], outs[0]
    if not out.name.endswith(of.suffix):
        raise UserError(f"{out}: a file of --format {form} must end with {of.suffix} to be read; give {out}{of.suffix}")
    if of.file is None:
        names = [folders.WEIGHTS, folders.CONFIG, FILE, *(["README.md"] if form == "huggingface" else [])]
        paths = [out / name for name in names]
    else:
        paths = [out, beside(out)]
    _refuse_existing(out, paths, of.file is None, overwrite)
    subject = trained.read(run)
    _refuse_backbone(form, subject)
    if of.file is None:
        files = {out / name: content for name, content in of.folder(subject).items()}
        line = f"model = ssl_dist.load({str(out)!r})"
        if form == "timm-folder":
            line = f"model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True, num_classes=0)"
    else:
        content, line = of.file(subject, str(out))
        files = {beside(out): folders.as_json(preprocessing(subject.encoder)), out: content}
    assert files.keys() == set(paths), "what is written was looked for before"
    write_together_or_refuse(out, files)
    return f"{out}: written; load it with\n{line}\nimages: {out / FILE if of.file is None else beside(out)}"


def beside(out: Path) -> Path:
    """The file that says how images are prepared for the network in `out`."""
    return out.with_name(f"{out.name}.{FILE}")


def _refuse_existing(out: Path, paths: list[Path], is_folder: bool, overwrite: bool) -> None:
    if out.is_dir() and not is_folder:
        raise UserError(f"{out}: is a folder, and this format is a file; give a file in it")
    if out.exists() and not out.is_dir() and is_folder:
        raise UserError(f"{out}: is a file, and this format is a folder; give another OUT")
    for path in paths:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is there and is no regular file; give another OUT")
    there = [path for path in paths if os.path.lexists(path)]
    if there and not overwrite:
        raise UserError(f"{there[0]}: is there already; give another OUT, or --overwrite")


def _refuse_backbone(form: str, subject: Trained) -> None:
    name, channels = subject.backbone, subject.encoder.channels
    fitting = [other for other, of in FORMATS.items() if of.takes(name) and of.channels in (None, channels)]
    if form in fitting:
        return
    program = form.removesuffix("-folder")
    what = f"{name} for images of {channels} channels"
    if not FORMATS[form].takes(name):
        what = f"network with the tensors of backbone {name}, but of {FORMATS[form].backbones}"
    raise UserError(f"--format {form}: {program} has no {what}; use --format {', '.join(fitting)}")
