"""ONNX files: out of traced programs, and run."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from trainkit.errors import InputError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def need_packages() -> None:
    """Raises InputError where one of PACKAGES is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise InputError(f'ONNX files need {", ".join(missing)}: pip install "macl-fgclip[export]"')


def onnx_file(
    module: torch.nn.Module, inputs: Mapping[str, Tensor], shapes: Mapping[str, dict], outputs: Sequence[str], *,
    metadata: Mapping[str, object] | None = None, nodes: dict | None = None,
) -> bytes:  # fmt: skip
    """The file of a module. Its numbers are those of `inputs`; what is one or zero there must be so ever after.

    shapes: by input, axis -> torch.export.Dim. metadata: plain values, written as json.
    nodes: operator of torch -> its function in ONNX (onnxscript).
    """
    traced = torch.export.export(module, (), dict(inputs), dynamic_shapes=dict(shapes), strict=False)
    names = dict(input_names=list(inputs), output_names=list(outputs))
    written = torch.onnx.export(traced, opset_version=18, custom_translation_table=nodes, verbose=False, **names)
    graph, axes = written.model.graph, {}
    for value in graph.inputs:
        axes |= {str(value.shape[axis]): dim.__name__ for axis, dim in shapes[value.name].items()}
    for value in (*graph.inputs, *graph.outputs):
        value.shape = type(value.shape)(
            [side if isinstance(side, int) else axes.get(str(side)) for side in value.shape]
        )
    written.model.metadata_props.update({name: json.dumps(value) for name, value in (metadata or {}).items()})
    return written.model_proto.SerializeToString()


def onnx_function(content: bytes) -> Callable[..., list[Tensor]]:
    """A file as a function of its inputs by name, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda **inputs: [*map(torch.from_numpy, session.run(None, {k: v.numpy() for k, v in inputs.items()}))]
