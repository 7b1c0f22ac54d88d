"""Linear probe: a linear classifier trained on the frozen backbone by the recipe of one of the papers.

`logistic` finds the optimum on features of unaugmented images; this is what the papers' tables hold.
"""

from typing import Literal

from pydantic import Field

from ssl_dist.nn.features import OUTPUT
from ssl_dist.transfer.classification import CROPS, Crops
from ssl_dist.transfer.recipe import CROP_AND_FLIP, Overrides, Recipe, tested, train_and_classify
from ssl_dist.transfer.subject import EvalContext

_SGD = {"name": "sgd", "weight_decay": 1e-6, "batch_size": 256, "epochs": 100, "schedule": "epoch_cosine"}
RECIPES = {
    "relational": Recipe(
        "relational reasoning",
        {"name": "adam", "lr": 1e-3, "batch_size": 128, "epochs": 100},
    ),
    "sfrik": Recipe("SFRIK", _SGD | {"lr": 0.4}, CROP_AND_FLIP, {"init": 0.01}),
    "vicreg": Recipe("VICReg", _SGD | {"lr": 0.02}, CROP_AND_FLIP, {"init": 0.01}),
    "sela_alexnet": Recipe(
        "SeLa, AlexNet",
        {
            "name": "sgd", "lr": 0.01, "weight_decay": 1e-5, "batch_size": 192, "epochs": 36,
            "schedule": "step", "milestone_epochs": [10, 20, 30],
        },
        CROP_AND_FLIP,
        {"stages": "all", "init": "xavier"},
        crops=10,
    ),
    "sela_resnet": Recipe(
        "SeLa, ResNet",
        {
            "name": "sgd", "lr": 0.1, "batch_size": 1024, "epochs": 146,
            "schedule": "step", "milestone_epochs": [85, 128],
        },
        CROP_AND_FLIP,
        {"batchnorm": "batch"},
    ),
}  # fmt: skip
VERSION = 1
READS_LAYERS = True


class Options(Overrides):
    recipe: Literal["relational", "sfrik", "vicreg", "sela_alexnet", "sela_resnet"] = Field(
        "relational", description="whose protocol: optimizer, schedule, views, BatchNorm and first weights"
    )
    stages: Literal["all"] | list[str] | None = Field(
        None, description="all, or a list of the backbone's stages: a probe on the map of each; null: the recipe's"
    )
    batchnorm: Literal["frozen", "batch"] | None = Field(
        None, description="of the backbone: frozen, or batch statistics as in SeLa's ResNet probe; null: the recipe's"
    )
    crops: Crops | None = Field(
        None, description="of a test image: 1, its centre; 10, corners and centre, and mirrored; null: the recipe's"
    )


def protocol(options: Options) -> str:
    recipe = _recipe(options)
    statistics = ", BatchNorm of the backbone in training mode" if recipe.options.get("batchnorm") == "batch" else ""
    stages = recipe.options.get("stages")
    where = "output" if stages is None else f"stages ({stages})"
    return (
        f"linear probe on the frozen backbone's {where} as in {recipe.paper}: {recipe.description}{statistics}; "
        f"{tested(options.epoch)}, all test images, {CROPS[recipe.crops]}"
    )


def measure(context: EvalContext, options: Options) -> dict[str, float]:
    """`probe_top1` and `probe_top5` in percent; `probe_<stage>_top1` and `_top5` for every stage."""
    method, recipe = training(options)
    if (layer := context.encoder.layer) != OUTPUT:
        recipe = recipe.replaced(options, layer=layer)
    return train_and_classify(context, "probe", method, recipe, options.epoch).values("probe")


def training(options: Options) -> tuple[str, Recipe]:
    """The method that is trained, and how."""
    return "linear_probe", _recipe(options)


def _recipe(options: Options) -> Recipe:
    """The recipe with the user's changes."""
    return RECIPES[options.recipe].replaced(options, options.crops, stages=options.stages, batchnorm=options.batchnorm)
