"""Every file of configs/: it loads, its method and backbone can be built, and it says how to run it."""

import re
from pathlib import Path

import pytest
import torch

from ssl_dist import config, methods
from ssl_dist.methods.base import Info
from ssl_dist.run.network import build_method
from ssl_dist.views.make import view_specs

FILES = sorted(path for path in Path("configs").rglob("*.yaml") if path.parent.name != "studies")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to("configs")))
def test_config_can_be_built(path):
    settings = config.load(path)
    method_class = methods.find(settings.method.name)
    options = methods.build_options(method_class, settings.method.options)
    fixed = getattr(method_class, "num_views", None)
    assert fixed is None or settings.num_views in (None, fixed)
    specs = view_specs(settings.views.groups, settings.num_views or fixed, settings.data.image_size)
    groups = tuple((spec.num, spec.size) for spec in specs)
    labelled = settings.data.name != "stl10" or method_class.needs_labels
    info = Info(10**5, 1000 if labelled else 0, groups, settings.optim.batch_size, 1.0)
    with torch.device("meta"):
        build_method(settings, method_class, options, info)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to("configs")))
def test_config_says_how_it_is_run(path):
    settings, text = config.load(path), path.read_text(encoding="utf-8")
    assert re.match(rf"# (bash launch/torchrun_single\.sh \d+|ssl-dist train) {path}\b", text), text.splitlines()[0]
    method, backbone = path.stem.split("-")[:2]
    assert (settings.method.name, settings.backbone.name.removeprefix("timm/")) == (method, backbone)
    assert settings.run_dir == "runs/" + "-".join([path.parent.name, path.stem])


@pytest.mark.parametrize("path", [p for p in FILES if re.match(r"relational-(conv|resnet\d+)", p.stem)], ids=str)
def test_views_of_relational_reasoning_are_the_papers(path):
    """Section 4: K = 32; 16 for the deep networks of tiny-ImageNet and SlimageNet64, 25 for STL-10."""
    settings = config.load(path)
    deep = settings.backbone.name != "conv4"
    views = (
        {"tiny-imagenet": 16, "slimagenet64": 16, "stl10": 25, "photos": 16}.get(path.parent.name, 32) if deep else 32
    )
    if path.parent.name not in ("digits", "cifar10-short"):
        assert settings.num_views == views and f"K = {views}, M = 64" in path.read_text(encoding="utf-8")
