"""What a config may say: the tables that `ssl-dist keys` prints, of every section and of all options."""

import shutil
import sys

from ssl_dist.config import Config, describe
from ssl_dist.config.describe import Table


def show(section: str | None, markdown: bool) -> str:
    """The tables as text or Markdown: all of them, or a section or key by its name. Raises `UserError` for a name that
    is neither."""
    tables = describe.tables(Config, "config", "")
    if section is None or not describe.find(tables, section):
        tables += of_options()
    if section is not None:
        all_tables, tables = tables, describe.find(tables, section)
        if not tables:
            raise describe.unknown(all_tables, section)
    return describe.as_markdown(tables) if markdown else describe.as_text(tables, shutil.get_terminal_size().columns)


def of_options() -> list[Table]:
    """The tables of the options of every method, evaluator and VOC task."""
    from ssl_dist import evaluators, methods  # seconds, which the keys of a config need not wait for
    from ssl_dist.voc import options

    tables = []
    for name in methods.names():
        method = methods.find(name)
        about = sys.modules[method.__module__].__doc__
        tables += describe.tables(method.Options, f"method.{name}", "method.options.", about)
    for name in evaluators.names():
        evaluator = evaluators.find(name)
        tables += describe.tables(evaluator.Options, name, f"{name}.", evaluator.__doc__)
    for task, section in options.OF_TASK.items():
        tables += describe.tables(section, f"voc.{task}", "", section.__doc__)
    return tables
