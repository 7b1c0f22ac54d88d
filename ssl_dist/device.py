"""The device that computes: its float32 arithmetic, and copies between it and the host that nobody waits for."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round what goes into float32 convolutions and products to TensorFloat-32 (10 bits behind the
    point, not 23). Torch's own default does so for convolutions alone."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
