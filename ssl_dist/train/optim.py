"""Optimizers and the learning rate, a pure function of the clock."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssl_dist.clock import Clock
from ssl_dist.config import Optim
from ssl_dist.nn.backbone import Backbone

Group = dict[str, Any]  # "params" and what is set for them alone
LEAST_LOSS_SCALE = 2.0**-16  # it begins at 2^16: so far down it is not the scale that makes gradients infinite


def build(
    options: Optim, groups: list[Group], device: torch.device, backbone: Backbone | None = None
) -> torch.optim.Optimizer:
    """The optimizer named by the config over groups of parameters; rates and weight decay are set before every step. On
    a GPU each step of torch's is a handful of launches. backbone: for `layer_decay`.

    Groups are parted where their parameters differ: biases, normalisation and scalars such as a learnt temperature do
    not decay under lars, which does not adapt them either, nor without `decay_vectors`; and by depth.
    """
    if options.layer_decay < 1 and backbone is not None:
        factors = layer_factors(backbone, options.layer_decay)
        groups = [part for group in groups for part in _by_depth(group, factors)]
    if options.name == "lars" or not options.decay_vectors:
        groups = [half for group in groups for half in _with_and_without_decay(group, options)]
    if options.name == "lars":
        return LARS(groups, lr=options.lr, weight_decay=options.weight_decay, momentum=options.momentum)
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay, "fused": device.type == "cuda"}
    if options.name in ("adam", "adamw"):
        kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
        return kind(groups, betas=options.betas, **common)
    return torch.optim.SGD(groups, momentum=options.momentum, **common)


def _with_and_without_decay(group: Group, options: Optim) -> list[Group]:
    matrices, vectors = ([p for p in group["params"] if (p.ndim > 1) is decays] for decays in (True, False))
    without: Group = {"params": vectors, "weight_decay": 0.0, "constant_decay": True}
    if options.name == "lars":
        factor = 1.0 if options.bias_lr is None else options.bias_lr / options.lr
        without |= {"adapt": False, "lr_factor": factor * group.get("lr_factor", 1.0)}
    return [group | {"params": matrices}, group | without]


def layer_factors(backbone: Backbone, decay: float) -> dict[nn.Parameter, float]:
    """What the rates of the backbone's parameters are multiplied by (Clark et al., ICLR 2020; BEiT, appendix H): of L
    blocks, decay^(L + 1 - l) in block l, where what comes before the first is block 0 and what comes after the last is
    not slowed."""
    blocks = backbone.blocks()
    depths = {p: number for number, block in enumerate(blocks, 1) for p in block.parameters()}
    depth, factors = 0, {}
    for p in backbone.parameters():
        if p in depths:
            depth = len(blocks) + 1
        factors[p] = decay ** (len(blocks) + 1 - depths.get(p, depth))
    return factors


def _by_depth(group: Group, factors: Mapping[nn.Parameter, float]) -> list[Group]:
    """The group in parts whose parameters have one factor."""
    parts: dict[float, list[nn.Parameter]] = {}
    for p in group["params"]:
        parts.setdefault(factors.get(p, 1.0), []).append(p)
    rate = group.get("lr_factor", 1.0)
    return [group | {"params": params, "lr_factor": rate * factor} for factor, params in parts.items()]


def lr(options: Optim, clock: Clock) -> float:
    """The learning rate of the step that follows `clock.step` completed steps.

    A linear warm-up over `warmup_epochs`, 0 at the very first step; then constant, half a cosine down to `lr_final`
    times the peak (Loshchilov & Hutter, 2017, without restarts), from step to step or, as torch's scheduler is mostly
    used, from epoch to epoch (epoch_cosine); or a fall to a tenth at every milestone.
    """
    warmup = options.warmup_epochs * clock.steps_per_epoch
    if clock.step < warmup:
        return options.peak_lr * clock.step / warmup
    if options.schedule in ("cosine", "epoch_cosine"):
        step = clock.step if options.schedule == "cosine" else max(warmup, clock.epoch * clock.steps_per_epoch)
        progress = (step - warmup) / max(1.0, clock.total_steps - warmup)
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return options.peak_lr * (options.lr_final + (1 - options.lr_final) * falling)
    if options.schedule == "step":
        return options.peak_lr * 0.1 ** sum(clock.step >= milestone for milestone in milestones(options, clock))
    return options.peak_lr


def milestones(options: Optim, clock: Clock) -> list[int]:
    """The steps from which on the rate is lower, under schedule step. 0.07 of 100 steps is step 7, not 8."""
    if options.milestone_epochs is not None:
        steps = [epoch * clock.steps_per_epoch for epoch in options.milestone_epochs]
    else:
        steps = [share * clock.total_steps for share in options.milestones]
    return [math.ceil(round(step, 6)) for step in steps]


def weight_decay(options: Optim, clock: Clock) -> float:
    """The weight decay of the step that follows `clock.step` completed steps: half a cosine from `weight_decay` to
    `weight_decay_final` where that is given (DINO, section 3.2)."""
    first, last = options.weight_decay, options.weight_decay_final
    if last is None:
        return first
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * clock.step / clock.total_steps))


def set_rates(optimizer: torch.optim.Optimizer, options: Optim, clock: Clock) -> None:
    """Learning rate and weight decay of the coming step, in every group."""
    set_lr(optimizer, lr(options, clock), options.peak_lr)
    if options.weight_decay_final is not None:
        decay = weight_decay(options, clock)
        for group in optimizer.param_groups:
            if not group.get("constant_decay"):
                group["weight_decay"] = decay


def set_lr(optimizer: torch.optim.Optimizer, rate: float, peak: float | None = None) -> None:
    """The learning rate of every group: `rate`, or `peak` in groups that keep it, times its factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = (peak if group.get("constant_lr") else rate) * group.get("lr_factor", 1.0)


def clip(optimizer: torch.optim.Optimizer, options: Optim) -> Tensor | None:
    """Shorten the gradients, which are equal on all ranks, as the config asks for. Returns the norm that all of them
    together had; None where there is nothing to clip."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if options.clip_norm is None or not gradients:
        return None
    norms = torch._foreach_norm(gradients)
    total = torch.stack([norm.to(torch.float32) for norm in norms]).norm()
    lengths = norms if options.clip_of == "each_tensor" else [total] * len(gradients)
    # as torch.nn.utils.clip_grad_norm_ does it, and as DINO's own function
    factors = [(options.clip_norm / (length + 1e-6)).clamp(max=1.0) for length in lengths]
    torch._foreach_mul_(gradients, factors)
    return total


def reset_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forget the optimizer's state of parameters that a method has drawn anew."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


class LossScaler(torch.amp.GradScaler):
    """The factor by which the loss is multiplied in fp16, so that small gradients do not become 0 (Micikevicius et al.,
    2018, arXiv:1710.03740, section 3.2). A step whose gradient is not finite is passed over and halves the factor; it
    is doubled after 2,000 others in a row. The host waits for none of this where the optimizer looks at `found_inf`, as
    torch's fused ones and LARS do. Not enabled, it does nothing.
    """

    def state(self) -> dict[str, float]:
        """For a checkpoint; empty where it is not enabled."""
        state = self.state_dict()
        return {"scale": state["scale"], "growth_tracker": state["_growth_tracker"]} if state else {}

    def restore(self, state: Mapping[str, float]) -> None:
        """What `state` gave. An empty one, of a run in another precision, changes nothing."""
        if state:
            own = {"scale": state["scale"], "_growth_tracker": state["growth_tracker"]}
            self.load_state_dict(self.state_dict() | own)

    def on_device(self) -> Tensor:
        """The factor, for which `get_scale` would wait. After the first step."""
        assert self._scale is not None
        return self._scale.clone()  # it is changed in place


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You, Gitman & Ginsburg 2017, arXiv:1708.03888) as VICReg and SFRIK use them,
    arXiv:2105.04906 appendix C: SGD with momentum whose gradient is first scaled, tensor by tensor, to `trust` times
    the weights' norm.

        g <- g + weight_decay * p;  g <- g * trust * |p| / |g|;  m <- momentum * m + g;  p <- p - lr * m

    The scaling is left out where |p| or |g| is 0, and in groups with `adapt` False. timm's variant divides by |g| +
    weight_decay * |p| where this one divides by |g + weight_decay * p|, so that a weight whose decay and gradient point
    apart moves differently.
    """

    _step_supports_amp_scaling = True  # GradScaler sets `found_inf` before a step
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[Group],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        adapt: bool = True,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's returns the closure's loss
        assert closure is None, "the loop calls backward itself"
        for group in self.param_groups:
            tensors = [p for p in group["params"] if p.grad is not None]
            if not tensors:
                continue
            moments = [self._moment(p) for p in tensors]
            before = [x.clone() for x in tensors + moments] if self.found_inf is not None else []
            # All tensors at once: on a GPU the launches of small operations take longer than the operations.
            gradients = torch._foreach_add([p.grad for p in tensors], tensors, alpha=group["weight_decay"])
            if group["adapt"]:
                norms = zip(torch._foreach_norm(tensors), torch._foreach_norm(gradients), strict=True)
                rates = [
                    # stays on the device: a question here would wait for the GPU
                    torch.where((of_p > 0) & (of_g > 0), group["trust"] * of_p / of_g, 1)
                    for of_p, of_g in norms
                ]
                torch._foreach_mul_(gradients, rates)
            torch._foreach_mul_(moments, group["momentum"])
            torch._foreach_add_(moments, gradients)
            torch._foreach_add_(tensors, moments, alpha=-group["lr"])
            if self.found_inf is not None:
                for x, old in zip(tensors + moments, before, strict=True):
                    torch.where(self.found_inf > 0, old, x, out=x)

    def _moment(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]
