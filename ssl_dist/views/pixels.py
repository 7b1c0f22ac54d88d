"""What the pixels of a data set's images are: the number of channels and of bits; and which steps are for RGB alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ssl_dist.config.recipe import ViewGroup
from ssl_dist.errors import UserError

MAX_CHANNELS = 32


class PixelFormat(NamedTuple):
    """channels: 1 to `MAX_CHANNELS`; bits: of each, 8 or 16."""

    channels: int = 3
    bits: int = 8

    @classmethod
    def of(cls, pixels: np.ndarray) -> "PixelFormat":
        """That of an array [..., C] of uint8 or uint16."""
        return cls(pixels.shape[-1], 8 * pixels.dtype.itemsize)

    @property
    def dtype(self) -> np.dtype:
        """uint8 or uint16, in memory and, little-endian, in files."""
        return np.dtype("<u2" if self.bits == 16 else "u1")

    @property
    def num_bytes(self) -> int:
        """Of one pixel."""
        return self.channels * self.bits // 8

    @property
    def is_rgb(self) -> bool:
        """Whether the images are the usual ones: red, green and blue with 8 bits."""
        return self == RGB

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.bits} bits"


RGB = PixelFormat()
GROUP = "views.groups.{}"  # as a config names it


def refuse_steps_of_colour(groups: Sequence[ViewGroup], pixels: PixelFormat, names: str = GROUP) -> None:
    """Raises `UserError` where a recipe has a step that is defined for red, green and blue with 8 bits alone, and the
    images are others; the overrides that take all such steps out are named. names: of a group, with {} for its
    number."""
    if not pixels.is_rgb and (remedies := steps_of_colour(groups, names)):
        step = remedies[0].partition("=")[0]
        raise UserError(
            f"{step}: needs red, green and blue with 8 bits, and these images have {pixels}; set {' '.join(remedies)}"
        )


def steps_of_colour(groups: Sequence[ViewGroup], names: str = GROUP) -> list[str]:
    """The overrides that take the steps out of a recipe which are defined for red, green and blue alone."""
    remedies = []
    for number, group in enumerate(groups):
        name, jitter, erasing = names.format(number), group.color_jitter, group.erasing
        if jitter is not None and jitter.saturation:
            remedies.append(f"{name}.color_jitter.saturation=0")
        if jitter is not None and jitter.hue:
            remedies.append(f"{name}.color_jitter.hue=0")
        if group.grayscale:
            remedies.append(f"{name}.grayscale=0")
        if erasing is not None and any(erasing.fill):
            remedies.append(f"{name}.erasing.fill=[0,0,0]")
    return remedies
