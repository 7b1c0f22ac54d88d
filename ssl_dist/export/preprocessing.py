"""How images become what an exported network takes: written beside its weights, for people and for programs."""

import math
from typing import Any

from ssl_dist.run.encoder import Encoder

FILE = "preprocessing.json"


def preprocessing(encoder: Encoder) -> dict[str, Any]:
    """The test transform of the run, in the order of its steps, for images that are upright by their EXIF orientation.

    resize: the short side in pixels, antialiased as Pillow does it; crop: side of the square in the centre; then
    (pixel / 255 - mean) / std, of 16 bits with 65535 in the place of 255. torchvision: the same as an expression for
    PIL images, where they have three channels.
    """
    data, normalize = encoder.config.data, encoder.normalize
    size, resize = data.image_size, data.eval_resize or data.image_size
    mean, std = list(normalize.mean), list(normalize.std)
    steps = (
        f"transforms.Resize({resize}, transforms.InterpolationMode.{data.eval_interpolation.upper()})",
        f"transforms.CenterCrop({size})",
        "transforms.ToTensor()",
        f"transforms.Normalize({mean}, {std})",
    )
    channels = encoder.channels
    return {
        "input": f"float32 [N, {channels}, {size}, {size}]" + (", RGB" if channels == 3 else ""),
        "resize": resize,
        "interpolation": data.eval_interpolation,
        "crop": size,
        "mean": mean,
        "std": std,
        **({"torchvision": f"transforms.Compose([{', '.join(steps)}])"} if channels == 3 else {}),
    }


def timm_settings(encoder: Encoder) -> dict[str, Any]:
    """The same as timm's `pretrained_cfg` has it, for `timm.data.create_transform`."""
    steps = preprocessing(encoder)
    return {
        "input_size": [encoder.channels, steps["crop"], steps["crop"]],
        "interpolation": steps["interpolation"],
        "crop_pct": _crop_share(steps["crop"], steps["resize"]),
        "crop_mode": "center",
        "mean": steps["mean"],
        "std": steps["std"],
    }


def _crop_share(crop: int, resize: int) -> float:
    """crop / resize, such that timm, which takes floor(crop / share) for the resize, finds the same number again."""
    share = crop / resize
    return share if math.floor(crop / share) == resize else crop / (resize + 0.5)
