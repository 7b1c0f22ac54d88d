"""The device that computes: its float32 arithmetic, and copies between it and the host that nobody waits for."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_dist.errors import UserError, one_line

CPU = torch.device("cpu")


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round what goes into float32 convolutions and products to TensorFloat-32 (10 bits behind the
    point, not 23). Torch's own default does so for convolutions alone."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def chosen(name: str | int | torch.device) -> torch.device:
    """The device of this name, as in cuda:0. Raises `UserError` where it is none, or is not in this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:  # the last of a torch that is built without CUDA
        raise UserError(f"device = {name!r}: {one_line(str(error), 160)}; cpu is always there") from None
    return device


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Uploads:
    """Copies of pinned tensors to a device. Those to a GPU run beside what it computes, on a stream of their own; what
    the caller queues from then on waits for them."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._stream is None:
            return [tensor.to(self._device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(computing)  # its memory is given away when `computing` has used it, not before
        return copies


class HostCopy:
    """Copies of tensors for the host, on their way until `wait` returns them. All are of one device."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = {name: tensor.detach().to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._done = torch.cuda.Event(blocking=True)  # leaves the core to the threads that make views
            self._done.record()

    def wait(self) -> dict[str, Tensor]:
        if self._done is not None:
            self._done.synchronize()
        return self._tensors
