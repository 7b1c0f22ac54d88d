"""The deterministic values that the golden fixtures were made with (exact integer arithmetic, rounded to float32)."""

import json
import math

import torch


def u(i, count, s):
    """count values in [-1, 1) for tensor number i; as j counts modulo 10007, they repeat."""
    j = torch.arange(min(count, 10007), dtype=torch.int64)
    once = 2 * ((1009 * (i + 1) + 37 * j + 11 * j * j + s) % 10007).double() / 10007 - 1
    return once.repeat(-(-count // 10007))[:count]


def value(i, shape, kind, s):
    values = u(i, math.prod(shape), s).reshape(shape)
    return {
        "weight": lambda: values * math.sqrt(3 / math.prod(shape[1:])),
        "bias": lambda: 0.05 * values,
        "bn_weight": lambda: 1 + 0.1 * values,
        "bn_bias": lambda: 0.1 * values,
        "running_mean": lambda: 0.05 * values,
        "running_var": lambda: 1 + 0.25 * values,
        "num_batches_tracked": lambda: torch.zeros(shape),
    }[kind]().float()


def spec(fixture, net):
    return json.loads(str(fixture[f"{net}/spec"]))


def scale(fixture):
    return json.loads(str(fixture["_meta"]))["fill_s"]


def state_dict(fixture, net):
    """The filled tensors of a network in its state_dict's order, float32 (counters int64)."""
    tensors = {}
    for entry in spec(fixture, net):
        tensor = value(entry["i"], entry["shape"], entry["kind"], scale(fixture))
        tensors[entry["name"]] = tensor.long() if entry["kind"] == "num_batches_tracked" else tensor
    return tensors


def image(fixture, net):
    """The formula image of a network, float32."""
    shape = tuple(int(n) for n in fixture[f"{net}/input_shape"])
    values = 1.7 * u(int(fixture[f"{net}/input_formula_i"]), math.prod(shape), scale(fixture))
    return values.float().reshape(shape)


def fill(module, s):
    """Fill a module in the order of its own state_dict, as the spec of such a network would say; returns it."""
    layers = dict(module.named_modules())
    tensors = {}
    for i, (name, tensor) in enumerate(module.state_dict().items()):
        path, _, kind = name.rpartition(".")
        normalizes = isinstance(layers[path], torch.nn.modules.batchnorm._BatchNorm)
        kind = f"bn_{kind}" if normalizes and kind in ("weight", "bias") else kind
        tensors[name] = value(i, list(tensor.shape), kind, s).to(tensor.dtype)
    module.load_state_dict(tensors)
    return module
