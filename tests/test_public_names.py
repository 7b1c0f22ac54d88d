"""`import ssl_dist`: what it offers, and that it costs and changes nothing before it is used."""

import subprocess
import sys

import pytest

import ssl_dist

PUBLIC = {
    "Embedder": ["device", "embed", "forward", "transform"],
    "Features": ["classes", "dim", "features", "read", "rows", "subset", "take", "write"],
    "losses": [
        "AlignUniform", "DeepInfoMax", "NTXent", "ReLIC", "RelationModule", "Relational", "SFRIK", "VICReg",
        "align_uniform", "barlow_twins", "byol", "dcl", "deepcluster", "dino", "dino_center", "lejepa", "mae",
        "mocov2", "mocov3", "nt_xent", "relational", "relic", "sela", "sela_labels", "sfrik", "sigreg", "simsiam",
        "vicreg",
    ],
    "MultiView": ["batch", "over", "set_epoch"],
    "Run": ["evaluate", "metrics", "plot", "report", "results", "step"],
    "evaluate": ["clusters", "evaluate", "extract", "knn", "logistic", "logistic_sgd", "retrieval"],
    "load": [],
    "pretrain": [],
}  # fmt: skip
LOOK = """
import os, sys
before = dict(os.environ), set(sys.modules)
import ssl_dist
assert dict(os.environ) == before[0]
print(*sorted(name for name in set(sys.modules) - before[1] if "." not in name and not name.startswith("_")))
"""


def test_every_public_name_is_there_and_described():
    assert sorted(PUBLIC) == sorted(ssl_dist.__all__) and dir(ssl_dist) == sorted([*PUBLIC, "__version__"])
    for name, members in PUBLIC.items():
        value = getattr(ssl_dist, name)
        assert value.__doc__ and sorted(getattr(value, "__all__", members)) == sorted(members)
        for member in members:
            assert getattr(value, member, None) is not None and getattr(value, member).__doc__, f"{name}.{member}"


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'loses'"):
        _ = ssl_dist.loses


def test_the_import_is_light_and_leaves_the_environment_alone():
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"ssl_dist", "importlib", "typing", "warnings", "collections", "functools", "re"}
