"""Self-supervised pre-training of image backbones at any world size, and its evaluation.

The public names are those of `__all__`; each is imported when it is first asked for. They follow semantic versioning:
from 1.0 on, a change that breaks a program of others raises the first number.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ssl_dist import evaluate, losses
    from ssl_dist.data.multi_view import MultiView
    from ssl_dist.pretraining import Run, pretrain
    from ssl_dist.run.embedder import Embedder, load
    from ssl_dist.storage.features import Features

__all__ = ["Embedder", "Features", "MultiView", "Run", "evaluate", "load", "losses", "pretrain"]

_HOMES = {  # of what is no module of this package
    "Embedder": "run.embedder",
    "Features": "storage.features",
    "MultiView": "data.multi_view",
    "Run": "pretraining",
    "load": "run.embedder",
    "pretrain": "pretraining",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
