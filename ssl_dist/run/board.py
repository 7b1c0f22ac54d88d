"""A run in TensorBoard: files of events, what its tags mean, and its settings and results as hyperparameters.

TensorBoard's packages take a second to import, which only a process that writes a file need spend.
"""

import io
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ssl_dist.nn import features
from ssl_dist.run.folder import is_free
from ssl_dist.storage import durable

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

_SECOND = re.compile(r"events\.out\.tfevents\.(\d{10})\.")

# Of every method; what a method logs beside these, the docstring of its `forward` describes.
MEANINGS = {
    "loss": "The loss of the global batch at this step.",
    "lr": "The learning rate of this step, for parameters without a factor of their own.",
    "accuracy": "The share of the pretext task that is solved, in percent, in the batch of this step.",
    "loss_scale": "The loss is multiplied by it before the backward pass, so that gradients do not vanish in fp16.",
    "feature_std": "The spread of the normalised representations: 1 for isotropic ones, 0 when they have collapsed.",
    "effective_rank": "The number of directions in which the representations vary.",
    "online_knn20": "Percent of held-out images of the training split that a kNN of the other ones classifies right.",
    "online_probe": "Percent of the same held-out images that the linear probe, which learns beside, classifies right.",
    "images_per_s": "Images of the global batch a second, since the line before.",
    "views_per_s": "Views of the global batch a second, since the line before.",
    "data_wait": "The share of the time, from 0 to 1, in which the loop waited for images.",
    "seconds_per_step": "The mean time of a step since the line before.",
    "views": "Views of some images of this step, as the network sees them: a row for each image, group beside group.",
    "filters": "The filters of the backbone's first convolution.",
    "attention": "What the class token takes of each patch in the last block: image, mean over the heads, each head.",
    "patch_pca": "The first three principal components of the patches' features as red, green and blue, by the image.",
    "config": "The config of the run, as its folder has it.",
}


class EventFile:
    """A file of TensorBoard's events, whole at any time. torch's SummaryWriter writes in a thread of its own, which
    prints a traceback where the disk is full.

    purge_step: TensorBoard passes over what former files hold from this step on; None: over nothing. meanings: what
    the last part of a tag (train/loss: loss) stands for; others: what is said of the tags that have none.
    """

    _numbers = itertools.count()

    def __init__(self, folder: Path, purge_step: int | None, meanings: Mapping[str, str] = MEANINGS, others: str = ""):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files by name, so one that is begun later sorts later, also where the clock was set back
        former = [int(match[1]) for match in map(_SECOND.match, os.listdir(folder)) if match]
        second = max([int(time.time()), *(second + 1 for second in former)])
        start = f"{second}.{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
        self._path = folder / f"events.out.tfevents.{start}"
        self._meanings, self._others = meanings, others
        self._described: set[str] = set()
        events = [Event(step=purge_step, file_version="brain.Event:2")]
        if purge_step is not None:
            events.append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._append(events)

    def add(self, step: int, *summaries: "Summary") -> None:
        """Write summaries of torch.utils.tensorboard.summary. Raises OSError with the file's name."""
        from tensorboard.compat.proto.event_pb2 import Event

        for value in (value for summary in summaries for value in summary.value):
            name = value.tag.removesuffix("/text_summary").rpartition("/")[2]
            if value.tag not in self._described:  # once is enough: TensorBoard shows the description that comes first
                value.metadata.summary_description = self._meanings.get(name, self._others)
                self._described.add(value.tag)
        self._append([Event(step=step, summary=summary) for summary in summaries])

    def _append(self, events: Sequence["Event"]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        durable.append(self._path, records.getvalue())


def settings(tree: Mapping[str, Any]) -> list["Summary"]:
    """The settings of a run as text; and those that change its numbers as hyperparameters, one for each number, word or
    list in the tree, by its key with dots. Without a summary of the experiment, TensorBoard makes the table of all runs
    that it finds."""
    from torch.utils.tensorboard import summary

    text = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=110)
    values = {key: value for key, value in _flat(tree).items() if not is_free(key)}
    return [summary.text("config", f"```yaml\n{text}```"), _session(values)]


def _session(values: Mapping[str, Any]) -> "Summary":
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    info = SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[name].number_value = value
        else:
            info.hparams[name].string_value = value if isinstance(value, str) else json.dumps(value)
    return _of_plugin(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info))


def completed() -> "Summary":
    """That the run is complete, for its row of the hyperparameters."""
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    info = SessionEndInfo(status=Status.Value("STATUS_SUCCESS"), end_time_secs=time.time())
    return _of_plugin(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))


def _of_plugin(tag: str, content: Any) -> "Summary":
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import metadata

    content.version = metadata.PLUGIN_DATA_VERSION
    data = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=data), tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys with dots and their values; items of a list of sections have their number for a key. None is left out."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            values |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            values[f"{prefix}{key}"] = value
    return values


def write_results(run: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add results of a run's checkpoints to TensorBoard, in a folder beside the training's, where they are metrics of
    its hyperparameters. The protocol describes each.

    Raises OSError. A training that goes on meanwhile is shown to its end: TensorBoard leaves a file for good when there
    is a later one in its folder.
    """
    from torch.utils.tensorboard import summary

    meanings = {features.named(record["name"], record["layer"]): record["protocol"] for record in records}
    file = EventFile(run / "tensorboard" / "results", None, meanings)
    for record in records:
        tag = f"{record['dataset']}-{record['split']}/{features.named(record['name'], record['layer'])}"
        file.add(record["step"], summary.scalar(tag, record["value"]))
