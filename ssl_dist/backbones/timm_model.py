"""Any network of timm by its name. timm is no requirement and takes seconds to import."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ssl_dist.errors import UserError
from ssl_dist.nn.backbone import Backbone, outermost_blocks

_PREFIX = "timm/"


class TimmModel(Backbone):
    """timm's network `name` without its classifier; images [N, C, S, S] -> features [N, D].

    The network is the submodule `model`, so its tensors are timm's with `model.` before their names. The stages are
    those of timm's feature_info; a network that timm gives no intermediate maps of has none.
    """

    def __init__(self, name: str, in_channels: int = 3):
        super().__init__()
        # some models take no such argument
        other = {} if in_channels == 3 else {"in_chans": in_channels}
        self.model = timm_package().create_model(name, pretrained=False, num_classes=0, **other)
        # Some models widen their features in a last layer before the classifier.
        self.feature_dim = getattr(self.model, "head_hidden_size", None) or self.model.num_features
        self.stages = {}
        if hasattr(self.model, "forward_intermediates"):
            self.stages = {info["module"]: info["num_chs"] for info in _feature_info(self.model)}

    def blocks(self) -> list[nn.Module]:
        return outermost_blocks(self.model)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def forward_stages(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        last, maps = self.model.forward_intermediates(x)
        return self.model.forward_head(last), dict(zip(self.stages, maps, strict=True))


def names() -> list[str]:
    """timm/<model> for every model that timm has."""
    return [_PREFIX + model for model in timm_package().list_models()]


def build(name: str, in_channels: int = 3) -> TimmModel:
    """The model of `timm/<model>`. Raises `UserError` where it can not have other channels."""
    try:
        return TimmModel(name.removeprefix(_PREFIX), in_channels)
    except TypeError:
        if in_channels == 3:
            raise
        raise UserError(
            f"backbone.name = {name!r}: takes images of 3 channels alone, not {in_channels}; give another one"
        ) from None


def _feature_info(model: Any) -> list[dict[str, Any]]:
    info = model.feature_info
    return info if isinstance(info, list) else list(info.info)


def timm_package() -> ModuleType:
    """timm. Raises `UserError` when it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError("backbone.name = timm/...: timm is not installed; pip install timm") from None
    return timm
