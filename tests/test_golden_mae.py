"""Training steps of the official MAE on a small vision transformer: tests/golden/mae.npz.

Its code needs timm 0.3.2; the numbers were made with the blocks of a later one, which compute the same. What it does
otherwise than ours: masks come from torch's generator, seeded by seed and rank, so they depend on the number of ranks
and are others after a resume; predictions are made of seen patches too and dropped; `unpatchify` and `patchify` know
images of three channels alone; class and mask token decay, as they are no vectors; `--norm_pix_loss`, which the paper's
results have, is off by default. Its variance is that of a sample (n - 1), as ours.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_dist.backbones.timm_model import TimmTransformer
from ssl_dist.config import Optim, validate
from ssl_dist.distributed.world import one_process
from ssl_dist.methods import mae
from ssl_dist.methods.base import Batch, Info
from ssl_dist.train import optim
from tests.official_steps import close

timm = pytest.importorskip("timm")

FOLDER = Path(os.environ.get("SSL_DIST_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / "mae.npz").items() if key != "_meta"}
META = json.loads(str(np.load(FOLDER / "mae.npz")["_meta"]))
TYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-9}  # relative to the largest magnitude of the array
# The first that fits; torch names the parts of a transformer's block otherwise than timm.
NAMES = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.places",
    "decoder_embed": "decoder.embed",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "decoder.predict",
    "": "backbone.model.",
}
OF_BLOCK = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear"}


def ours(official):
    prefix = next(prefix for prefix in NAMES if official.startswith(prefix))
    name = NAMES[prefix] + official.removeprefix(prefix)
    for theirs, torchs in OF_BLOCK.items() if prefix == "decoder_blocks" else ():
        name = name.replace(theirs, torchs)
    return name


def tensors(part):
    """By our names."""
    return {ours(key.removeprefix(f"{part}/")): x for key, x in GOLDEN.items() if key.startswith(f"{part}/")}


def made(case, dtype):
    model = timm.models.VisionTransformer(
        META["size"], META["side"], num_classes=0, dynamic_img_size=True,
        embed_dim=META["embed_dim"], depth=META["depth"], num_heads=META["num_heads"],
    )  # fmt: skip
    options = {
        "mask_ratio": META["mask_ratio"],
        "norm_pix_loss": case == "normalized",
        "decoder_dim": META["decoder_embed_dim"],
        "decoder_depth": META["decoder_depth"],
        "decoder_heads": META["decoder_num_heads"],
    }
    num = GOLDEN["images"].shape[1]
    info = Info(num, 0, ((1, META["size"]),), num, 1.0, feature_dim=META["embed_dim"])
    method = mae.Method(TimmTransformer(model, {}), info, validate(mae.Options, options))
    init = tensors("init")
    for name in ("backbone.model.pos_embed", "decoder.places"):
        torch.testing.assert_close(method.state_dict()[name], init[name], rtol=0, atol=1e-7)
    method.load_state_dict(init)
    return method.to(TYPES[dtype]).train()


def seen_of(step):
    """As `random_masking` chooses them: the smallest draws."""
    num_patches = GOLDEN["noise"].shape[2]
    return GOLDEN["noise"][step].argsort(1)[:, : int(num_patches * (1 - META["mask_ratio"]))]


def test_masks():
    seen = seen_of(0)
    hidden = torch.ones_like(GOLDEN["mask"]).scatter(1, seen, 0)
    assert torch.equal(hidden, GOLDEN["mask"])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", ["normalized", "pixels"])
def test_steps(case, dtype, monkeypatch):
    method, images = made(case, dtype), GOLDEN["images"].to(TYPES[dtype])
    tolerance, world = TOLERANCES[dtype], one_process(torch.device("cpu"))
    adamw = {"name": "adamw", **META["adamw"], "decay_vectors": False, "epochs": None, "steps": len(images)}
    optimizer = optim.build(validate(Optim, adamw), method.parameter_groups(), torch.device("cpu"))
    ids, losses = torch.arange(images.shape[1]), []
    for step, views in enumerate(images):
        monkeypatch.setattr(mae, "seen_patches", lambda *_, step=step: seen_of(step).numpy())
        batch = Batch([views[None]], [torch.zeros(1, dtype=torch.int64)], ids, torch.full_like(ids, -1), ids, step)
        if step == 0:
            close(method.outputs(batch)[0], GOLDEN[f"{case}/{dtype}/predicted"], tolerance, "predicted")
        loss = method(batch, world).loss
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            expected = tensors(f"{case}/{dtype}/grad")
            for name, value in expected.items():
                close(method.get_parameter(name).grad, value, tolerance, f"gradient of {name}")
            assert not expected or len(expected) == sum(p.requires_grad for p in method.parameters())
        optimizer.step()
    close(torch.stack(losses), GOLDEN[f"{case}/{dtype}/losses"], tolerance, "losses")
    for name, value in tensors(f"{case}/{dtype}/after").items():
        close(method.state_dict()[name], value, tolerance, name)


def test_all_patches_pass_in_evaluation():
    method = made("normalized", "f64").eval()
    images = GOLDEN["images"][0].double()
    close(method.encoder().tokens(images), GOLDEN["normalized/f64/tokens"], 1e-12, "tokens")
    assert torch.equal(method.encoder()(images), method.encoder().tokens(images)[:, 0])
