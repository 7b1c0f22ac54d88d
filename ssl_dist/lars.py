"""LARS (You, Gitman & Ginsburg 2017, arXiv:1708.03888) as VICReg and SFRIK use it, arXiv:2105.04906 appendix C.

timm's variant divides by |g| + weight_decay * |p| where this one divides by |g + weight_decay * p|, so that a weight
whose decay and gradient point apart moves differently.
"""

from collections.abc import Iterable

import torch
from torch import nn


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose gradient is first scaled, tensor by tensor, to `trust` times the weights' norm.

        g <- g + weight_decay * p;  g <- g * trust * |p| / |g|;  m <- momentum * m + g;  p <- p - lr * m

    The scaling is left out where |p| or |g| is 0, and in groups with `adapt` False.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        adapt: bool = True,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "the loop calls backward itself"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"])
                if group["adapt"]:
                    p_norm, g_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(g)
                    both = (p_norm > 0) & (g_norm > 0)  # stays on the device: a question here would wait for the GPU
                    g.mul_(torch.where(both, group["trust"] * p_norm / g_norm, 1))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(g)
                p.add_(buffer, alpha=-group["lr"])
