"""Compiles kernels for a GPU that is not there and prints what they need, one JSON line each.

Run by test_ahead_of_time.py in a process of its own, where triton is not interpreted:
    python tests/kernels/ahead_of_time.py sm_90 [name ...]
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import contrastive_triton as contrastive
from kernels import roi_align_triton as roi

PYRAMID = dict(LEVELS=4, PH=7, PW=7, SAMPLES=2, ALIGNED=False)  # a detector's box head
REGIONS = dict(LEVELS=1, PH=1, PW=1, SAMPLES=0, ALIGNED=True)  # FG-CLIP's regions
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def target_of(name):
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


def map_types(dtype, pooling):
    """The types of the levels' description, in the order in which every gathering kernel takes it."""
    names = "features heights widths strides_b strides_c strides_h strides_w scales thresholds".split()
    kinds = [f"*{dtype}", "fp32", "fp32", *["i32"] * 4, "fp32", "fp32"]
    return {name: (kind,) * pooling["LEVELS"] for name, kind in zip(names, kinds, strict=True)}


def pool_forward(pooling, last=True):
    def build(dtype, target):
        types = map_types(dtype, pooling) | dict(rois="*fp32", out=f"*{dtype}", batch="i32", channels="i32")
        launch = roi.FORWARD_ONE_BIN if pooling["PW"] == 1 else roi.FORWARD
        constants = pooling | dict(
            PW_PAD=triton.next_power_of_2(pooling["PW"]), CHANNELS_LAST=last, BLOCK_C=launch.channels
        )
        return roi.pool_forward, types, constants, launch

    return build


def pool_backward(pooling, launch=None):
    def build(dtype, target):
        table = roi.BACKWARD_ONE_BIN if pooling["PW"] == 1 else roi.BACKWARD
        chosen = launch or table.get(target, table["default"])
        maps = map_types(dtype, pooling)
        types = {name: maps[name] for name in ("heights", "widths", "scales", "thresholds")}
        types |= dict(gradients=maps["features"], rois="*fp32", grad=f"*{dtype}")
        types |= dict.fromkeys(("count_rois", "batch", "channels"), "i32")
        precision = "ieee" if target.startswith("gfx") else "tf32x3"
        rows = roi.bin_rows((pooling["PH"], pooling["PW"]))
        tile = dict(UPCAST=False, PRECISION=precision, TILE=roi.TILE, SCAN=roi.SCAN, BLOCK_C=chosen.channels)
        return (
            roi.pool_backward,
            types,
            pooling | dict(PW_PAD=triton.next_power_of_2(pooling["PW"]), BIN_ROWS=rows) | tile,
            chosen,
        )

    return build


def pool_project(pooling, last=True):
    def build(dtype, target):
        pointers = dict(rois="*fp32", weight=f"*{dtype}", bias=f"*{dtype}", out=f"*{dtype}")
        sizes = dict.fromkeys(("count_rois", "batch", "channels", "dim"), "i32")
        launch = roi.PROJECT.get(target, roi.PROJECT["default"])
        blocks = dict(BLOCK_R=launch.rows, BLOCK_D=launch.columns, BLOCK_C=launch.channels)
        precision = "ieee" if target.startswith("gfx") else "tf32x3"
        flags = dict(CHANNELS_LAST=last, UPCAST=False, PRECISION=precision)
        return roi.pool_project, map_types(dtype, pooling) | pointers | sizes, pooling | flags | blocks, launch

    return build


def loss_types(kernel, dtype):
    """Types by the name of the argument: rows in `dtype`, indices and ids in int64, metrics in float32."""
    known = dict.fromkeys(("query", "key", "bank", "coefficient"), f"*{dtype}")
    known |= dict.fromkeys(("target", "bank_valid", "query_ids", "key_ids", "bank_ids"), "*i64")
    sizes = ("rows", "keys", "bank_rows", "dim", "key_splits", "blocks_per_split", "splits", "columns")
    known |= dict.fromkeys(sizes, "i32") | dict.fromkeys(("count_in", "count_out"), "*i32")
    known |= dict(stats_out=("*fp32",) * 4 + ("*i64",))
    return {name: known.get(name, "*fp32") for name in kernel.arg_names if not name.isupper()}


def streamed(kernel, dim):
    def build(dtype, target):
        launch = contrastive.STREAM.get(target, contrastive.STREAM["default"])[dim]
        precision = "ieee" if target.startswith("gfx") else "tf32x3"
        constants = dict(UPCAST=False, PRECISION=precision, BLOCK_N=launch.rows, BLOCK_M=launch.columns, BLOCK_D=dim)
        return kernel, loss_types(kernel, dtype), constants, launch

    return build


def combine(dtype, target):
    launch = contrastive.Launch(rows=1, warps=4, stages=2)
    return contrastive.combine, loss_types(contrastive.combine, dtype), dict(BLOCK_D=512), launch


def finish_rows(dtype, target):
    launch = contrastive.Launch(rows=1, warps=contrastive.ROW_WARPS, stages=2)
    types = loss_types(contrastive.finish_rows, dtype)
    return contrastive.finish_rows, types, dict(BLOCK=contrastive.ROW_BLOCK), launch


def bare(build):
    """Without any optional input: no ids, no valid count, no gradient."""

    def without(dtype, target):
        kernel, types, constants, launch = build(dtype, target)
        optional = "bank_valid query_ids key_ids bank_ids weight mean_in mean_out coefficient row_grad_out".split()
        constants |= {name: None for name in optional if name in types}
        return kernel, types, constants, launch

    return without


# Known to be bad: twice the channels a tile's accumulator has registers for.
spilling = pool_backward(PYRAMID, roi.Launch(channels=512, warps=4, stages=1))

KERNELS = {}
for kind, pooling in dict(pyramid=PYRAMID, regions=REGIONS).items():
    KERNELS[f"pool_forward_{kind}"] = pool_forward(pooling)
    KERNELS[f"pool_forward_nchw_{kind}"] = pool_forward(pooling, last=False)
    KERNELS[f"pool_backward_{kind}"] = pool_backward(pooling)
KERNELS["pool_project"], KERNELS["pool_project_nchw"] = pool_project(REGIONS), pool_project(REGIONS, last=False)
for width in contrastive.STREAM["default"]:
    KERNELS[f"stream_{width}"] = streamed(contrastive.stream, width)
    KERNELS[f"key_gradient_{width}"] = streamed(contrastive.key_gradient, width)
KERNELS |= dict(
    combine=combine, finish_rows=finish_rows, combine_bare=bare(combine), finish_rows_bare=bare(finish_rows)
)
KERNELS["stream_128_bare"] = bare(streamed(contrastive.stream, 128))


def divisible_by_16(kernel, types):
    """Pointers and strides are multiples of 16, as they are at run time: without that, loads are not 16 bytes wide."""
    paths = []
    for index, name in enumerate(kernel.arg_names):
        kind = types.get(name)
        wide = name.startswith("strides") or name in ("channels", "dim")
        if isinstance(kind, tuple):
            paths += [(index, part) for part, one in enumerate(kind) if wide or one.startswith("*")]
        elif kind is not None and (wide or kind.startswith("*")):
            paths.append((index,))
    return {path: [["tt.divisibility", 16]] for path in paths}


def compile_for(target, kernel, types, constants, launch):
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=divisible_by_16(kernel, types))
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    return triton.compile(source, target=target_of(target), options=options)


def needs(compiled, target):
    """Registers, spilled bytes, shared memory and the instructions that matter."""
    found = dict(shared=compiled.metadata.shared)
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        spills = [int(count) for count in re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)]
        return found | dict(stack=max(spills), mma="mfma" if "v_mfma" in assembly else None)
    cubin = Path("kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([dump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    kinds = ["tcgen05.mma", "wgmma.mma_async", "mma.sync"]
    ptx = compiled.asm["ptx"]
    return found | dict(
        registers=int(numbers["REG"]),
        stack=int(numbers["STACK"]),
        mma=next((kind for kind in kinds if kind in ptx), None),
        wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
    )


def main(target, *names):
    for name in names or KERNELS:
        build = spilling if name == "spilling" else KERNELS[name]
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
        if name.startswith(("stream", "key_gradient")):
            dtypes.remove(torch.float32)  # goes to the chunked engine
        for dtype in dtypes[:1] if name == "spilling" else dtypes:
            built = build(NAMES[dtype], target)
            figures = needs(compile_for(target, *built), target)
            print(json.dumps(dict(kernel=name, dtype=NAMES[dtype], target=target) | figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
