"""A pretended GPU: tensors that live on the CPU and say that they are on cuda:0. Real numbers, the code path of a GPU.

Python sees `.device == cuda:0`; C++ sees the CPU, so autograd and every kernel work without a driver. As on a GPU
  - an operation on tensors of both devices is refused, but for 0-dimensional CPU tensors, copies and CPU indices;
  - `.numpy()` of a tensor of the device is refused;
  - what makes the host wait for the device is counted, with the line of ssl_dist that asks for it. Copies from pinned
    memory with non_blocking do not; those from pageable memory do.
"""

import contextlib
import copy
import importlib.util
import os
import traceback
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from ssl_dist.kernels import relation_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PACKAGE = "/ssl_dist/"
_to_copy = torch.ops.aten._to_copy


@dataclass
class Notes:
    """waits: (kind, place) -> how often the host waited; kernels: name -> launches, "backward name" of the backward
    pass, "optimizer name" of the optimizer; wide: (name, place) -> float64 results of more than 8 elements; half:
    (function of a loss, place) -> calls with less than float32."""

    waits: Counter = field(default_factory=Counter)
    kernels: Counter = field(default_factory=Counter)
    wide: Counter = field(default_factory=Counter)
    half: Counter = field(default_factory=Counter)

    def wait(self, kind: str) -> None:
        self.waits[kind, place()] += 1

    def __add__(self, other: "Notes") -> "Notes":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Notes(*(ours + theirs for ours, theirs in pairs))

    def take(self) -> "Notes":
        """What was noted, which is forgotten here."""
        taken = copy.deepcopy(self)
        for counter in (self.waits, self.kernels, self.wide, self.half):
            counter.clear()
        return taken


NOTES = Notes()


def place() -> str:
    """The innermost line of ssl_dist on the stack as file:function, and torch's module where that is one of some."""
    stack = traceback.extract_stack()
    own = [frame for frame in stack if PACKAGE in frame.filename]
    frame = own[-1] if own else stack[-4]
    torchs = [f.filename.rsplit("/", 1)[-1] for f in stack if "torch/nn/modules/_functions" in f.filename]
    return f"{frame.filename.split(PACKAGE)[-1]}:{frame.name}{f' ({torchs[-1]})' if torchs else ''}"


class OnDevice(Tensor):
    """A tensor of the pretended device around a real one of the CPU."""

    _real: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "OnDevice":
        assert type(real) is Tensor, type(real)
        made = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device=real.device,
        )  # fmt: skip
        made._real = real
        return made

    @property
    def device(self):
        return CUDA

    @property
    def is_cuda(self):
        return True

    @property
    def is_cpu(self):
        return False

    def record_stream(self, stream):
        """Its memory is not given away before `stream` has come so far."""
        stream.users.append(self)

    def __repr__(self):
        return f"OnDevice({self._real})"

    def __deepcopy__(self, memo):
        made = OnDevice(self._real.clone())
        if getattr(self, "_is_param", False):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol):
        """As torch.load with map_location="cpu" gives a tensor of the device back."""
        return self._real.detach().__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})


def is_on(x) -> bool:
    return isinstance(x, OnDevice)


def real(x):
    return x._real if is_on(x) else x


# ---------------------------------------------------------------------------- kernels that the CPU lacks


def _dims(x):
    return [d for d in range(x.dim()) if d != 1]


def _channels(v, x):
    return v.view(1, -1, *[1] * (x.dim() - 2))


def _batch_norm_stats(x, eps):
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), _dims(x), correction=0)
    return mean, (var + eps).rsqrt()


def _batch_norm_gather_stats(x, mean_WC, rstd_WC, running_mean, running_var, momentum, eps, counts_W):
    n = counts_W[:, None]
    total, mean = n.sum(), (mean_WC * n).sum(0) / n.sum()
    var = ((rstd_WC**-2 - eps + (mean_WC - mean) ** 2) * n).sum(0) / total
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
    return mean, (var + eps).rsqrt()


def _batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    y = (x - _channels(mean, x)) * _channels(invstd, x)
    return (y if weight is None else y * _channels(weight, x) + _channels(bias, x)).to(x.dtype)


def _batch_norm_backward_reduce(grad, x, mean, invstd, weight, of_input, of_weight, of_bias):
    grad = grad.to(mean.dtype)
    total, product = grad.sum(_dims(x)), (grad * (x - _channels(mean, x))).sum(_dims(x))
    return total, product, product * invstd, total


def _batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, product, counts):
    count, scale = counts.sum(), invstd if weight is None else invstd * weight
    shift = _channels(total / count, x) + (x - _channels(mean, x)) * _channels(invstd**2 * product / count, x)
    return ((grad - shift) * _channels(scale, x)).to(x.dtype)


CUDA_ONLY = {
    "batch_norm_stats": _batch_norm_stats,
    "batch_norm_gather_stats_with_counts": _batch_norm_gather_stats,
    "batch_norm_elemt": _batch_norm_elemt,
    "batch_norm_backward_reduce": _batch_norm_backward_reduce,
    "batch_norm_backward_elemt": _batch_norm_backward_elemt,
}

# ---------------------------------------------------------------------------- the device

_WAITS = {
    "_local_scalar_dense": "item", "equal": "torch.equal", "nonzero": "nonzero", "_unique2": "unique",
    "unique_dim": "unique", "masked_select": "masked_select", "bincount": "bincount",
}  # fmt: skip
_INDEXED = ("index", "index_put", "index_put_", "_unsafe_index")
_NO_KERNEL = (
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "_reshape_alias", "alias",
    "_local_scalar_dense", "is_same_size",
)  # fmt: skip


def _in_backward() -> bool:
    """Formulas of gradients make tensors by the options that C++ sees."""
    return torch._C._current_autograd_node() is not None


def _dispatch(function, args, kwargs):
    name = function._overloadpacket.__name__
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    device = kwargs.get("device")
    wanted = None if device is None or _in_backward() else torch.device(device).type
    there = any(map(is_on, leaves))
    if there:
        _check(function, name, args, kwargs, leaves)
    if there or wanted == "cuda":
        _count(function, name)
    to_device = there
    if name == "_to_copy":
        to_device = wanted == "cuda" if wanted else is_on(args[0])
        if is_on(args[0]) != to_device:
            _note_copy(to_device, args[0], kwargs.get("non_blocking", False))
    elif name == "copy_":
        to_device = is_on(args[0])
        if is_on(args[0]) != is_on(args[1]):
            _note_copy(to_device, args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    elif wanted:
        to_device = wanted == "cuda"
    if device is not None:
        kwargs = kwargs | {"device": CPU}
    pinned = kwargs.pop("pin_memory", None)
    real_args, real_kwargs = tree_map(real, (args, kwargs))
    out = CUDA_ONLY.get(name, function)(*real_args, **real_kwargs)
    if pinned:
        out._is_pinned = True
    if name == "_to_copy" and out is real_args[0]:
        out = out.clone()
    if not to_device:
        return out
    out = tree_map(lambda x: OnDevice(x) if type(x) is Tensor else x, out)
    for x in filter(is_on, tree_leaves(out)):
        if x.dtype == torch.float64 and x.numel() > 8:
            NOTES.wide[name, place()] += 1
    if there and (function._schema.is_mutable or any(r.alias_info for r in function._schema.returns)):
        return return_and_correct_aliasing(function, args, kwargs, out) if is_on(args[0]) else out
    return out


def _collective(function, name, args, kwargs):
    """A fake group moves nothing: the other ranks bring to a gather what this one brings, and to a sum zeros."""
    NOTES.kernels[("backward " if _in_backward() else "") + f"c10d.{name}"] += 1
    args, kwargs = tree_map(real, (args, kwargs))
    if name == "_allgather_base_":
        args = (args[0].view(-1), args[1].reshape(-1), *args[2:])
    out = function(*args, **kwargs)
    if name == "_allgather_base_" and dist.get_backend() == "fake":
        args[0].view(-1, args[1].numel()).copy_(args[1])
    return out


def _check(function, name, args, kwargs, leaves):
    """Waits of an operation on the device; RuntimeError where CUDA would refuse it."""
    if name in _WAITS:
        NOTES.wait(_WAITS[name])
    if name == "repeat_interleave" and is_on(args[0]) and kwargs.get("output_size") is None:
        NOTES.wait("repeat_interleave")
    if name in _INDEXED:
        if not is_on(args[0]) and not _in_backward():
            raise RuntimeError(f"{function}: a CPU tensor is indexed by one of cuda:0, at {place()}")
        for index in args[1] or []:
            if index is not None and index.dtype in (torch.bool, torch.uint8) and is_on(index):
                NOTES.wait("boolean mask")
            if index is not None and not is_on(index):
                NOTES.wait("CPU index")
    elif name not in ("_to_copy", "copy_", "copy"):
        mixed = [tuple(x.shape) for x in leaves if not is_on(x) and x.dim() > 0]
        if mixed and not _in_backward():
            raise RuntimeError(f"{function}: tensors of cuda:0 and of the CPU, {mixed}, at {place()}")


def _count(function, name):
    is_view = any(r.alias_info for r in function._schema.returns) and not function._schema.is_mutable
    if name not in _NO_KERNEL and not is_view:
        by_optimizer = any("torch/optim" in f.filename or f.filename.endswith("/optim.py")
                           for f in traceback.extract_stack(limit=12))  # fmt: skip
        NOTES.kernels[("optimizer " if by_optimizer else "backward " if _in_backward() else "") + name] += 1


def _note_copy(to_device, source, non_blocking):
    if to_device and non_blocking and getattr(source, "_is_pinned", False):
        return
    if not to_device and non_blocking:
        return  # who reads it must wait for an event; torch.cuda.Event notes that
    NOTES.wait("copy to the device" if to_device else "copy to the host")


class _Factories(TorchDispatchMode):
    """Tensors that are made on the device, and copies to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        if function.namespace == "c10d":
            return _collective(function, function._overloadpacket.__name__, args, kwargs)
        if any(map(is_on, leaves)) or (device is not None and torch.device(device).type == "cuda"):
            return _dispatch(function, args, kwargs)
        pinned = kwargs.pop("pin_memory", None) if "pin_memory" in kwargs else None
        out = function(*args, **kwargs)
        if pinned:
            out._is_pinned = True
        if not leaves and _in_backward():
            return tree_map(lambda x: OnDevice(x) if type(x) is Tensor else x, out)
        return out


LOSSES = {
    F.cross_entropy, F.nll_loss, F.mse_loss, F.kl_div, F.softplus, F.logsigmoid, F.log_softmax, F.softmax, F.normalize,
    torch.logsumexp, Tensor.logsumexp, torch.log_softmax, torch.exp, Tensor.exp, torch.log, Tensor.log,
}  # fmt: skip


class _Functions(TorchFunctionMode):
    """What Python decides by the device that C++ reports: moves, numpy, tensors made of numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None
        if function is Tensor.cuda:
            return x.to(CUDA)
        if function in LOSSES and isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16):
            NOTES.half[function.__name__, place()] += 1
        if is_on(x):
            if function in (Tensor.numpy, Tensor.__array__) and not kwargs.get("force"):
                raise TypeError(f"cannot convert a tensor of cuda:0 to numpy, at {place()}")
            if function in (Tensor.cpu, Tensor.numpy):
                host = _to_copy(x, device=CPU)
                return host if function is Tensor.cpu else host.detach().numpy()
            if function is Tensor.tolist:
                NOTES.wait("tolist")
                return x._real.tolist()
            if function is Tensor.to:
                return _moved(x, args[1:], kwargs)
        if function is Tensor.to and len(args) > 1 and is_on(args[1]):
            return x.to(CUDA, args[1].dtype)
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return _made(function, args, dict(kwargs))
        return function(*args, **kwargs)


def _empty_pinned(empty):
    def made(*sizes, pin_memory=False, **options):
        x = empty(*sizes, **options)
        return _pinned(x) if pin_memory else x

    return made


def _pinned(x):
    out = x.clone(memory_format=torch.preserve_format)
    out._is_pinned = True
    return out


def _moved(x, rest, kwargs):
    if rest and isinstance(rest[0], Tensor):
        device, dtype, non_blocking, form = (CUDA if is_on(rest[0]) else CPU), rest[0].dtype, False, None
    else:
        kwargs = {key: value for key, value in kwargs.items() if key != "copy"}
        device, dtype, non_blocking, form = torch._C._nn._parse_to(*rest, **kwargs)
    if device is not None and device.type == "cpu":
        return _to_copy(x, device=device, dtype=dtype, non_blocking=non_blocking, memory_format=form)
    return x.to(dtype or x.dtype, **({} if form is None else {"memory_format": form}))


def _made(function, args, kwargs):
    device = kwargs.pop("device", None)
    if function is Tensor.new_tensor:
        device = args[0].device if device is None else device
        kwargs.setdefault("dtype", args[0].dtype)
        args, function = args[1:], torch.tensor
    elif is_on(args[0]):
        return args[0].to(kwargs.get("dtype") or args[0].dtype)
    made = function(*args, **kwargs)
    return made if device is None or torch.device(device).type == "cpu" else made.to(CUDA)


class _Event:
    """torch.cuda.Event: to wait for one is a wait."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        pass

    def wait(self, *_):
        pass

    def query(self):
        return True

    def synchronize(self):
        NOTES.wait("event")


class _Stream(contextlib.nullcontext):
    """torch.cuda.Stream: computes at once. users: the tensors whose memory it keeps; waited_for: other streams, and how
    many kernels had been launched by then."""

    def __init__(self, *_, **__):
        super().__init__()
        self.users, self.waited_for = [], []

    def wait_stream(self, other):
        self.waited_for.append((other, NOTES.kernels.total()))

    def wait_event(self, _):
        pass

    record_event = wait_event

    def synchronize(self):
        NOTES.wait("stream")


def _apply_with(memo):
    """nn.Module._apply, which else keeps the type of a parameter and sets only its data."""

    def apply(self, function, recurse=True):
        for child in self.children():
            child._apply(function)
        for kind in (self._parameters, self._buffers):
            for key, old in kind.items():
                if old is None:
                    continue
                with torch.no_grad():
                    new = function(old)
                if new is old:
                    continue
                at = id(old), new.dtype, is_on(new)
                if at not in memo:
                    new = torch.nn.Parameter(new, old.requires_grad) if kind is self._parameters else new
                    memo[at] = new, old
                kind[key] = memo[at][0]
        return self

    return apply


def _interpret_triton(patch):
    """Kernels of Triton get the real tensors, if they are run by its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        patch.setattr(relation_cuda, "obstacle", lambda: "Triton is not interpreted, see TRITON_INTERPRET")
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_on_real(self, *args, **kwargs):
        NOTES.kernels[f"triton {self.fn.__name__}"] += 1
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return launch(self, *map(real, args), **kwargs)

    patch.setattr(GridExecutor, "__call__", launch_on_real)


@contextlib.contextmanager
def pretended(monkeypatch, count: int = 8):
    """A context with `count` pretended GPUs, and its notes."""
    computing = _Stream()
    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "a pretended GPU",
        "set_device": lambda device: None,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_: NOTES.wait("synchronize"),
        "Event": _Event,
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda *_: computing,
    }
    NOTES.take()
    autocast = torch.autocast  # C++ sees tensors of the CPU, so that is what is cast
    _device_constructors()  # torch keeps the functions that it finds at its first call
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda device, *arguments, **options: autocast("cpu", *arguments, **options))
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
        patch.setattr(torch.nn.Module, "_apply", _apply_with({}))
        patch.setattr(torch, "empty", _empty_pinned(torch.empty))
        patch.setattr(Tensor, "pin_memory", lambda self, *_: _pinned(self))  # the loader's threads have no modes
        patch.setattr(Tensor, "is_pinned", lambda self, *_: getattr(self, "_is_pinned", False))
        _interpret_triton(patch)
        with _Factories(), _Functions():
            yield NOTES
