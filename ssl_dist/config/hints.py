"""The keys behind the words of the field and of other programs: `lr=0.1` is meant for optim.lr."""

import re
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from ssl_dist.config.section import section_in

# Key: the words that others have for it.
_WORDS = {
    "data.image_size": ("crop", "crop_size", "img_size", "input_size", "resolution", "imsize"),
    "data.name": ("dataset", "dataset_name"),
    "data.root": ("data_dir", "data_path", "dataset_dir", "folder", "path", "dir"),
    "data.workers": ("num_workers", "n_workers", "workers", "num_threads", "threads", "j"),
    "data.limit": ("num_images", "max_images", "n_images"),
    "views.num": ("k", "num_views", "n_views", "num_augmentations", "augmentations"),
    "backbone.name": ("arch", "model", "net", "network", "architecture", "encoder"),
    "backbone.weights": ("pretrained", "checkpoint_path", "init"),
    "method.options.temperature": ("temperature", "temp", "tau"),
    "optim.name": ("optimizer", "opt"),
    "optim.lr": ("learning_rate", "base_lr", "rate"),
    "optim.batch_size": ("bs", "batch", "batchsize", "global_batch_size"),
    "optim.epochs": ("max_epochs", "num_epochs", "n_epochs", "epoch"),
    "optim.steps": ("max_steps", "num_steps", "iterations", "max_iter"),
    "optim.weight_decay": ("wd", "weight_decay"),
    "optim.warmup_epochs": ("warmup", "warm_up", "warmup_epoch"),
    "optim.schedule": ("scheduler", "lr_schedule", "lr_scheduler", "sched"),
    "precision": ("mixed_precision", "dtype"),
    "run_dir": ("output_dir", "out_dir", "out", "output", "save_dir", "log_dir", "logdir", "exp", "name"),
    "checkpoint.every_epochs": ("save_freq", "save_every"),
    "log.every_steps": ("print_freq", "log_every", "log_freq"),
}
# What is no key, or has one value. {value}: what was given.
_SENTENCES = {
    "device": "there is no such key: a GPU is used where there is one, and CUDA_VISIBLE_DEVICES= before the command "
    "hides it",
    "gpus": "there is no such key: each GPU has a process, {value} of them by "
    "`bash launch/torchrun_single.sh {value} CONFIG`",
    "resume": "there is no such key: the same command again goes on with the run in run_dir",
    "amp": "write precision=bf16",
    "bf16": "write precision=bf16",
    "fp16": "write precision=fp16",
}  # fmt: skip
_SAME = {
    "device": ("cuda", "gpu", "no_cuda"),
    "gpus": ("num_gpus", "n_gpus", "ngpus", "devices", "world_size", "nproc", "ranks"),
    "amp": ("use_amp", "half"),
}
_PLAIN = re.compile(r"[\w./~+-]+")


def for_unknown(config: type[BaseModel], path: Sequence[int | str], value: object) -> str:
    """What to write in the place of the unknown key at `path`, as a sentence without its end; else nothing."""
    word = str(path[-1]).lower().replace("-", "_").lstrip("_")
    for name, sentence in _SENTENCES.items():
        if word in (name, *_SAME.get(name, ())):
            number = value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else "N"
            return sentence.format(value=number)
    inside = {
        key.rpartition(".")[2] for key in _keys(config) if key.rpartition(".")[0] == ".".join(map(str, path[:-1]))
    }
    keys = [key for key in _keys(config) if key.rpartition(".")[2] == word]
    keys = keys if len(keys) == 1 else [key for key, words in _WORDS.items() if word in words]
    if not keys or word in inside:
        return ""
    return f"write {keys[0]}{'' if isinstance(value, bool) else _assigned(value)}"


def _keys(config: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys with dots, but for those of items of lists."""
    for name, field in config.model_fields.items():
        section = None if "list[" in str(field.annotation) else section_in(field.annotation)
        yield prefix + name
        if section is not None:
            yield from _keys(section, f"{prefix}{name}.")


def _assigned(value: object) -> str:
    """=value as an override has it, where it is short and plain; else nothing."""
    return f"={value}" if isinstance(value, int | float | str) and _PLAIN.fullmatch(str(value)) else ""
