"""Pictures of what a vision transformer makes of some images: the attention of its class token and the principal
components of its patches (results/attention.py). It measures no number."""

import sys
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from ssl_dist.config import Section
from ssl_dist.data.normalize import normalized
from ssl_dist.data.plan import limited
from ssl_dist.device import allow_tf32
from ssl_dist.errors import RaisedOn, UserError
from ssl_dist.nn.backbone import TokenBackbone
from ssl_dist.results import attention
from ssl_dist.results.figures import add_picture
from ssl_dist.run.encoder import BATCH_TIMEOUT_S
from ssl_dist.transfer.subject import EvalContext

VERSION = 1


class Options(Section):
    images: Annotated[int, Field(ge=1, le=64)] = Field(
        attention.NUM_IMAGES, description="that are shown, evenly spaced over the split"
    )


def protocol(options: Options) -> str:
    return (
        f"pictures of {options.images} images, evenly spaced over the split: attention of the class token in the last "
        "block, and the first three principal components of the patches"
    )


protocol_without_labels = protocol


def measure(context: EvalContext, options: Options) -> dict[str, float]:
    """No values. Raises `UserError` for a backbone without patches."""
    world, encoder, dataset = context.world, context.encoder, context.dataset
    backbone = encoder.backbone
    if not isinstance(backbone, TokenBackbone):
        raise UserError(
            f"attention: backbone {encoder.config.backbone.name} has no patches to show; evaluate a vision transformer "
            "(backbone.name=timm/vit_...), or take retrieval or embedding, which draw features of any backbone",
            RaisedOn.EVERY_RANK,
        )
    network = backbone.to(world.device).eval()

    def draw() -> None:
        with dataset.open(context.test) as reader:
            ids = np.arange(reader.info.count) if context.test_ids is None else context.test_ids
            ids, info = ids[limited(len(ids), options.images)], reader.info
            pixels = attention.read_images(reader, ids, encoder.config.data)
        to_input = normalized(encoder.normalize, torch.float32, world.device)
        allow_tf32(encoder.config.tf32)
        for picture in attention.pictures(network, pixels, to_input, (info.mean, info.std)):
            texts = picture.name, picture.figure(), picture.title, picture.caption
            path = add_picture(context.run / "figures", context.metadata, "attention", *texts)
            print(path, file=sys.stderr, flush=True)

    with world.state.phase_of("the pictures of attention", BATCH_TIMEOUT_S):
        world.on_rank0(draw)
    return {}
