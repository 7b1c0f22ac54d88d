"""The losses of the methods on plain embeddings, for a training loop of one's own: functions, and modules of them.

    from ssl_dist import losses
    loss = losses.nt_xent(z1, z2, temperature=0.2)           # each [B, D], row i of both from image i

Views are embeddings [B, D] of B images in one order, floating point; half precision is raised to float32. A loss is a
scalar with gradient; a wrong shape is a `ValueError` that says the shapes.

Over several ranks (an initialised process group) the images of all ranks are one batch: give each rank its own B
images, the same number on every rank, and let DistributedDataParallel average the gradients; they are those of one
process that holds the whole batch. The mean over the ranks of the loss is its loss.
"""

from ssl_dist.losses.functional import (
    align_uniform,
    barlow_twins,
    byol,
    dcl,
    deepcluster,
    dino,
    dino_center,
    lejepa,
    mae,
    mocov2,
    mocov3,
    nt_xent,
    relational,
    relic,
    sela,
    sela_labels,
    sfrik,
    sigreg,
    simsiam,
    vicreg,
)
from ssl_dist.losses.modules import SFRIK, AlignUniform, DeepInfoMax, NTXent, Relational, ReLIC, VICReg
from ssl_dist.methods.relational import RelationModule

__all__ = [
    "SFRIK",
    "AlignUniform",
    "DeepInfoMax",
    "NTXent",
    "ReLIC",
    "RelationModule",
    "Relational",
    "VICReg",
    "align_uniform",
    "barlow_twins",
    "byol",
    "dcl",
    "deepcluster",
    "dino",
    "dino_center",
    "lejepa",
    "mae",
    "mocov2",
    "mocov3",
    "nt_xent",
    "relational",
    "relic",
    "sela",
    "sela_labels",
    "sfrik",
    "sigreg",
    "simsiam",
    "vicreg",
]  # fmt: skip
