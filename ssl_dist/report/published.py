"""What authors published for a run's method, data set and backbone: published.yaml, beside this file."""

from importlib import resources

from pydantic import Field

from ssl_dist.config import Config, FiniteFloat, PositiveInt, Section, validate
from ssl_dist.config.section import parse_yaml


class Published(Section):
    """One number of a paper or of the authors' own repository."""

    method: str
    dataset: str
    backbone: str | None = Field(description="null: the source does not name it")
    variant: str | None = Field(None, description="what sets it apart from other rows of the same method")
    result: str = Field(description="what was measured")
    value: FiniteFloat = Field(description="an accuracy in percent, or a score that ends at 1")
    std: FiniteFloat | None = Field(None, description="over seeds")
    epochs: PositiveInt | None = Field(None, description="of the pre-training, where the source tells")
    batch_size: PositiveInt | None = None
    like: list[str] = Field(default_factory=list, description="beginnings of the names of results that come near")
    protocol: str
    source: str = Field(description="where the number was read")

    @property
    def footnote(self) -> str:
        return f"{self.protocol}. {self.source}."


def read() -> list[Published]:
    """All rows of the file."""
    text = resources.files("ssl_dist.report").joinpath("published.yaml").read_text(encoding="utf-8")
    return [
        validate(Published, row, f"published.yaml: row {number}: ")
        for number, row in enumerate(parse_yaml(text, "published.yaml"), 1)
    ]


def beside(settings: Config) -> list[Published]:
    """The rows to show beside a run of this config: of its method, data set and backbone, or of one that the source
    does not name. None where the run uses a part of the images, which no row does."""
    data = settings.data
    if data.subset is not None or data.limit is not None:
        return []
    return [
        row
        for row in read()
        if (row.method, row.dataset) == (settings.method.name, data.name)
        and row.backbone in (None, settings.backbone.name)
    ]
