"""The results of evaluations: numbers in results.json, and pictures."""

from ssl_dist.results.records import (
    FITTED_ON,
    IDENTITY,
    add,
    is_of_a_whole_split,
    label,
    layer_of,
    learned_from_all_images,
    make_records,
    number,
    read,
    require_writable,
    size_of,
    table,
)

__all__ = [
    "FITTED_ON", "IDENTITY", "accuracy", "add", "charts", "confusion", "figures", "is_of_a_whole_split",
    "label", "layer_of", "learned_from_all_images", "make_records", "number", "read", "require_writable", "sampling",
    "size_of", "table",
]  # fmt: skip
