"""Times of the kernels' block sizes on a GPU, best first, to be written into their tables (kernels.py --tune)."""

import itertools

import torch
from triton.runtime.errors import TritonError

from benchmarks.kernel_cases import box_head, contrast_inputs, regions
from kernels import contrastive_triton, roi_align_triton
from kernels.contrastive_cpu import Problem
from kernels.roi_align import Pooling

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def tune(measure, device, words, *, size=(512, 640), rois=1024, channels=256, bank_rows=65536, dtype=torch.bfloat16):
    """measure: function -> seconds; words: one of them is in the title of what is tuned.

    A launch that does not fit the GPU is said to fail. Raises ValueError where no title has one of the words.
    """
    tables = dict([
        *pooling_launches(device, dtype, size, rois, channels),
        *projection_launches(device, dtype, rois),
        *loss_engines(device, dtype, bank_rows),
    ])  # fmt: skip
    chosen = {title: functions for title, functions in tables.items() if any(word in title for word in words)}
    if not chosen:
        raise ValueError(f"no table's title contains {words!r}: there are {'; '.join(tables)}")
    for title, functions in chosen.items():
        print(f"\n{title}")
        for seconds, name in sorted(timed(measure, functions)):
            print(f"{seconds * 1e6:10.1f} us  {name}")


def timed(measure, functions):
    """(seconds, name) of each function on its own; infinite where it fails."""
    for name, function in functions.items():
        try:
            yield measure(function), name
        except (RuntimeError, TritonError) as error:  # out of shared memory or registers
            yield float("inf"), f"{name}: {str(error).splitlines()[0]}"


def pooling_launches(device, dtype, size, rois, channels):
    """FORWARD and BACKWARD of roi_align_triton, for a detector's pyramid and for regions of one bin."""
    pyramid, boxes = box_head(device, dtype, 2, rois, True, size, channels)
    feature, corners = regions(device, dtype, 64, 24, 4 * channels, rois)
    pyramid, feature = [part.detach() for part in pyramid], feature.detach()
    problems = {
        "pyramid": ((pyramid, boxes, Pooling(SCALES, (7, 7), 2, False)), (4, 8)),
        "one bin": (([feature], corners, Pooling([1.0], (1, 1), -1, True)), (1, 2, 4)),
    }
    for kind, (problem, warps) in problems.items():
        launches = [
            roi_align_triton.Launch(rows=0, columns=0, channels=block, warps=count, stages=stages)
            for block, count, stages in itertools.product((32, 64, 128, 256), warps, (1, 2))
        ]
        for name, function in (("FORWARD", pool_forward(*problem)), ("BACKWARD", pool_backward(*problem))):
            named = {str(launch): lambda launch=launch, function=function: function(launch) for launch in launches}
            yield f"{name}, {kind}", named


def pool_forward(features, boxes, pooling):
    """launch -> the pooled bins with it."""

    def with_launch(launch):
        roi_align_triton.FORWARD = roi_align_triton.FORWARD_ONE_BIN = launch
        return roi_align_triton.gather(features, boxes, pooling)

    return with_launch


def pool_backward(features, boxes, pooling):
    """launch -> the gradients of the features with it."""
    shapes, upstream = [tuple(part.shape) for part in features], roi_align_triton.gather(features, boxes, pooling)

    def with_launch(launch):
        roi_align_triton.BACKWARD = roi_align_triton.BACKWARD_ONE_BIN = {"default": launch}
        return roi_align_triton.scatter(upstream, boxes, shapes, pooling)

    return with_launch


def projection_launches(device, dtype, rois):
    """PROJECT, beside gather and product apart: what `roi_align._in_one_launch` is to be set by."""
    feature, boxes = regions(device, dtype, 8, 24, 256, rois)
    feature, pooling = feature.detach(), Pooling([1.0], (1, 1), 2, True)
    for outputs in (64, 256, 1024):
        weight = torch.randn(outputs, 256, device=device).to(dtype)

        def apart(weight=weight):
            return roi_align_triton.gather([feature], boxes, pooling).flatten(1) @ weight.T

        def together(launch, weight=weight):
            roi_align_triton.PROJECT = {"default": launch}
            return roi_align_triton.project([feature], boxes, weight, None, pooling)

        functions = {"gather, then product": apart}
        for rows, columns, block, warps in itertools.product((16, 32, 64), (32, 64, 128), (32, 64), (4, 8)):
            launch = roi_align_triton.Launch(rows=rows, columns=columns, channels=block, warps=warps, stages=2)
            functions[str(launch)] = lambda launch=launch, together=together: together(launch)
        yield f"PROJECT, one bin, {outputs} outputs", functions


def loss_engines(device, dtype, bank_rows):
    """STREAM by width and, beside the chunked engine, by number of queries: what STREAM_ROWS is to be set by."""
    for dim, queries in itertools.product((64, 128, 256, 512), (16, 64, 128, 256)):
        query, key, scale, bank = (part.detach() for part in contrast_inputs(device, dtype, queries, bank_rows, dim))
        problem = Problem(query, key, scale, torch.arange(queries, device=device), bank, None, None, None, None)
        weight = torch.full((queries,), 1 / queries, device=device)

        def chunked(problem=problem, weight=weight):
            return contrastive_triton.contrast(problem, weight, "chunked")

        def streamed(launch, problem=problem, weight=weight, dim=dim):
            contrastive_triton.STREAM = {"default": {dim: launch}}
            return contrastive_triton.contrast(problem, weight, "stream")

        functions = {"chunked": chunked}
        for rows, columns, warps, stages in itertools.product((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3)):
            launch = contrastive_triton.Launch(rows=rows, columns=columns, warps=warps, stages=stages)
            functions[str(launch)] = lambda launch=launch, streamed=streamed: streamed(launch)
        yield f"STREAM, width {dim}, {queries} queries", functions
