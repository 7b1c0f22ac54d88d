"""The recipe of a group of views: its steps with their parameters, and the order in which they run."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from ssl_dist.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section

MAX_VIEWS = 4096  # of an image
Interpolation = Literal["bilinear", "bicubic"]
Range = Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)]
NumViews = Annotated[int, Field(ge=1, le=MAX_VIEWS)]
Level = Annotated[int, Field(ge=0, le=255)]
# Smaller ones blur nothing and are no divisor; Pillow's buffers grow with larger ones.
Sigma = Annotated[float, Field(ge=0.01, le=1000)]
OrderedStep = Literal["color_jitter", "grayscale", "gaussian_blur", "solarize"]


class Resize(Section):
    """Resize the whole image before it is cropped, in proportion; antialiased when it shrinks."""

    short_side: PositiveInt = Field(description="pixels of the resized image's short side")
    interpolation: Interpolation = Field("bilinear", description="of the resizing")


class RandomResizedCrop(Section):
    """Crop a random part (Inception crop) and resize it to the view's size; antialiased when it shrinks."""

    scale: Range = Field((0.08, 1.0), description="share of the image's area")
    ratio: Range = Field((0.75, 4 / 3), description="width / height")
    interpolation: Interpolation = Field("bilinear", description="of the resizing")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_rising(self, "ratio")
        if self.scale[0] > self.scale[1] or self.scale[1] > 1:
            raise ValueError(f"scale: [{self.scale[0]}, {self.scale[1]}] must rise and end at 1 at most")
        return self


class PaddedCrop(Section):
    """Surround the image with black pixels and crop a random part of the view's size, without resizing it."""

    padding: NonNegativeInt = Field(4, description="black pixels on each of the four sides")


class Affine(Section):
    """Turn, shift, scale and shear the view about its middle, bilinear, black outside: torchvision's RandomAffine."""

    p: Probability = Field(0.5, description="probability that the view is moved at all")
    degrees: Annotated[float, Field(ge=0, le=180)] = Field(18.0, description="turn from [-d, d] degrees")
    translate: tuple[Probability, Probability] = Field(
        (0.1, 0.1), strict=False, description="right and down, from [-t, t] of the side, in whole pixels"
    )
    scale: Range = Field((0.9, 1.1), description="factor of the size")
    shear: Annotated[float, Field(ge=0, lt=90)] = Field(10.0, description="of the x axis, from [-s, s] degrees")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_rising(self, "scale")
        return self


class ColorJitter(Section):
    """Brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter."""

    p: Probability = Field(0.8, description="probability that the view is jittered at all")
    brightness: NonNegativeFloat = Field(0.8, description="factor from [max(0, 1-b), 1+b]")
    contrast: NonNegativeFloat = Field(0.8, description="factor from [max(0, 1-c), 1+c]")
    saturation: NonNegativeFloat = Field(0.8, description="factor from [max(0, 1-s), 1+s]")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.2, description="shift from [-h, h], in turns of the wheel")


class GaussianBlur(Section):
    """Blur with a Gaussian whose standard deviation is drawn evenly from a range."""

    p: Probability = Field(0.5, description="probability that the view is blurred")
    sigma: tuple[Sigma, Sigma] = Field(
        (0.1, 2.0), strict=False, description="range of the standard deviation in pixels"
    )
    kernel: PositiveInt | None = Field(
        None, description="null: Pillow's GaussianBlur; odd n: torchvision's, with a kernel of n x n pixels"
    )

    @model_validator(mode="after")
    def _odd(self) -> Self:
        _check_rising(self, "sigma")
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel: {self.kernel} has no middle; make it odd, or null for Pillow's blur")
        return self


class Solarize(Section):
    """Invert the levels from a threshold on."""

    p: Probability = Field(0.2, description="probability that the view is solarized")
    threshold: Level = Field(128, description="levels from this one on are inverted")


class Erasing(Section):
    """Paint a random rectangle in one colour, as torchvision's RandomErasing."""

    p: Probability = Field(0.5, description="probability that a part is erased")
    scale: Range = Field((0.02, 0.33), description="share of the view's area")
    ratio: Range = Field((0.3, 3.3), description="height / width")
    fill: tuple[Level, Level, Level] = Field(
        (0, 0, 0), strict=False, description="levels of red, green, blue; 255 * mean is 0 after the normalisation"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_rising(self, "scale")
        _check_rising(self, "ratio")
        return self


class GridPatches(Section):
    """The views are patches of one image, which the steps before this one have made (OBoW, Gidaris et al., CVPR 2021).

    They are `num` of the 3 x 3 cells of a grid over it, all different, each moved by random amounts.
    """

    side: PositiveInt = Field(256, description="side in pixels of the image that the patches are cut out of")
    jitter: NonNegativeInt = Field(24, description="a patch moves by 0 .. jitter pixels right and down in its cell")


class ViewGroup(Section):
    """A recipe shared by `num` views of one size. The steps run in the order in which they stand here.

    Those from color_jitter to solarize run in the order that `order` gives. A paper that flips last is served by the
    flip after the crop: mirroring commutes with the later steps (with an affine one in distribution).
    """

    num: NumViews | None = Field(None, description="views of this recipe; null: views.num (one group only)")
    size: PositiveInt | None = Field(None, description="side in pixels; null: data.image_size")
    resize: Resize | None = Field(
        None,
        description="null: without random_resized_crop the short side becomes the view's size; with it, nothing first",
    )
    random_resized_crop: RandomResizedCrop | None = Field(
        None, description="null: a padded_crop or else the centre of the resized image"
    )
    padded_crop: PaddedCrop | None = Field(None, description="instead of random_resized_crop")
    horizontal_flip: Probability = Field(0.0, description="probability of a left-right flip")
    quarter_turns: Annotated[list[Literal[0, 1, 2, 3]], Field(min_length=1, max_length=4)] = Field(
        [0], description="the view is turned counter-clockwise by one of these right angles"
    )
    affine: Affine | None = None
    color_jitter: ColorJitter | None = None
    grayscale: Probability = Field(0.0, description="probability that the view loses its colour")
    gaussian_blur: GaussianBlur | None = None
    solarize: Solarize | None = None
    order: list[OrderedStep] = Field(
        default_factory=lambda: list(get_args(OrderedStep)),
        description="of color_jitter, grayscale, gaussian_blur and solarize; what the recipe lacks may be left out",
    )
    erasing: Erasing | None = None
    grid_patches: GridPatches | None = None

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.random_resized_crop is not None and self.padded_crop is not None:
            raise ValueError("padded_crop: stands beside random_resized_crop; leave one of the two out")
        for step in get_args(OrderedStep):
            if self.order.count(step) > 1:
                raise ValueError(f"order: {step} stands twice; a step runs once")
            if getattr(self, step) and step not in self.order:
                raise ValueError(f"order: {self.order} leaves out {step}, which the recipe has; put it in its place")
        return self


def _check_rising(section: Section, name: str) -> None:
    low, high = getattr(section, name)
    if low > high:
        raise ValueError(f"{name}: [{low}, {high}] must rise")
