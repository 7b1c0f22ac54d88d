"""What a training step computes, moves and sends: its operations on one rank, counted without running them.

Forward, backward and optimizer run on torch's meta device, where tensors have a size but no numbers. Of every operation
the floating-point operations are noted (torch's own formulas, for convolutions and products alone) and the bytes of the
tensors that it reads and writes. What the ranks would exchange is noted, not sent.

Left out is what does not happen in every step: labels and clusters that a method makes for itself, logs, checkpoints.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ssl_dist.config import Config
from ssl_dist.data.normalize import normalized
from ssl_dist.distributed.world import World
from ssl_dist.kernels import counting
from ssl_dist.kernels.batchnorm_relu import CountedSweeps
from ssl_dist.methods.base import Batch, SSLMethod
from ssl_dist.nn import batchnorm
from ssl_dist.nn.shapes import without_values
from ssl_dist.run.blueprint import RunPlan
from ssl_dist.train import optim
from ssl_dist.train.online_probe import OnlineProbe

META, CPU = torch.device("meta"), torch.device("cpu")
BUCKET_BYTES = 25 * 2**20  # of gradients, which DDP averages together


@dataclass(frozen=True)
class Operation:
    """One call of an operator. flops: a multiplication and an addition are two; 0 for what is neither convolution nor
    product. num_bytes: read and written, as if nothing stayed in a cache. convolution: channels in (of a group) and
    out, side of the kernel and of the output map. in_float32: also where the config asks for half precision."""

    name: str
    flops: float
    num_bytes: float
    convolution: tuple[int, int, int, int] | None = None
    in_float32: bool = False


@dataclass(frozen=True)
class Collective:
    """all_reduce or all_gather among `size` ranks. num_bytes: of the result, which every rank has at the end."""

    name: str
    purpose: str
    num_bytes: int
    size: int
    overlapped: bool = False  # with the backward pass

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives, in a ring (Patarasuk & Yuan, 2009)."""
        return (2 if self.name == "all_reduce" else 1) * (self.size - 1) / self.size * self.num_bytes


@dataclass
class Step:
    """Of one rank. The operations from `backward` on are of the backward pass, from `update` on of the optimizer."""

    operations: list[Operation] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    backward: int = 0
    update: int = 0
    pixel_bytes: int = 0  # views as uint8, from the host to a GPU

    @property
    def flops(self) -> float:
        return sum(operation.flops for operation in self.operations)

    @property
    def num_bytes(self) -> float:
        return sum(operation.num_bytes for operation in self.operations)


def count(plan: RunPlan, device: str) -> Step:
    """The step of rank 0. device: cpu or cuda, which have kernels of their own for BatchNorm and pairs."""
    step = Step()
    if not plan.method_class.trainable:
        return step
    with without_values():
        method = plan.build()
    method.to(META).train()
    world = _Uncommunicative(plan, step)
    with_stand_ins(method, device, None if world.alone else world)
    optimizer = optim.build(plan.config.optim, method.parameter_groups(), CPU, method.backbone)
    probe = None if plan.config.log.probe_every_epochs is None else OnlineProbe(plan, world, method.info.feature_dim)
    host, batch_of = _batch(plan)
    step.pixel_bytes = sum(map(_bytes, host))
    with _Counter(step.operations), _MetaAutocast(), counting.counted_by(_kernels_into(step.operations)):
        batch = batch_of(host)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.config.precision in ("bf16", "fp16")):
            if probe is not None:  # after the update in truth; of a forward pass nothing else depends on its place
                with world.exchanging("the online probe"):
                    probe.learn(method.eval().encoder(), batch)
                method.train()
            loss = method(batch, world).loss
        step.backward = len(step.operations)
        loss.backward()
        step.update = len(step.operations)
        _update(plan.config, optimizer, step, device)
        method.after_step(plan.clock())
    if not world.alone:
        _average_gradients(method, step, world)
    return step


def count_network(network: nn.Module, images: Tensor) -> Step:
    """Forward and backward of a network on meta tensors, with torch's own BatchNorm and without an optimizer."""
    step = Step()
    with _Counter(step.operations):
        output = network(images)
        step.backward = len(step.operations)
        output.backward(torch.empty_like(output))
    step.update = len(step.operations)
    return step


def _batch(plan: RunPlan) -> tuple[list[Tensor], Callable[[list[Tensor]], Batch]]:
    """Pixels of this rank's views, and what makes a batch of them."""
    num_images = plan.config.optim.batch_size // plan.grid.images
    shapes = [
        (spec.num // plan.grid.views, num_images, plan.split.pixels.channels, spec.size, spec.size)
        for spec in plan.specs
    ]
    view_ids = [
        torch.from_numpy(spec.view_ids[: shape[0]].copy()) for spec, shape in zip(plan.specs, shapes, strict=True)
    ]
    ids, rows = torch.arange(num_images), torch.empty(num_images, dtype=torch.int64, device=META)
    normalize = normalized(plan.normalize, plan.dtype, META)
    pixel_dtype = torch.uint8 if plan.split.pixels.bits == 8 else torch.uint16
    pixels = [torch.empty(shape, dtype=pixel_dtype, device=META) for shape in shapes]
    return pixels, lambda host: Batch([normalize(group) for group in host], view_ids, ids, rows, rows)


def _update(config: Config, optimizer: torch.optim.Optimizer, step: Step, device: str) -> None:
    """The optimizer's second step: the first one makes its state."""
    optimizer.step()
    del step.operations[step.update :]
    optim.clip(optimizer, config.optim)
    if device == "cpu" or config.optim.name == "lars":
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, Tensor) and x.dim()]
    # torch's fused one: parameter, gradient and state are read, parameter and state written
    num_bytes = 3 * sum(map(_bytes, parameters)) + 2 * sum(map(_bytes, state))
    step.operations.append(Operation("fused_optimizer", 0, num_bytes))


def _average_gradients(method: SSLMethod[Any], step: Step, world: "_Uncommunicative") -> None:
    """DDP: the gradients, bucket after bucket as the backward pass makes them, copied there and back; and which of them
    were made."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    num_bytes, copies = sum(map(_bytes, parameters)), []
    for first in range(0, num_bytes, BUCKET_BYTES):
        bucket = min(num_bytes - first, BUCKET_BYTES)
        world.note("all_reduce", "gradients", bucket, overlapped=True)
        copies += [Operation("copy_", 0, 2 * bucket)] * 2
    step.operations[step.update : step.update] = copies
    step.update += len(copies)
    world.note("all_reduce", "flags", 4 * len(parameters))
    world.note("all_reduce", "flags", 8)  # World.any_rank


class _Uncommunicative(World):
    """A rank of a group that exists on paper. Its collectives return tensors of the right shape."""

    def __init__(self, plan: RunPlan, step: Step):
        super().__init__(plan.rank_info, plan.grid, META)
        self._step, self._purpose = step, "representations and loss"

    @contextlib.contextmanager
    def exchanging(self, purpose: str) -> Iterator[None]:
        """A context in which collectives have this purpose."""
        former, self._purpose = self._purpose, purpose
        yield
        self._purpose = former

    def note(self, name: str, purpose: str, num_bytes: int, size: int | None = None, overlapped: bool = False) -> None:
        size = size or self.grid.size
        self._step.collectives.append(Collective(name, purpose, num_bytes, size, overlapped))

    def _all_reduce_sum(self, x: Tensor, group: Any = None) -> Tensor:
        self.note("all_reduce", self._purpose, _bytes(x))
        return x.detach().clone()

    def _gather(self, x: Tensor, group: Any = None, size: int | None = None) -> Tensor:
        size = size or self.grid.size
        self.note("all_gather", self._purpose, size * _bytes(x), size)
        return x.new_empty((size, *x.shape))


def with_stand_ins(method: nn.Module, device: str, world: _Uncommunicative | None = None) -> None:
    """Put what computes without numbers in the place of every BatchNorm. world: hears of exchanges; None: nobody."""
    batchnorm.synchronize(method, lambda layer: _BatchNormStandIn(layer, device, world))


class _BatchNormStandIn(batchnorm.SyncBatchNorm):
    """Torch's BatchNorm in the place of both twins, whose kernels know no meta tensors. It notes what they exchange:
    the CPU's in float64, that of GPUs in float32 (nn/batchnorm.py, nn/batchnorm_cuda.py)."""

    def __init__(self, original: _BatchNorm, device: str, world: _Uncommunicative | None):
        super().__init__(original, lambda x: x, lambda x: x[None])
        channels, ranks = original.num_features, 1 if world is None else world.grid.size
        width = 8 if device == "cpu" else 4

        def note(name: str, num_bytes: int) -> None:
            if world is not None:
                world.note(name, "BatchNorm", num_bytes)

        self._note = note
        self._forward = "all_gather", width * (2 * channels + 1) * ranks
        self._backward = "all_reduce", width * 2 * channels
        self.relu_sweeps = CountedSweeps if device == "cpu" else None

    def _normalize(self, x: Tensor, normalize: Callable[..., Tensor] | None = None) -> Tensor:
        self._note(*self._forward)
        if torch.is_grad_enabled() and x.requires_grad:
            self._note(*self._backward)
        if normalize is not None:
            return normalize(self, x, self.weight, self.bias, *self.moments_like(x))
        mean, var, _ = batchnorm.statistics(self)
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum or 0.0, self.eps)


# ---------------------------------------------------------------------------------------------------- counting

_NOTHING_READ = {"zeros_like", "ones_like", "full_like"}
_NOTHING_DONE = {"empty", "empty_like", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
_ROWS_READ = {"index", "index_select", "gather", "embedding"}  # as many bytes as are written
_READ_TWICE = {"native_batch_norm", "native_batch_norm_backward"}  # for the moments, then for the map


class _Counter(TorchDispatchMode):
    """Appends every operation on meta tensors that is more than another view of its input."""

    def __init__(self, operations: list[Operation]):
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = function(*args, **(kwargs or {}))
        operation = operation_of(function, args, kwargs or {}, outputs)
        on_device = any(x.is_meta for x in tree_leaves(outputs) if isinstance(x, Tensor))  # others are the host's
        if operation is not None and on_device:
            self._operations.append(operation)
        return outputs


def operation_of(function: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> Operation | None:
    """What a call that a TorchDispatchMode sees has done; None for another view of its input."""
    name = function._schema.name.removeprefix("aten::")
    read, written = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), outputs))
    aliases = [returned.alias_info for returned in function._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    if is_view or name in _NOTHING_DONE or not written:
        return None
    flops, convolution = 0.0, None
    if function._overloadpacket in flop_registry:
        flops = float(flop_registry[function._overloadpacket](*args, **kwargs, out_val=outputs))
    if name in ("convolution", "convolution_backward"):
        weight, map_ = (args[1], outputs) if name == "convolution" else (args[2], args[0])
        convolution = (weight.shape[1], weight.shape[0], weight.shape[-1], map_.shape[-1])
    num_bytes = sum(map(_bytes, written))
    if name in _ROWS_READ:
        num_bytes *= 2
    elif name not in _NOTHING_READ:
        num_bytes += sum(_bytes(x) * (1 + (name in _READ_TWICE and x.dim() > 1)) for x in read)
    return Operation(name, flops, num_bytes, convolution, written[0].dtype == torch.float32)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _kernels_into(operations: list[Operation]) -> counting.Counter:
    return lambda name, flops, num_bytes: operations.append(Operation(name, flops, num_bytes, in_float32=True))


class _MetaAutocast(TorchFunctionMode):
    """Autocast for meta tensors, which torch has none for: where that of the CPU is on, convolutions and products get
    bfloat16, which stands for float16 too."""

    NAMES = frozenset(
        {"linear", "conv1d", "conv2d", "matmul", "mm", "bmm", "addmm", "__matmul__", "__rmatmul__"}
        | {"scaled_dot_product_attention", "multi_head_attention_forward"}  # the latter whole, as it is Python within
    )

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.NAMES and torch.is_autocast_enabled("cpu"):
            args, kwargs = [_half(x) for x in args], {key: _half(x) for key, x in kwargs.items()}
        return function(*args, **kwargs)


def _half(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, Tensor) and x.dtype == torch.float32 else x
