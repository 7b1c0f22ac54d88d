"""How long a training step takes on a named device, and what bounds it.

The model is the roofline (Williams, Waterman & Patterson, 2009, doi:10.1145/1498765.1498785), operation by operation:

    seconds = start + max(flops / (flop/s), bytes / (byte/s))

devices.yaml has the rates of GPUs: those of the data sheets times an efficiency. tools/bench_rates.py measures the
rates of a CPU. Four things share a step and can bound it: the device (its arithmetic or its memory, then the network),
the host that starts operations on a GPU, the copy of pixels to it, and the cores that make views.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ssl_dist.config import NonNegativeFloat, PositiveFloat, PositiveInt, Probability, Section, validate
from ssl_dist.config.section import parse_yaml, read_yaml
from ssl_dist.errors import UserError, did_you_mean, quoted
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.train.operations import Collective, Operation, Step
from ssl_dist.views.draw import BLUR

Precision = Literal["fp64", "fp32", "tf32", "bf16", "fp16"]
Share = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "memory", "network"]


class Rate(Section):
    """Of an operator. None: what the device has in general."""

    start_s: NonNegativeFloat
    flop_per_s: PositiveFloat | None = None
    byte_per_s: PositiveFloat | None = None


class ConvolutionRate(Section):
    """flop/s of a convolution of the shape [channels in, channels out, side of the kernel, side of the output]."""

    shape: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(strict=False)
    forward: PositiveFloat
    backward: PositiveFloat

    def distance(self, shape: tuple[int, int, int, int]) -> float:
        """Of another shape, in doublings."""
        return sum(abs(math.log2(own / other)) for own, other in zip(self.shape, shape, strict=True))


class ViewRate(Section):
    """Pixels per core and second of views of a side, with random crops and colour jitter."""

    side: PositiveInt
    plain: PositiveFloat
    blurred: PositiveFloat


class LoaderRate(Section):
    """Of one core."""

    image_s: NonNegativeFloat = Field(description="of the decoding of an image, however small")
    decoded: PositiveFloat = Field(description="further pixels of JPEG images a second")
    views: Annotated[list[ViewRate], Field(min_length=1)]

    def seconds_a_pixel(self, side: int, blur: float) -> float:
        """Of one core, for views of this side of which the share `blur` is blurred."""
        nearest = min(self.views, key=lambda rate: abs(math.log2(rate.side / side)))
        return (1 - blur) / nearest.plain + blur / nearest.blurred


class Link(Section):
    """What a rank sends, and at once receives, to ranks of its node or of others."""

    byte_per_s: PositiveFloat
    latency_s: NonNegativeFloat = Field(description="of a collective, however small")
    host_s: NonNegativeFloat = Field(0.0, description="of the processor, for a collective; not in the latency")


class Device(Section):
    """A GPU with its share of a node, or a CPU of which every rank has a thread."""

    name: str
    kind: Literal["cpu", "cuda"]
    sources: list[str]
    ranks: PositiveInt | None = Field(None, description="that shared the node when it was measured; None: not measured")
    flop_per_s: dict[Precision, PositiveFloat] = Field(description="of convolutions and products, at the peak")
    byte_per_s: PositiveFloat = Field(description="of its memory, at the peak")
    efficiency: dict[Share, Probability] = Field(default_factory=dict, description="shares of the peaks; else 1")
    start_s: NonNegativeFloat = Field(description="of an operation on the device, however small")
    launch_s: NonNegativeFloat = Field(0.0, description="of the host, for an operation of a GPU")
    node: Link
    network: Link | None = Field(None, description="None: one node only")
    upload_byte_per_s: PositiveFloat | None = Field(None, description="from the host to a GPU")
    cores: PositiveInt = Field(description="for a GPU's views; of a CPU, for all ranks of a node and their views")
    loader: LoaderRate
    operations: dict[str, Rate] = Field(default_factory=dict)
    convolutions: list[ConvolutionRate] = Field(default_factory=list)

    @property
    def basis(self) -> str:
        """What the rates stand on, for a reader of an estimate."""
        if self.ranks is None:
            return "by data sheets, times efficiencies that ssl_dist/train/devices.yaml states; measured on none here"
        return f"by {'; '.join(self.sources)}"

    def reached(self, share: Share, peak: float) -> float:
        return peak * self.efficiency.get(share, 1.0)

    def seconds(self, operation: Operation, precision: Precision) -> tuple[float, float]:
        """By arithmetic and by memory: the longer of the two counts. Both begin with the start."""
        if operation.in_float32 and precision in ("bf16", "fp16"):
            precision = "fp32"
        rate = self.operations.get(operation.name, Rate(start_s=self.start_s))
        flop_per_s = rate.flop_per_s or self.reached(precision, self.flop_per_s[precision])
        byte_per_s = rate.byte_per_s or self.reached("memory", self.byte_per_s)
        if operation.convolution and self.convolutions:
            shape = operation.convolution
            nearest = min(self.convolutions, key=lambda measured: measured.distance(shape))
            flop_per_s = nearest.backward if operation.name.endswith("backward") else nearest.forward
        return rate.start_s + operation.flops / flop_per_s, rate.start_s + operation.num_bytes / byte_per_s

    def sending(self, collective: Collective, ranks_per_node: int) -> float:
        """Seconds. Between nodes each of a node's ranks has a network card, and the rings use all of them."""
        link, byte_per_s = self.node, self.node.byte_per_s
        latency_s = link.latency_s
        if collective.size > ranks_per_node and self.network is not None:
            byte_per_s = min(byte_per_s, ranks_per_node * self.network.byte_per_s)
            latency_s += self.network.latency_s * math.ceil(math.log2(collective.size / ranks_per_node))
        return latency_s + collective.sent / self.reached("network", byte_per_s)


@dataclass(frozen=True)
class Times:
    """Seconds of a step. `device` goes on while the host, the upload and the loader do."""

    arithmetic: float
    memory: float
    network: float  # what is not hidden behind the backward pass
    host: float
    upload: float
    loader: float
    computing: float  # of the device; on a CPU with the Python that starts operations
    device: float  # computing, and the network
    step: float

    def parts(self, device: Device) -> dict[str, float]:
        """Seconds by name. On a CPU the loader's are those of all cores with all that they do."""
        parts = {"arithmetic": self.arithmetic, "memory": self.memory, "network": self.network, "starting": self.host}
        if device.kind == "cpu":
            return parts | {"all work on the node's cores": self.loader}
        return parts | {"upload": self.upload, f"loader with {device.cores} cores": self.loader}

    @property
    def bound(self) -> str:
        """What would have to be faster for the step to be."""
        others = {"the host that starts operations": self.host, "the copy to the GPU": self.upload}
        others["the loader's cores"] = self.loader
        name, longest = max(others.items(), key=lambda item: item[1])
        if longest >= self.device:
            return name
        return max(
            ("arithmetic", self.arithmetic), ("memory", self.memory), ("the network", self.network), key=lambda i: i[1]
        )[0]


def estimate(step: Step, plan: RunPlan, device: Device) -> Times:
    """Raises `UserError` where the device has no rate of the config's precision, or of several nodes."""
    precision = _precision(plan, device)
    ranks, per_node = plan.rank_info.world_size, plan.rank_info.local_world_size
    if ranks > per_node and device.network is None:
        raise UserError(f"{device.name} has no rates between nodes; leave out --ranks-per-node")
    times = [device.seconds(operation, precision) for operation in step.operations]
    arithmetic = sum(flops for flops, num_bytes in times if flops >= num_bytes)
    memory = sum(num_bytes for flops, num_bytes in times if flops < num_bytes)
    backward = sum(map(max, times[step.backward : step.update]))
    sending = [(c.overlapped, device.sending(c, per_node)) for c in step.collectives]
    hidden = sum(seconds for overlapped, seconds in sending if overlapped)
    if device.kind == "cpu":  # the threads that exchange take the ranks' cores: nothing hides
        backward = 0.0
    network = sum(seconds for overlapped, seconds in sending if not overlapped) + max(0.0, hidden - backward)
    host = device.launch_s * (len(step.operations) + len(step.collectives)) + device.node.host_s * len(sending)
    loader, upload = _loader(plan, device.loader), 0.0
    if device.kind == "cpu":  # the host is the device; ranks and their loaders share the cores
        computing = arithmetic + memory + host
        loader = (loader + computing) * per_node / device.cores
    else:
        computing = arithmetic + memory
        loader /= device.cores
        upload = step.pixel_bytes / (device.upload_byte_per_s or math.inf)
    total = computing + network
    step_s = max(total, host, upload, loader)
    return Times(arithmetic, memory, network, host, upload, loader, computing, total, step_s)


def _precision(plan: RunPlan, device: Device) -> Precision:
    config = plan.config
    precision: Precision = config.precision
    if config.tf32 and precision == "fp32" and "tf32" in device.flop_per_s:
        precision = "tf32"
    if precision not in device.flop_per_s:
        known = ", ".join(device.flop_per_s)
        raise UserError(f"precision = {precision}: {device.name} has rates of {known} only; choose one of them")
    return precision


def _loader(plan: RunPlan, rate: LoaderRate) -> float:
    """Core-seconds for the views of a step on this rank."""
    grid, split = plan.grid, plan.split
    images = plan.config.optim.batch_size // grid.images
    seconds = images * (rate.image_s + split.max_height * split.max_width / rate.decoded)
    for spec in plan.specs:
        pixels = images * spec.num // grid.views * spec.size**2
        seconds += pixels * rate.seconds_a_pixel(spec.size, float(spec.params[BLUR]))
    return seconds


def named(name: str) -> Device:
    """Of devices.yaml, beside this file. Raises `UserError`."""
    devices = read_table()
    if name not in devices:
        known = ["cpu", "cuda", *devices]
        raise UserError(f"--device {quoted(name)}: {did_you_mean(name, known)}known: {', '.join(known)}")
    return devices[name]


def read_table() -> Mapping[str, Device]:
    text = resources.files("ssl_dist.train").joinpath("devices.yaml").read_text(encoding="utf-8")
    rows = parse_yaml(text, "devices.yaml")
    return {row["name"]: validate(Device, row, f"devices.yaml: {row['name']}: ") for row in rows}


def read_rates(path: Path) -> Device:
    """Of a machine, as tools/bench_rates.py wrote them. Raises `UserError`."""
    tree = read_yaml(path, f"--rates {path}", "python tools/bench_rates.py --out FILE writes one")
    if not isinstance(tree, dict):
        raise UserError(f"--rates {path}: must be a mapping; python tools/bench_rates.py --out FILE writes one")
    return validate(Device, tree, f"--rates {path}: ")
