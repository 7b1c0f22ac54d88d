"""What a checkpoint's state must be before anything is done with it: the types of all that is read of it."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from ssl_dist.errors import quoted

MAX_INT = 10**12
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
CountOrNone = Annotated[int, Field(ge=0, le=MAX_INT)]
Constants = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=32)]
Deviations = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1, max_length=32)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


def _is_dense(value: Any) -> Any:
    if isinstance(value, Tensor) and (value.is_sparse or value.is_meta or value.is_quantized):
        raise ValueError("a tensor without values in a row")
    return value


Dense = Annotated[Tensor, BeforeValidator(_is_dense)]


class Normalize(_Strict):
    mean: Constants
    std: Deviations


class RunInfo(_Strict):
    """The fields of `methods.base.Info`."""

    num_images: Count
    num_classes: CountOrNone
    view_groups: tuple[tuple[Count, Count], ...]
    batch_size: Count
    total_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    feature_dim: CountOrNone = 0
    stages: dict[str, Count] = {}
    steps_per_epoch: Count = 1
    seed: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] = 0
    channels: Annotated[int, Field(ge=1, le=32)] = 3


class Optimizer(_Strict):
    """As torch's optimizers give it; `checkpoint.restore_optimizer` compares it with one."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class LossScale(_Strict):
    """As `train.optim.LossScaler` gives it."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    growth_tracker: CountOrNone


class Probe(_Strict):
    """As `train.online_probe.OnlineProbe` gives it."""

    classifier: dict[str, Dense]
    optimizer: Optimizer


class State(_Strict):
    """The keys that every checkpoint has, VOC's too, which has no `info`; more are passed over."""

    model_config = ConfigDict(extra="ignore")

    step: CountOrNone
    config: dict[str, JsonValue]
    method: dict[str, Dense]
    world_size: Count
    versions: dict[str, str]
    data: dict[str, str]
    normalize: dict[str, Any]
    info: dict[str, Any]
    optimizer: dict[str, Any]
    loss_scale: dict[str, float] = {}  # of a run in fp16
    probe: dict[str, Any] = {}  # of a run with an online one
    classes: list[str] | None = None  # that a classifier tells apart; None: numbers, or written before there was this


SECTIONS: dict[str, type[BaseModel]] = {
    "normalize": Normalize,
    "info": RunInfo,
    "optimizer": Optimizer,
    "loss_scale": LossScale,
    "probe": Probe,
}


def fault_of(state: dict[str, Any]) -> str:
    """The first value of a wrong type or range in a checkpoint's state, in a line; empty: there is none."""
    section = ""
    try:
        State.model_validate(state)
        for section, model in SECTIONS.items():
            if state.get(section):
                model.model_validate(state[section])
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part)[:80] for part in (section, *fault["loc"]) if part != "")
        message, value = fault["msg"].removeprefix("Value error, "), fault["input"]
        shown = quoted(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        return f"{key} = {shown}: {message[0].lower()}{message[1:]}"
    channels = state["info"].get("channels", 3)
    for key, values in state["normalize"].items():
        if state["info"] and len(values) != channels:
            return f"normalize.{key} = a list: has {len(values)} values, and images {channels} channels"
    return ""
