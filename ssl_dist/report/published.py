"""What authors published (published.yaml, beside this file), and which results of a run were measured the same way.

A number stands beside a run of its method, data set and backbone that trains on all images, and a result of the run
beside the number where also the variant of the method, the protocol, the data set and the split that are measured, and
the images that a classifier learned from agree. What else differs the page names: `scores.differences`.
"""

import functools
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import resources
from typing import Literal

from pydantic import Field

from ssl_dist import methods, results
from ssl_dist.config import Config, FiniteFloat, NonNegativeFloat, PositiveInt, Section, validate
from ssl_dist.config.section import parse_yaml
from ssl_dist.data.catalog import CATALOG
from ssl_dist.nn.features import OUTPUT

Scalar = str | int | float | bool | None


class Protocol(Section):
    """How a number was measured: in words, and in fields that a result's record can be compared with."""

    text: str = Field(description="in words")
    trained: Literal["linear classifier", "whole network", "nothing"] = Field(description="by the evaluation")
    evaluator: str | None = Field(None, description="that measures the same way; null: none does, or it is not told")
    results: list[str] = Field(default_factory=list, description="names of its results; * stands for any letters")
    options: dict[str, Scalar] = Field(default_factory=dict, description="of the evaluator, which must agree")
    crops: PositiveInt | None = Field(None, description="of a test image; null: not told")


class Published(Section):
    """One number of a paper or of the authors' own repository."""

    method: str
    dataset: str = Field(description="that was trained on, all its images")
    backbone: str
    variant: str | None = Field(None, description="what sets it apart from other rows, in words")
    options: dict[str, Scalar] = Field(default_factory=dict, description="of the method, which must agree")
    result: str = Field(description="what was measured")
    value: FiniteFloat = Field(description="an accuracy in percent, or a score that ends at 1")
    std: NonNegativeFloat | None = Field(None, description="over the seeds, where the source tells")
    seeds: PositiveInt | None = Field(None, description="of which it is the mean")
    epochs: PositiveInt | None = Field(None, description="of the training, where the source tells")
    batch_size: PositiveInt | None = None
    views: PositiveInt | None = Field(None, description="K, where the method leaves it free")
    measured_on: str | None = Field(None, description="data set of a transfer; null: the one that was trained on")
    split: str | None = Field(description="that is measured; null: the source does not tell")
    protocol: Protocol
    source: str
    line: str = Field(description="where in the source the number stands")

    @property
    def footnote(self) -> str:
        return f"{self.protocol.text}. {self.source}."


class Difference(Section):
    """What a change costs, by a paper that gives no numbers of the two."""

    method: str
    options: dict[str, list[Scalar]] = Field(description="of the method after the change: one of these")
    before: dict[str, Scalar] = Field(description="options of the method before it")
    lowest: FiniteFloat = Field(description="percent")
    highest: FiniteFloat
    text: str
    source: str
    line: str = Field(description="where in the source the numbers stand")

    def is_between(self, config: Config, before: Config) -> bool:
        """Whether the change is one between these two."""
        if (config.method.name, before.method.name) != (self.method, self.method):
            return False
        options = _options(config)
        return all(options.get(key) in values for key, values in self.options.items()) and _agree(
            self.before, _options(before)
        )

    @property
    def words(self) -> str:
        return f"Published difference: {self.lowest:g} to {self.highest:g} %, {self.text} ({self.line}). {self.source}."


class _File(Section):
    """published.yaml: texts and protocols that several rows share, by name, the rows, and differences."""

    sources: dict[str, str]
    protocols: dict[str, Protocol]
    rows: list[dict]
    differences: list[dict]


@functools.cache
def _file() -> _File:
    text = resources.files("ssl_dist.report").joinpath("published.yaml").read_text(encoding="utf-8")
    return validate(_File, parse_yaml(text, "published.yaml"), "published.yaml: ")


@functools.cache
def differences_between() -> tuple[Difference, ...]:
    """All that the file has of two variants of a method."""
    return tuple(
        validate(Difference, row | {"source": _file().sources[row["source"]]}, "published.yaml: differences: ")
        for row in _file().differences
    )


@functools.cache
def read() -> tuple[Published, ...]:
    """All rows of the file."""
    file = _file()
    return tuple(
        validate(
            Published,
            row | {"protocol": file.protocols[row["protocol"]], "source": file.sources[row["source"]]},
            f"published.yaml: row {number}: ",
        )
        for number, row in enumerate(file.rows, 1)
    )


def uses_all_images(config: Config) -> bool:
    """Whether a training takes every image of the data set's own split for it, with the labels that they have."""
    data = config.data
    splits: list[str | None] = [None]
    if entry := CATALOG.get(data.name or ""):
        splits.append(entry.training if methods.find(config.method.name).needs_labels else entry.pretraining)
    return data.split in splits and (data.subset, data.limit, data.labels) == (None, None, None)


def beside(config: Config) -> list[Published]:
    """The rows to show beside a run of this config: of its method, data set and backbone. None where the run uses a
    part of the images, which no row does."""
    if not uses_all_images(config):
        return []
    run = (config.method.name, config.data.name, config.backbone.name)
    return [row for row in read() if (row.method, row.dataset, row.backbone) == run]


def is_of_variant(row: Published, config: Config) -> bool:
    """Whether a run of this config is of the row's variant of the method."""
    return _agree(row.options, _options(config))


def _options(config: Config) -> dict:
    """Of the method, defaults among them."""
    fields = methods.find(config.method.name).Options.model_fields
    return {
        name: field.get_default(call_default_factory=True) for name, field in fields.items()
    } | config.method.options


def agrees(row: Published, record: dict) -> bool:
    """Whether a result was measured as the row's number: a record of results.json, of a run that `beside` and
    `is_of_variant` let stand beside the row."""
    return (
        (record["method"], record["backbone"]) == (row.method, row.backbone)
        and (record["dataset"], record["split"]) == (row.measured_on or row.dataset, row.split)
        and any(fnmatchcase(record["name"], name) for name in row.protocol.results)
        and _agree(row.protocol.options, record["options"])
        and results.layer_of(record) == OUTPUT
        and results.learned_from_all_images(record)
    )


def measured_alike(row: Published, config: Config, records: Sequence[dict]) -> list[dict]:
    """Those of the results of a run of this config that may stand beside the number."""
    if row not in beside(config) or not is_of_variant(row, config):
        return []
    return [record for record in records if agrees(row, record)]


def differences(row: Published, config: Config, record: dict, epochs: float | None, seeds: int = 1) -> list[str]:
    """What differs, in words, between the number and a result that agrees with it. epochs: of the run at the result's
    checkpoint, None: unknown; seeds: that the result is a mean of."""
    found = []
    if row.epochs is not None and (epochs is None or not math.isclose(epochs, row.epochs, rel_tol=0.005)):
        found.append(f"{row.epochs:,} epochs, here {'unknown' if epochs is None else f'{epochs:.4g}'}")
    if row.batch_size not in (None, config.optim.batch_size):
        found.append(f"batches of {row.batch_size:,}, here of {config.optim.batch_size:,}")
    views = config.num_views or getattr(methods.find(config.method.name), "num_views", None)
    if row.views not in (None, views):
        found.append(f"K = {row.views}, here {views}")
    if row.seeds is not None and row.seeds != seeds:
        found.append(f"mean of {row.seeds} seeds, here of {'one' if seeds == 1 else seeds}")
    if config.backbone.weights is not None:
        found.append("here it began from weights of a file")
    crops = record["options"].get("crops") or (10 if re.search(r"\b(10|ten) crops", record["protocol"]) else 1)
    if row.protocol.crops not in (None, crops):
        found.append(f"{row.protocol.crops} crops of a test image, here {crops}")
    if "recipe" in row.protocol.options:  # what else is set replaces a value of the recipe
        for key, value in record["options"].items():
            if key not in ("recipe", "crops") and value is not None and (key, value) != ("epoch", "last"):
                found.append(f"here {row.protocol.evaluator}.{key}={value}")
    return found


def _agree(required: dict[str, Scalar], options: dict) -> bool:
    return all(key in options and options[key] == value for key, value in required.items())
