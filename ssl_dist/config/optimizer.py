"""The section `optim`: the optimizer, its rates and the length of a training."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ssl_dist.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Probability, Section

MAX_RATE = 1e38  # a float32
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    name: Literal["adam", "adamw", "sgd", "lars"] = Field("adam", description="the optimizer")
    lr: PositiveFloat = Field(
        1e-3, le=MAX_RATE, description="learning rate at its highest, for a batch of `lr_batch` images"
    )
    lr_batch: PositiveInt | None = Field(
        None, description="the rate is lr * batch_size / lr_batch (LARS recipes: 256); null: lr as it stands"
    )
    bias_lr: PositiveFloat | None = Field(
        None, le=MAX_RATE, description="lars: `lr` of biases and BatchNorm; null: that of the weights"
    )
    batch_size: PositiveInt = Field(64, description="M, images of the global batch over all ranks")
    accumulate: PositiveInt = Field(
        1,
        description="parts in which a rank's images pass the backbone, one at a time held for the gradient, which is "
        "that of the whole batch; for backbones without BatchNorm",
    )
    epochs: PositiveInt | None = Field(200, description="length of the training; null when `steps` is given")
    steps: PositiveInt | None = Field(None, description="length in optimizer steps; null when `epochs` is given")
    weight_decay: NonNegativeFloat = Field(
        0.0, le=MAX_RATE, description="lars: of weights only, not of biases and BatchNorm"
    )
    weight_decay_final: NonNegativeFloat | None = Field(
        None, le=MAX_RATE, description="where it ends, by half a cosine over the training; null: it is constant"
    )
    decay_vectors: bool = Field(
        True, description="whether it is also of biases, normalisation and other vectors; of lars it never is"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="a block of the backbone has the rate of the one after it times this; what follows the last block "
        "has `lr`",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of sgd and lars")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), strict=False, description="adam, adamw: shares that the averages of gradient and square keep"
    )
    clip_norm: PositiveFloat | None = Field(
        None, description="a longer gradient of the global batch is shortened to this norm; null: none is"
    )
    clip_of: Literal["all", "each_tensor"] = Field(
        "all", description="what has that norm: the gradient of all parameters, or that of each tensor (DINO)"
    )
    warmup_epochs: NonNegativeFloat = Field(0.0, description="linear rise of the rate from 0, in (fractional) epochs")
    schedule: Literal["constant", "cosine", "epoch_cosine", "step"] = Field(
        "constant", description="of the rate, after the warm-up; epoch_cosine: a cosine, constant within an epoch"
    )
    lr_final: Probability = Field(
        0.0, description="schedules of a cosine: where the rate ends, as a share of its highest"
    )
    milestones: list[Probability] = Field(
        default_factory=lambda: [0.5, 0.75],
        description="schedule step: the rate falls to a tenth at these shares of the training",
    )
    milestone_epochs: list[NonNegativeFloat] | None = Field(
        None, description="schedule step: falls after these epochs, in place of `milestones`; null: milestones"
    )

    @property
    def peak_lr(self) -> float:
        """The learning rate at its highest, for this batch size."""
        return self.lr if self.lr_batch is None else self.lr * self.batch_size / self.lr_batch

    @model_validator(mode="before")
    @classmethod
    def _steps_alone(cls, given: Any) -> Any:
        """Where only `steps` is given, it is no length besides the default of `epochs`."""
        if isinstance(given, dict) and given.get("steps") is not None and "epochs" not in given:
            return given | {"epochs": None}
        return given

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.peak_lr > MAX_RATE:
            raise ValueError(f"lr: {self.peak_lr:g} for a batch of {self.batch_size} is above {MAX_RATE:g}; lower it")
        if self.bias_lr is not None and self.name != "lars":
            raise ValueError(f"bias_lr: of lars alone, not of {self.name}; set it to null")
        if self.name not in ("adam", "adamw") and self.betas != (0.9, 0.999):
            raise ValueError(f"betas: of adam and adamw, not of {self.name}; leave them out")
        if self.clip_norm is None and self.clip_of != "all":
            raise ValueError(f"clip_of: {self.clip_of} has no clip_norm; give one, 3.0 say, or leave it out")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("epochs: exactly one of epochs and steps must be given; set the other to null")
        return self
