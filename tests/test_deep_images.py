"""Pictures of which Pillow would drop bits, samples or pages without a word: each is refused with what it has."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from ssl_dist.convert.encode import decoded
from ssl_dist.data.pillow import UnfitImage, upright_pixels
from tests.make_images import png16, tiff

RNG = np.random.default_rng(0)


def deep(*shape):
    return RNG.integers(0, 1 << 16, shape, dtype=np.uint16)


def flat(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


BITS_16 = {
    "png gray": png16(deep(5, 7)),
    "png gray and alpha": png16(deep(5, 7, 2)),
    "png rgb": png16(deep(5, 7, 3)),
    "png rgba": png16(deep(5, 7, 4)),
    "tiff gray": tiff(deep(5, 7)),
    "tiff rgb": tiff(deep(5, 7, 3), photometric="rgb"),
    "tiff rgb by planes": tiff(deep(3, 5, 7), photometric="rgb", planarconfig="separate"),
    "ppm": b"P6 7 5 65535\n" + deep(5, 7, 3).tobytes(),
    "pgm": b"P5 7 5 65535\n" + deep(5, 7).tobytes(),
}


@pytest.mark.parametrize("data", BITS_16.values(), ids=BITS_16)
def test_16_bits_are_not_cut_to_8(data):
    for read in (decoded, lambda data: upright_pixels(Image.open(io.BytesIO(data)))):
        with pytest.raises(UnfitImage, match=r"has 16 bits a channel; .*save it with 8 bits a channel"):
            read(data)


def test_10_bits_of_a_ppm_are_named():
    with pytest.raises(UnfitImage, match="has 10 bits a channel"):
        decoded(b"P6 2 1 1023\n" + bytes(12))


def test_no_sample_and_no_page_is_dropped():
    with pytest.raises(UnfitImage, match="has 4 samples a pixel, not the 3 of RGB"):
        decoded(tiff(flat(5, 7, 4), photometric="rgb", planarconfig="contig", extrasamples=(0,)))
    with pytest.raises(UnfitImage, match="has 2 samples a pixel, not the 1 of L"):
        decoded(tiff(flat(5, 7, 2), photometric="minisblack", planarconfig="contig"))
    with pytest.raises(UnfitImage, match="has 6 pages"):
        decoded(tiff(flat(6, 5, 7), photometric="minisblack"))


def test_what_is_whole_with_8_bits_is_read():
    pixels = flat(5, 7, 3)
    np.testing.assert_array_equal(np.asarray(decoded(tiff(pixels, photometric="rgb"))), pixels)
    assert decoded(tiff(flat(5, 7, 4), photometric="rgb", extrasamples=("unassalpha",))).mode == "RGBA"
    assert decoded(b"P6 7 5 255\n" + flat(5, 7, 3).tobytes()).mode == "RGB"
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:  # with a small copy, as cameras and maps have it
        writer.write(pixels, photometric="rgb")
        writer.write(pixels[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(np.asarray(decoded(file.getvalue())), pixels)
