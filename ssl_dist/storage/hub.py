"""Weights by name: `hf://ORG/NAME` and `timm:NAME`, through the libraries that keep them, from their cache or the net.

`hf://` is a model of the Hugging Face hub, with `@REVISION` and a file behind another `/` where wanted; `timm:` the
pretrained weights of one of timm's models, such as `timm:resnet18.a1_in1k`.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from ssl_dist.errors import UserError, quoted
from ssl_dist.storage import checkpoint

FILES = ("model.safetensors", "pytorch_model.bin")
_HF = re.compile(r"hf:/{1,2}([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")  # a path has lost one slash
_TIMM = re.compile(r"timm:(.+)")


def is_name(text: str) -> bool:
    """Whether `text` is one of these and no path."""
    return re.match(r"hf:/|timm:", text) is not None


def file_in(path: Path) -> Path:
    """The file of weights in a folder, as timm and transformers save a model; any other path as it is, a run's too."""
    file = path / FILES[0]
    return file if file.is_file() and not checkpoint.steps(path) else path


def located(text: str) -> Path:
    """The file of weights that is called `text`, downloaded where the cache has none. Raises `UserError`."""
    if (found := _HF.fullmatch(text)) is not None:
        return _from_hub(text, found[1], found[2], [found[3]] if found[3] else FILES)
    if (found := _TIMM.fullmatch(text)) is not None:
        return _from_hub(text, _repository(text, found[1]), None, FILES)
    raise UserError(f"weights {quoted(text)}: no such name; write hf://ORG/NAME or timm:NAME")


def _repository(text: str, model: str) -> str:
    """The model on the hub that holds the pretrained weights of timm's `model`."""
    try:
        import timm
    except ImportError:
        raise UserError(f"weights {quoted(text)}: timm is not installed; pip install timm") from None
    try:
        settings = timm.models.get_pretrained_cfg(model)
    except (RuntimeError, KeyError):
        settings = None
    if settings is None or not settings.hf_hub_id:
        raise UserError(
            f"weights {quoted(text)}: timm has no pretrained weights of that name on the hub; "
            "timm.list_pretrained() lists them"
        )
    return str(settings.hf_hub_id)


def _from_hub(text: str, repository: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"weights {quoted(text)}: huggingface_hub is not installed; pip install huggingface_hub"
        ) from None
    reason: Exception = ValueError("no file is asked for")
    for offline, file in itertools.product((True, False), files):
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, local_files_only=offline))
        except errors.EntryNotFoundError as error:
            reason = error
            if not offline and isinstance(error, errors.LocalEntryNotFoundError):  # there is no net
                break
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            reason = error
            break
    said = (str(reason).strip() or type(reason).__name__).splitlines()[0].split(". ")[0]
    raise UserError(
        f"weights {quoted(text)}: not in the cache of huggingface_hub and not to be had from the net ({said}); "
        f"copy its {' or '.join(files)} here and give the file"
    )
