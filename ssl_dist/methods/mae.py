"""MAE: masked autoencoders (He et al., CVPR 2022, arXiv:2111.06377).

Three quarters of the patches of an image are hidden. A vision transformer encodes those that are left. A small one gets
its tokens, and one that is the same for all in the place of every hidden patch, and predicts the pixels of these. Its
pictures show what the encoder sees, the prediction in the place of what it does not see, and the image.
"""

from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_dist.config import PositiveInt, Section
from ssl_dist.device import to_device
from ssl_dist.errors import UserError
from ssl_dist.keys import METHOD, hash64, uniform_rows
from ssl_dist.methods.base import Backbone, Batch, Info, Output, SSLMethod, World
from ssl_dist.nn.backbone import TokenBackbone
from ssl_dist.nn.layers import at_least_float32, full_precision
from ssl_dist.nn.patches import PatchDecoder, patchified, sines, unpatchified


class Options(Section):
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that are hidden")
    norm_pix_loss: bool = Field(
        True,
        description="pixels are predicted less the mean of their patch, by its standard deviation; false: as they are",
    )
    decoder_dim: PositiveInt = Field(512, multiple_of=4, description="width of the decoder")
    decoder_depth: PositiveInt = Field(8, description="blocks of the decoder")
    decoder_heads: PositiveInt = Field(16, description="heads of the decoder's attention")

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads: {self.decoder_heads} must divide decoder_dim, {self.decoder_dim}")
        return self


# ---------------------------------------------------------------------------------------------------- patches


def moments(patches_NnF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch's pixels [N, n, 1], as in the official code: that of a sample, and no
    less than 0.001."""
    variance, mean = torch.var_mean(patches_NnF, 2, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def hidden_error(predicted_NnF: Tensor, patches_NnF: Tensor, hidden_Nn: Tensor, norm_pix_loss: bool = True) -> Tensor:
    """The mean squared error over the hidden patches (section 3); hidden: 1 for these, 0 for those that are seen."""
    if norm_pix_loss:
        mean, std = moments(patches_NnF)
        patches_NnF = (patches_NnF - mean) / std
    error_Nn = (predicted_NnF - patches_NnF).square().mean(2)
    return (error_Nn * hidden_Nn).sum() / hidden_Nn.sum()


def seen_patches(key: np.uint64, image_ids: np.ndarray, num_patches: int, num_seen: int) -> np.ndarray:
    """The patches that stay of each image, int64 [N, num_seen]: a function of the key and the image alone."""
    return uniform_rows(key, image_ids, num_patches).argsort(1, kind="stable")[:, :num_seen]


# ---------------------------------------------------------------------------------------------------- method


class Method(SSLMethod[Options]):
    num_views = 1
    backbone: TokenBackbone

    def __init__(self, backbone: Backbone, info: Info, options: Options):
        super().__init__(backbone, info, options)
        if not isinstance(backbone, TokenBackbone):
            raise UserError(
                "backbone.name: mae hides patches from a vision transformer, and this is none; give "
                "backbone.name=timm/vit_tiny_patch16_224"
            )
        self.side, [(_, size)] = backbone.patch_size, info.view_groups
        num = size // self.side
        self.num_patches, self.num_seen = num**2, int(num**2 * (1 - options.mask_ratio))
        if size % self.side:
            raise UserError(
                f"data.image_size: views of {size} px are not whole patches of {self.side} px; give a multiple of "
                f"{self.side}, or another backbone.patch_size"
            )
        if not 0 < self.num_seen < self.num_patches:
            raise UserError(
                f"method.options.mask_ratio = {options.mask_ratio:g}: {self.num_seen} of {self.num_patches} patches "
                "would be seen; give 0.75 and, where that is refused, a smaller backbone.patch_size"
            )
        backbone.fix_positions(sines(backbone.token_dim, *backbone.grid))
        self.decoder = PatchDecoder(
            backbone.token_dim, backbone.num_prefix_tokens, (num, num), self.side**2 * info.channels,
            options.decoder_dim, options.decoder_depth, options.decoder_heads,
        )  # fmt: skip

    def explain(self, world_size: int, device: str) -> dict[str, str]:
        hidden = self.num_patches - self.num_seen
        return {"hidden": f"{hidden} of {self.num_patches} patches of {self.side} px of each view"}

    @classmethod
    def warm_up(cls, options: Options, dtype: torch.dtype) -> None:
        uniform_rows(hash64(0), np.zeros(1, np.int64), 1)

    def forward(self, batch: Batch, world: World) -> Output:
        """Pictures: `reconstruction`, what the encoder sees of some images, the prediction in the place of what it
        does not see, and the images. With norm_pix_loss a predicted patch has the image's own mean and deviation."""
        seen = self._seen(batch)
        tokens = self._encoded(batch, seen)
        predicted = at_least_float32(self.decoder(tokens, seen))
        with full_precision(predicted.device):
            patches = patchified(batch.views[0][0], self.side)
            # Ranks hold equally many images, so the mean of their means is that of the global batch.
            loss = hidden_error(predicted, patches, self._hidden(seen, predicted), self.options.norm_pix_loss)
        return Output(loss, representations=world.gather_images(at_least_float32(tokens.detach()).mean(1)))

    def outputs(self, batch: Batch) -> list[Tensor]:
        seen = self._seen(batch)
        return [at_least_float32(self.decoder(self._encoded(batch, seen), seen))]

    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        seen, patches = self._seen(batch), patchified(batch.views[0][0], self.side)
        [predicted] = self.outputs(batch)
        if self.options.norm_pix_loss:
            mean, std = moments(patches)
            predicted = predicted * std + mean
        hidden = self._hidden(seen, patches)[:, :, None]
        columns = {"seen": patches * (1 - hidden), "predicted": patches.lerp(predicted, hidden), "image": patches}
        return {"reconstruction": {name: unpatchified(x, self.side) for name, x in columns.items()}}

    def _seen(self, batch: Batch) -> Tensor:
        """The patches that are seen of each image: a function of the seed, the step and the image."""
        key = hash64(self.info.seed, METHOD, batch.step)
        seen = seen_patches(key, batch.image_ids.numpy(), self.num_patches, self.num_seen)
        return to_device(seen, batch.views[0].device)

    def _hidden(self, seen: Tensor, like: Tensor) -> Tensor:
        return like.new_ones(len(seen), self.num_patches).scatter(1, seen, 0)

    def _encoded(self, batch: Batch, seen: Tensor) -> Tensor:
        """The tokens of what is seen, [B, P + k, D]."""
        with self.keyed(batch, batch.view_ids[0]):
            return self.backbone.tokens(batch.views[0][0], seen)
