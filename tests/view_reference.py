"""The steps of a view in calls of Pillow and torchvision, with parameters that the kernel drew."""

import numpy as np
import PIL
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import _functional_tensor as tensor_kernels
from torchvision.transforms import functional

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(seed, height, width):
    return np.asarray(Image.fromarray(noise(seed, 5, 5)).resize((width, height), Image.Resampling.BICUBIC))


def planes(image):
    """uint8 [3, H, W]."""
    return np.asarray(image).transpose(2, 0, 1)


def distance(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def columns_first(height, width, new_height, new_width):
    """Whether this Pillow resizes the columns before the rows, so that its two roundings come in another order."""
    since_13 = int(PIL.__version__.split(".")[0]) >= 13
    return since_13 and new_height < height and height - new_height > 2 * (width - new_width)


def rows_first(image, new_height, new_width, interpolation="bilinear"):
    """Pillow's resize in its usual order, the two passes called one by one."""
    method = FILTERS[interpolation]
    return image.resize((new_width, image.height), method).resize((new_width, new_height), method)


def short_side_to(image, short_side, interpolation):
    """torchvision's Resize(short_side)."""
    plain = functional.resize(image, short_side, functional.InterpolationMode(interpolation))
    return rows_first(image, plain.height, plain.width, interpolation)


def geometry(image, group, size, drawn):
    """The resize, the crop and the flip."""
    crop, resize = group.random_resized_crop, group.resize
    if crop is not None:
        if resize is not None:
            image = short_side_to(image, resize.short_side, resize.interpolation)
        top, left, height, width = drawn.crop
        view = rows_first(image.crop((left, top, left + width, top + height)), size, size, crop.interpolation)
    else:
        short_side, interpolation = (resize.short_side, resize.interpolation) if resize else (size, "bilinear")
        view = short_side_to(image, short_side, interpolation)
        if group.padded_crop is not None:
            padding = group.padded_crop.padding
            top, left = (corner + padding for corner in drawn.corner)
            view = functional.crop(functional.pad(view, padding), top, left, size, size)
        else:
            view = functional.center_crop(view, [size, size])
    view = functional.hflip(view) if drawn.flip else view
    view = view.rotate(90 * drawn.turns)
    angle, *shift, scale, shear = drawn.affine
    if group.affine is not None and drawn.affine != (0.0, 0.0, 0.0, 1.0, 0.0):
        shift, bilinear = [int(n) for n in shift], functional.InterpolationMode.BILINEAR
        view = functional.affine(view, angle, shift, scale, [shear, 0.0], bilinear, 0)
    return view


def jitter(view, drawn):
    for step in drawn.order:
        if step == 0:
            view = functional.adjust_brightness(view, drawn.brightness)
        elif step == 1:
            view = functional.adjust_contrast(view, drawn.contrast)
        elif step == 2:
            view = functional.adjust_saturation(view, drawn.saturation)
        elif drawn.hue != 0:
            turned = tensor_kernels.adjust_hue(torch.from_numpy(planes(view).copy()), drawn.hue)
            view = Image.fromarray(turned.permute(1, 2, 0).numpy())
    return view


def blur(view, kernel, sigma):
    if kernel is None:
        return view.filter(ImageFilter.GaussianBlur(sigma))
    return functional.gaussian_blur(view, [kernel, kernel], [sigma, sigma])


def reference(image, group, size, drawn):
    """The view uint8 [3, S, S] of image uint8 [H, W, 3]."""
    grid = group.grid_patches
    view = geometry(Image.fromarray(image), group, grid.side if grid else size, drawn)
    for step in group.order:
        if step == "color_jitter" and drawn.jitter:
            view = jitter(view, drawn)
        elif step == "grayscale" and drawn.grayscale:
            view = functional.rgb_to_grayscale(view, num_output_channels=3)
        elif step == "gaussian_blur" and drawn.sigma > 0:
            view = blur(view, group.gaussian_blur.kernel, drawn.sigma)
        elif step == "solarize" and drawn.solarize:
            view = functional.solarize(view, group.solarize.threshold)
    view = torch.from_numpy(planes(view).copy())
    top, left, height, width = drawn.erased
    if height > 0:
        fill = torch.tensor(group.erasing.fill, dtype=torch.uint8)[:, None, None]
        view = functional.erase(view, top, left, height, width, fill)
    if grid:
        view = functional.crop(view, *drawn.patch, size, size)
    return view.numpy()
