"""Fine-tuning: the whole network trained on labels, all of them or a few (data.subset), by the recipe of a paper."""

from typing import Literal

from pydantic import Field

from ssl_dist.config import PositiveFloat
from ssl_dist.transfer.recipe import CROP_AND_FLIP, Overrides, Recipe, tested, train_and_classify
from ssl_dist.transfer.subject import EvalContext

_SEMI_SUPERVISED = {"name": "sgd", "batch_size": 256, "epochs": 20, "schedule": "epoch_cosine"}


def _semi_supervised(paper: str, backbone_lr: float, head_lr: float) -> Recipe:
    return Recipe(
        paper, _SEMI_SUPERVISED | {"lr": backbone_lr}, CROP_AND_FLIP, {"head_lr": head_lr / backbone_lr, "init": 0.01}
    )


RECIPES = {
    # Its schedule would lower the rates after epochs 100 and 150, which the 100 epochs never reach.
    "relational": Recipe(
        "relational reasoning",
        {"name": "adam", "lr": 1e-3, "weight_decay": 1e-5, "batch_size": 128, "epochs": 100},
        options={"head_lr": 0.1},
    ),
    # The last column of the paper's Table 1: 20 epochs. The views are what the official code calls its fine-tuning
    # views; it uses them where it trains on STL-10's labels alone.
    "relational_stl10": Recipe(
        "relational reasoning on STL-10's labelled images",
        {"name": "adam", "lr": 1e-3, "weight_decay": 1e-5, "batch_size": 128, "epochs": 20},
        {
            "horizontal_flip": 0.5,
            "affine": {"p": 0.5, "degrees": 18, "translate": [0.1, 0.1], "scale": [0.9, 1.1], "shear": 10},
            "erasing": {"p": 0.5, "scale": [0.111, 0.111], "ratio": [1.0, 1.0], "fill": [128, 128, 128]},
        },
        {"head_lr": 0.1},
    ),
    "sfrik_1": _semi_supervised("SFRIK with 1 % of labels", 0.004, 1.0),
    "sfrik_10": _semi_supervised("SFRIK with 10 % of labels", 0.02, 0.1),
    "vicreg_1": _semi_supervised("VICReg with 1 % of labels", 0.03, 0.08),
    "vicreg_10": _semi_supervised("VICReg with 10 % of labels", 0.01, 0.1),
}
VERSION = 1


class Options(Overrides):
    recipe: Literal["relational", "relational_stl10", "sfrik_1", "sfrik_10", "vicreg_1", "vicreg_10"] = Field(
        "relational", description="whose protocol: optimizer, rates, schedule, views and first weights"
    )
    head_lr: PositiveFloat | None = Field(
        None, description="learning rate of the classifier as a factor of the backbone's; null: the recipe's"
    )


def protocol(options: Options) -> str:
    recipe = _recipe(options)
    return (
        f"fine-tuning of the whole network as in {recipe.paper}: {recipe.description}, rate of the classifier "
        f"{recipe.options['head_lr']:g} times that; {tested(options.epoch)}, all test images, centre crop"
    )


def measure(context: EvalContext, options: Options) -> dict[str, float]:
    """`finetune_top1` and `finetune_top5` in percent."""
    return train_and_classify(context, "finetune", *training(options), options.epoch).values("finetune")


def training(options: Options) -> tuple[str, Recipe]:
    """The method that is trained, and how."""
    return "fine_tuning", _recipe(options)


def _recipe(options: Options) -> Recipe:
    """The recipe with the user's changes."""
    return RECIPES[options.recipe].replaced(options, head_lr=options.head_lr)
