"""Compiles kernels for a GPU that is not there and prints what they need, one JSON line each.

Run by test_ahead_of_time.py in a process of its own, where triton is not interpreted:
    python tests/kernels/ahead_of_time.py sm_90 [name ...]
"""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import contrastive_triton as contrastive
from kernels import roi_align_triton as roi
from kernels.gpu import Launch

PYRAMID = dict(LEVELS=4, PH=7, PW=7, SAMPLES=2, ALIGNED=False)  # a detector's box head
REGIONS = dict(LEVELS=1, PH=1, PW=1, SAMPLES=0, ALIGNED=True)  # FG-CLIP's regions
DTYPES = ("bf16", "fp16", "fp32")


def flags(target):
    return dict(UPCAST=False, PRECISION="ieee" if target.startswith("gfx") else "tf32x3")


def gathering(dtype, pooling):
    """The types of a pooling's arguments in full, which every kernel takes a part of."""
    pointer, levels = f"*{dtype}", pooling["LEVELS"]
    kinds = (pointer, "fp32", "fp32", *["i32"] * 4, "fp32", "fp32")
    types = dict(maps=tuple((kind,) * levels for kind in kinds), rois="*fp32")
    types |= dict.fromkeys(("out", "grad"), pointer)
    return types | dict.fromkeys(("count_rois", "batch", "channels"), "i32")


def pool_forward(pooling, last, dtype, target):
    launch = roi.FORWARD_ONE_BIN if pooling["PW"] == 1 else roi.FORWARD
    blocks = dict(PW_PAD=triton.next_power_of_2(pooling["PW"]), CHANNELS_LAST=last, BLOCK_C=launch.channels)
    return roi.pool_forward, gathering(dtype, pooling), pooling | blocks, launch


def pool_backward(pooling, launch, dtype, target):
    table = roi.BACKWARD_ONE_BIN if pooling["PW"] == 1 else roi.BACKWARD
    launch = launch or (table["default"] if dtype == "fp32" else table.get(target, table["default"]))
    types = gathering(dtype, pooling)
    types["maps"] = tuple(types["maps"][part] for part in (0, 1, 2, 7, 8))
    blocks = dict(PW_PAD=triton.next_power_of_2(pooling["PW"]), BIN_ROWS=roi.bin_rows((pooling["PH"], pooling["PW"])))
    blocks |= dict(TILE=roi.TILE, SCAN=roi.SCAN, BLOCK_C=launch.channels)
    return roi.pool_backward, types, pooling | flags(target) | blocks, launch


def finish_rows(bare, dtype, target):
    """The kernel of the loss; bare: without any optional input, that is ids, valid count and gradients."""
    rows, optional, ids = f"*{dtype}", "constexpr" if bare else "*fp32", "constexpr" if bare else "*i64"
    types = dict(products=("*fp32",) * 2, inputs=("*fp32", "*i64", *[ids] * 4), weight=optional, row_grad_out=optional)
    types |= dict(coefficient="constexpr" if bare else rows, stats_out=("*fp32",) * 4 + ("*i64",))
    launch = Launch(channels=0, warps=contrastive.ROW_WARPS, stages=2)
    return contrastive.finish_rows, types | dict(keys="i32", bank_rows="i32"), dict(BLOCK=contrastive.ROW_BLOCK), launch


KERNELS = dict(finish_rows=partial(finish_rows, False), finish_rows_bare=partial(finish_rows, True))
for kind, pooling in dict(pyramid=PYRAMID, regions=REGIONS).items():
    KERNELS[f"pool_forward_{kind}"] = partial(pool_forward, pooling, True)
    KERNELS[f"pool_forward_nchw_{kind}"] = partial(pool_forward, pooling, False)
    KERNELS[f"pool_backward_{kind}"] = partial(pool_backward, pooling, None)
# Known to be bad: twice the channels a tile's accumulator has registers for.
spilling = partial(pool_backward, PYRAMID, Launch(channels=512, warps=4, stages=1))


def leaves(kind, path):
    """Path and type of every part of an argument; tuples nest."""
    if not isinstance(kind, tuple):
        return [(path, kind)]
    return [leaf for index, part in enumerate(kind) for leaf in leaves(part, (*path, index))]


def compile_for(target, kernel, types, constants, launch):
    """Pointers, strides and widths are multiples of 16, as at run time: else no load would be 16 bytes wide."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name.isupper() else types[name] for name in names}
    parts = [leaf for index, name in enumerate(names) for leaf in leaves(signature[name], (index,))]
    constexprs = {path: constants.get(names[path[0]]) for path, kind in parts if kind == "constexpr"}
    attrs = {}
    for path, kind in parts:
        if kind.startswith("*") or (kind == "i32" and (len(path) > 1 or names[path[0]] == "channels")):
            attrs[path] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source, target=gpu, options=dict(num_warps=launch.warps, num_stages=launch.stages))


def needs(compiled, target):
    """Registers, spilled bytes, shared memory and the instructions that matter."""
    metrics = dict(shared=compiled.metadata.shared)
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        spills = [int(count) for count in re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)]
        return metrics | dict(stack=max(spills), mma="mfma" if "v_mfma" in assembly else None)
    cubin = Path("kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([dump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    ptx = compiled.asm["ptx"]
    mma = next((kind for kind in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if kind in ptx), None)
    return metrics | dict(stack=int(stack), mma=mma, wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)))


def main(target, *names):
    for name in names or KERNELS:
        build = spilling if name == "spilling" else KERNELS[name]
        for dtype in DTYPES[:2] if name == "spilling" else DTYPES:
            metrics = needs(compile_for(target, *build(dtype, target)), target)
            print(json.dumps(dict(kernel=name, dtype=dtype, target=target) | metrics), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
