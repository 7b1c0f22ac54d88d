"""Any network of timm by its name. timm is no requirement and takes seconds to import."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssl_dist.errors import NotInstalled, UserError
from ssl_dist.nn.backbone import Backbone, TokenBackbone, outermost_blocks
from ssl_dist.nn.layers import freeze_bias_of_keys
from ssl_dist.nn.shapes import without_values

_PREFIX = "timm/"


class TimmModel(Backbone):
    """A network of timm without its classifier; images [N, C, S, S] -> features [N, D].

    The network is the submodule `model`, so its tensors are timm's with `model.` before their names. The stages are
    those of timm's feature_info; a network that timm gives no intermediate maps of has none. arguments: those of
    `timm.create_model` that its tensors depend on, where they are not timm's own.
    """

    def __init__(self, model: Any, arguments: dict[str, Any]):
        super().__init__()
        self.model = model
        self.arguments = arguments
        # Some models widen their features in a last layer before the classifier.
        self.feature_dim = getattr(model, "head_hidden_size", None) or model.num_features
        self.stages = {}
        if hasattr(model, "forward_intermediates"):
            self.stages = {info["module"]: info["num_chs"] for info in _feature_info(model)}

    def blocks(self) -> list[nn.Module]:
        return outermost_blocks(self.model)

    def offset(self) -> nn.Parameter | None:
        last = [layer for layer in self.model.modules() if next(layer.parameters(recurse=False), None) is not None][-1]
        return last.bias if isinstance(last, nn.LayerNorm) else None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def forward_stages(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        last, maps = self.model.forward_intermediates(x)
        return self.model.forward_head(last), dict(zip(self.stages, maps, strict=True))


class TimmTransformer(TimmModel, TokenBackbone):
    """A vision transformer of timm (Dosovitskiy et al., ICLR 2021) for images of any size of whole patches.

    Its stages are those of `TokenBackbone`. Other sizes than the one it was built for get their positions by timm's
    interpolation (bicubic, antialiased), as two products of matrices: on a GPU their gradient is deterministic.
    """

    def __init__(self, model: Any, arguments: dict[str, Any]):
        super().__init__(model, arguments)
        self.patch_size = self.model.patch_embed.patch_size[0]
        self.token_dim = self.model.embed_dim
        self.num_prefix_tokens = self.model.num_prefix_tokens
        self.has_class_token = self.model.cls_token is not None
        self.grid = tuple(self.model.patch_embed.grid_size)
        self.stages = self.token_stages(len(self.model.blocks))
        for attention in (block.attn for block in self.model.blocks):
            if attention.qkv.bias is not None and isinstance(attention.k_norm, nn.Identity):
                freeze_bias_of_keys(attention.qkv.bias)

    def blocks(self) -> list[nn.Module]:
        return [*self.model.blocks]

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self._normalized(x))

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        return self._normalized(images, kept)  # apart: accumulation passes `forward` and `tokens` in parts

    def _normalized(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        x = self._embedded(images, kept)
        for block in self.model.blocks:
            x = block(x)
        return self.model.norm(x)

    def forward_stages(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        images, x, outputs = x, self._embedded(x), list[Tensor]()
        for block in self.model.blocks:
            x = block(x)
            outputs.append(x)
        maps = self.token_maps(outputs, self.model.norm, images)
        return self.model.forward_head(self.model.norm(x)), {name: maps[name] for name in self.stages}

    def patch_projection(self) -> nn.Module:
        return self.model.patch_embed

    @torch.no_grad()
    def fix_positions(self, places: Tensor) -> None:
        embedding = self.model.pos_embed
        assert embedding is not None, "timm names no transformer of this class without positions"
        embedding[:, : embedding.shape[1] - len(places)] = 0
        embedding[:, embedding.shape[1] - len(places) :] = places
        embedding.requires_grad_(False)

    def last_attention(self, images: Tensor) -> Tensor:
        x = self._embedded(images)
        *before, last = self.model.blocks
        for block in before:
            x = block(x)
        attention = last.attn
        query, key, _ = attention.qkv(last.norm1(x)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = attention.q_norm(query) * attention.scale @ attention.k_norm(key).transpose(-2, -1)
        return scores.softmax(-1)

    def _embedded(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """What goes into the first block [N, P + n, D]."""
        model = self.model
        patches = model.patch_embed(images)  # [N, h, w, D]
        places, of_prefix = self._positions(patches.shape[1:3])
        x = patches.flatten(1, 2) + places
        if kept is not None:
            x = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
        prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
        if prefix:
            first = torch.cat(prefix, 1) + of_prefix
            x = torch.cat([first.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
        return model.norm_pre(model.patch_drop(model.pos_drop(x)))

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | float, Tensor | float]:
        """Of the patches [1, h w, D], and of the tokens before them; 0 where the network adds none."""
        embedding = self.model.pos_embed
        if embedding is None:
            return 0.0, 0.0
        num_prefix = 0 if self.model.no_embed_class else self.num_prefix_tokens
        of_prefix, places = embedding[:, :num_prefix], embedding[:, num_prefix:]
        if grid != self.grid:
            rows, columns = (_interpolation(*sides, places) for sides in zip(self.grid, grid, strict=True))
            places = torch.einsum("hi,wj,bijd->bhwd", rows, columns, places.unflatten(1, self.grid)).flatten(1, 2)
        return places, of_prefix if num_prefix else 0.0


def _interpolation(old: int, new: int, like: Tensor) -> Tensor:
    """What turns `old` values in a row into `new` ones [new, old], as torch's bicubic interpolation with antialiasing
    does: that of an image is one of its rows and one of its columns."""
    rows = torch.eye(old, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)[None, None]
    return nn.functional.interpolate(rows, (new, old), mode="bicubic", antialias=True)[0, 0].to(like.dtype)


def names() -> list[str]:
    """timm/<model> for every model that timm has."""
    return [_PREFIX + model for model in timm_package().list_models()]


def build(
    name: str,
    in_channels: int = 3,
    image_size: int | None = None,
    patch_size: int | None = None,
    drop_path: float = 0.0,
) -> TimmModel:
    """The model of `timm/<model>`; image_size: of the positions that it learns, where it has some. Raises `UserError`
    for what it cannot have."""
    create, model = timm_package().create_model, name.removeprefix(_PREFIX)
    with without_values():
        plain = create(model, pretrained=False, num_classes=0)
    accepted = _arguments(type(plain))
    arguments: dict[str, Any] = {} if in_channels == 3 else {"in_chans": in_channels}
    if patch_size is not None:
        arguments["patch_size"] = patch_size
    more: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    for key, remedy in (
        ("in_chans", f"takes images of 3 channels alone, not {in_channels}; give another one"),
        ("patch_size", f"has no backbone.patch_size to be {patch_size}; set that to null"),
        ("drop_path_rate", f"has no stochastic depth; set backbone.drop_path to 0, not {drop_path:g}"),
    ):
        if key in {**arguments, **more} and key not in accepted:
            raise UserError(f"backbone.name = {name!r}: {remedy}")
    any_size = "dynamic_img_size" in accepted  # by interpolating positions
    size = image_size or plain.pretrained_cfg["input_size"][-1]
    is_other = size != plain.pretrained_cfg["input_size"][-1]
    if is_other and "img_size" in accepted and (any_size or not _takes(plain, size)):
        arguments["img_size"] = size
    more |= {"dynamic_img_size": True} if any_size else {}
    made = create(model, pretrained=False, num_classes=0, **arguments, **more)
    return (TimmTransformer if _is_transformer(made) else TimmModel)(made, arguments)


def _arguments(model: type[nn.Module]) -> set[str]:
    """What may be said of a model when it is made: by its class, or by one that this hands its own arguments to."""
    constructors: list[Callable[..., Any]] = [vars(base).get("__init__", object) for base in model.__mro__]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters}


def _takes(model: nn.Module, image_size: int) -> bool:
    """Whether a model on the meta device passes images of this size as it is: some resize them within."""
    parameter = next(model.parameters())
    try:
        model.eval()(parameter.new_empty(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _is_transformer(model: nn.Module) -> bool:
    """Whether its images pass as `TimmTransformer` has it: not with distillation tokens, say, or relative positions."""
    from timm.models.vision_transformer import Attention, Block, PatchEmbed, VisionTransformer

    return (
        type(model) is VisionTransformer
        and type(model.patch_embed) is PatchEmbed
        and all(type(block) is Block and type(block.attn) is Attention for block in model.blocks)
    )


def _feature_info(model: Any) -> list[dict[str, Any]]:
    info = model.feature_info
    return info if isinstance(info, list) else list(info.info)


def timm_package() -> ModuleType:
    """timm. Raises `NotInstalled`."""
    try:
        import timm
    except ImportError:
        raise NotInstalled("backbone.name = timm/...: timm is not installed; pip install timm") from None
    return timm
