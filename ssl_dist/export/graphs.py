"""A backbone as a graph of operations, which runs without its code: torch.export's program, and ONNX.

Input: normalised images [N, C, S, S], N free. Output: features [N, D].
"""

import io
import json
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from ssl_dist.errors import UserError, first_line
from ssl_dist.export.preprocessing import FILE, preprocessing
from ssl_dist.export.trained import Trained

MAX_BYTES = 2**31 - 2**20  # of the weights in one ONNX file, which protobuf keeps below 2 GiB with all the rest
_UNFIT = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError)  # what tracing ends with


class _Features(nn.Module):
    """A backbone whose features are rows, whatever it gives."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features.flatten(1)


def pt2(trained: Trained, out: str) -> tuple[bytes, str]:
    """A .pt2 file of `torch.export.save`, with the preprocessing as an extra file; and Python that loads it."""
    file = io.BytesIO()
    extra = {FILE: json.dumps(preprocessing(trained.encoder), indent=2), "facts.json": json.dumps(trained.facts)}
    torch.export.save(_program(trained, "pt2"), file, extra_files=extra)
    return file.getvalue(), f"model = torch.export.load({out!r}).module()"


def onnx(trained: Trained, out: str) -> tuple[bytes, str]:
    """An ONNX file with the preprocessing in its metadata; and Python that loads it in onnxruntime."""
    try:
        import onnxscript  # noqa: F401 # by which torch writes it
    except ImportError:
        raise UserError("--format onnx: onnxscript is not installed; pip install onnx onnxscript") from None
    if sum(tensor.nbytes for tensor in trained.tensors.values()) > MAX_BYTES:
        raise UserError(
            f"--format onnx: the weights of backbone {trained.backbone} take more than the 2 GiB of one ONNX file; "
            "use --format pt2"
        )
    program = _program(trained, "onnx")
    try:
        written = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["features"],
            dynamic_shapes=({0: "batch"},),
        )  # fmt: skip
    except _UNFIT as error:
        raise _refusal("onnx", trained.backbone, error, "; use --format pt2, which torch can make") from None
    assert written is not None, "dynamo gives a program"
    model: Any = written.model_proto
    for key, value in trained.facts.items():
        model.metadata_props.add(key=key, value=value)
    model.doc_string = "normalised images [batch, channels, size, size] to features; metadata: preprocessing (JSON)"
    return model.SerializeToString(), f"session = onnxruntime.InferenceSession({out!r})"


def _program(trained: Trained, form: str) -> torch.export.ExportedProgram:
    steps = preprocessing(trained.encoder)
    example = torch.zeros(2, trained.encoder.channels, steps["crop"], steps["crop"])
    batch = torch.export.Dim("batch", min=1)
    try:
        with redirect_stderr(io.StringIO()):  # where torch prints half a graph
            program = torch.export.export(_Features(trained.encoder.module), (example,), dynamic_shapes=({0: batch},))
    except _UNFIT as error:
        raise _refusal(form, trained.backbone, error) from None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of code, by their paths on this machine
    return program


def _refusal(form: str, backbone: str, error: BaseException, remedy: str = "") -> UserError:
    while error.__cause__ is not None:  # what torch says last is the same for all
        error = error.__cause__
    reason = first_line(error)
    if "Constraints violated" in reason:
        reason = "its code computes another thing for batches of another size"
    return UserError(f"--format {form}: torch cannot make a graph of backbone {backbone}: {reason}{remedy}")
