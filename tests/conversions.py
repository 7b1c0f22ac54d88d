"""Running a conversion, its refusal, and looking at what it stored."""

import numpy as np
import pytest
from PIL import Image

from ssl_dist.convert.command import convert
from ssl_dist.data.beton import RAW
from ssl_dist.errors import UserError


def run(dataset, root, out, **options):
    return convert(dataset, root, out, **{"workers": 2, "progress": False} | options)


def refusal(*arguments, **options):
    with pytest.raises(UserError) as caught:
        run(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shown(file, image_id, folder):
    """Pillow's view of a stored image."""
    size = int(file.heights[image_id]), int(file.widths[image_id])
    if file.modes[image_id] == RAW:
        return np.asarray(file.sample(image_id)).reshape(*size, 3)
    (folder / "one.jpg").write_bytes(file.sample(image_id).tobytes())
    return np.asarray(Image.open(folder / "one.jpg").convert("RGB"))
