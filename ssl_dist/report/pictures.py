"""PNG files and the descriptions in their text chunks."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from ssl_dist.errors import UserError


@dataclass(frozen=True)
class Picture:
    """A PNG file: its bytes and size in pixels, and the texts that results/figures.py puts into it."""

    name: str
    data: bytes
    width: int
    height: int
    title: str
    caption: str
    evaluator: str
    checkpoint: str | None

    @property
    def url(self) -> str:
        """The picture itself as an address that needs no file."""
        return "data:image/png;base64," + base64.b64encode(self.data).decode("ascii")


def read(path: Path) -> Picture:
    """Raises `UserError` when the file is no whole PNG."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            assert isinstance(image, PngImageFile)
            texts = {key: str(value) for key, value in image.text.items()}
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not a whole PNG"
        raise UserError(f"{path}: cannot be shown: {reason}; remove it and draw it again") from None
    title, caption = texts.get("Title") or path.stem, texts.get("Description", "")
    return Picture(path.name, data, width, height, title, caption, texts.get("Evaluator", ""), texts.get("Checkpoint"))
