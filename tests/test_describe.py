"""The tables of config keys: `ssl-dist keys`, and docs/config.md (that it is current: test_project_files.py)."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from ssl_dist import cli, key_tables
from ssl_dist.config import Config, NonNegativeFloat, PositiveInt, Probability, Section, describe


class Inner(Section):
    """Something inside.

    More of it.
    """

    share: Probability = Field(0.25, description="of the whole")


class Base(Section):
    lr: NonNegativeFloat = Field(description="the rate")


class Example(Base):
    lr: NonNegativeFloat = 1e-5
    name: Literal["a", "b"] | None = Field(None, description="one of <two> | more")
    counts: Annotated[list[PositiveInt], Field(min_length=1)] = Field([20, 200], description="of neighbours")
    pair: tuple[Annotated[float, Field(gt=0, lt=1)], bool] = Field(description="two things")
    inner: Inner = Field(default_factory=Inner)
    items: list[Inner] = Field(default_factory=lambda: [Inner(), Inner(share=1.0)], description="several")
    maybe: Inner | Literal["auto"] = "auto"


TABLES = describe.tables(Example, "example", "some.", "About it.\n\nNot this.")


def test_types_ranges_defaults_and_inherited_descriptions():
    example, *inner = TABLES
    assert (example.title, example.about) == ("example", "About it.")
    assert example.rows == (
        ("lr", "number ≥ 0", "1e-5", "the rate"),
        ("name", "a, b or null", "null", "one of <two> | more"),
        ("counts", "list of integer in [1, 1e9]", "[20, 200]", "of neighbours"),
        ("pair", "[number in (0, 1), true or false]", "must be given", "two things"),
        ("items", "list of section", "[{}, {share: 1}]", "several"),
        ("maybe", "section or auto", "auto", "Something inside."),
    )
    assert [table.title for table in inner] == ["some.inner", "some.items.0", "some.maybe"]
    assert inner[0].rows == (("share", "number in [0, 1]", "0.25", "of the whole"),)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("example", ["lr", "name", "counts", "pair", "items", "maybe"]),
        ("some.items", ["share"]),
        ("some", ["share"] * 3),
        ("some.lr", ["lr"]),
        ("some.l", []),
        ("exam", []),
    ],
)
def test_a_name_is_of_a_section_or_of_a_key(name, keys):
    assert [row[0] for table in describe.find(TABLES, name) for row in table.rows] == keys


@pytest.mark.parametrize("width", [80, 130])
def test_the_text_keeps_to_the_width_and_loses_no_word(width):
    tables = [*describe.tables(Config, "config", ""), *key_tables.of_options()]
    text = describe.as_text(tables, width)
    assert max(map(len, text.splitlines())) <= width
    words = [word for table in tables for row in table.rows for word in row[3].replace("-", " ").split()]
    assert set(words) <= set(text.replace("-", " ").split())


@pytest.mark.parametrize("width", [0, 1, 7])
def test_a_terminal_of_hardly_a_column_gets_the_narrowest_text(width):
    assert describe.as_text(TABLES, width) == describe.as_text(TABLES, describe.MIN_WIDTH)


def test_markdown_escapes_what_it_would_take_for_its_own():
    assert r"| `name` | a, b or null | null | one of \<two> \| more |" in describe.as_markdown(TABLES)


def test_every_key_of_the_program_has_a_meaning():
    tables = [*describe.tables(Config, "config", ""), *key_tables.of_options()]
    assert [f"{table.title}: {row[0]}" for table in tables for row in table.rows if not row[3]] == []
    assert sum(len(table.rows) for table in tables) > 230


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optim", ["milestones", "number in [0, 1]"]),
        ("method.relational", ["gamma", "set as method.options.KEY=VALUE", "arXiv:2006.05849"]),
        ("knn", ["knn", "temperature"]),
        ("voc.detection", ["boxes_per_image", "set as KEY=VALUE"]),
    ],
)
def test_the_command_prints_a_section(name, words, capsys):
    assert cli.main(["keys", name]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words) and text.startswith(name)


@pytest.mark.parametrize(("name", "nearest"), [("optm", "'optim'"), ("optim.lrr", "'optim.lr'"), ("kn", "'knn'")])
def test_an_unknown_name_gets_the_nearest(name, nearest, capsys):
    assert cli.main(["keys", name]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"error: keys {name}: no such section or key; did you mean {nearest}?"
