"""Images as patches: their pixels, their positions, and a transformer that predicts those that are missing."""

import torch
from torch import Tensor, nn

from ssl_dist.nn.layers import freeze_bias_of_keys

_EPSILON = 1e-6  # of layer normalisation in vision transformers


def patchified(images_NCSS: Tensor, side: int) -> Tensor:
    """The pixels of every patch [N, n, side * side * C], row by row; in a patch too, the channels last."""
    blocks = images_NCSS.unfold(2, side, side).unfold(3, side, side)  # [N, C, rows, columns, side, side]
    return blocks.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchified(patches_NnF: Tensor, side: int) -> Tensor:
    """The square images [N, C, S, S] that `patchified` made these of."""
    num = round(patches_NnF.shape[1] ** 0.5)
    blocks = patches_NnF.unflatten(2, (side, side, -1)).unflatten(1, (num, num))
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sines(dim: int, rows: int, columns: int) -> Tensor:
    """Positions of patches, float64 [rows * columns, dim]: half of the dimensions tells the column, the other one the
    row, by sines and cosines of dim / 4 wavelengths from 2 pi to nearly 10000 times that."""
    rates = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angles = torch.arange(max(rows, columns), dtype=torch.float64, device="cpu")[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([line[:columns].repeat(rows, 1), line[:rows].repeat_interleave(columns, 0)], 1)


class PatchDecoder(nn.Module):
    """A transformer that predicts patches from some of them: tokens [N, P + k, D], P of them of no patch, and which
    patches the others are of, int64 [N, k] -> predictions of all patches [N, n, F].

    grid: rows and columns of patches. A token that it learns stands in the place of each that is missing.
    """

    places: Tensor

    def __init__(
        self, token_dim: int, num_prefix: int, grid: tuple[int, int], out_dim: int, dim: int, depth: int, heads: int
    ):
        super().__init__()
        self.num_prefix = num_prefix
        self.embed = nn.Linear(token_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("places", torch.zeros(1, num_prefix + grid[0] * grid[1], dim))
        self.places[:, num_prefix:] = sines(dim, *grid)
        blocks = [
            nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, 0.0, "gelu", layer_norm_eps=_EPSILON, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        ]
        for block in blocks:
            freeze_bias_of_keys(block.self_attn.in_proj_bias)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)
        self.predict = nn.Linear(dim, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in self.modules():  # torch draws the first one of attention so already
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        prefix, of_seen = self.embed(tokens).split([self.num_prefix, seen.shape[1]], 1)
        shape = len(seen), self.places.shape[1] - self.num_prefix, of_seen.shape[2]
        where = seen[:, :, None].expand(-1, -1, shape[2])
        x = self.mask_token.to(of_seen.dtype).expand(shape).scatter(1, where, of_seen)
        x = self.blocks(torch.cat([prefix, x], 1) + self.places)
        return self.predict(self.norm(x)[:, self.num_prefix :])
