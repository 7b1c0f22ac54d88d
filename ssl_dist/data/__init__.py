"""Converted data sets: what is known of them, their files and readers, the order of their images, the loader."""

__all__ = [
    "arrays",
    "beton",
    "catalog",
    "labels",
    "loader",
    "manifest",
    "normalize",
    "pillow",
    "plan",
    "reader",
    "readers",
]
