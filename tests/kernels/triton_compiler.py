"""Compiler of every kernel for CUDA devices that need not be present, as a program of its own.

    python triton_compiler.py 90     compute capability 9.0: prints a JSON line per kernel and form

Triton's interpreter accepts what the compiler does not (types, shapes of tiles), and knows
nothing of shared memory; this program runs without it.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sps2_mega.kernels.csa import triton as csa
from sps2_mega.kernels.csa.tile_shape import padded_width, tile_shape
from sps2_mega.kernels.csa.tiles import SEGMENT_COLUMNS, TILE_COLUMNS
from sps2_mega.kernels.lse import triton as lse
from sps2_mega.kernels.paged_decode import triton as paged_decode
from sps2_mega.kernels.paged_decode.tile_shape import tile_shape as decode_shape
from sps2_mega.kernels.paged_kv import triton as paged_kv
from sps2_mega.kernels.rotary_append import triton as rotary_append

SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def precision(dtype):
    return "ieee" if dtype == torch.float32 else "tf32"


def build(kernel, pointers, constants, *, arch, floats=(), num_warps=4, num_stages=3):
    """Compile with all strides and pointers aligned, as they are in a model."""
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
        else:
            signature[name] = "fp32" if name in floats else "i32"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in pointers or ("_stride_" in name and name not in constants)
    }
    built = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages),
    )
    shown = {name: value for name, value in constants.items() if name in ("GROUP", "WIDTH")}
    print(json.dumps({"kernel": kernel.__name__, **shown, "shared": built.metadata.shared}))


def build_csa(dtype, width, group, arch):
    shape = tile_shape(width, dtype.itemsize)
    constants = dict(
        TILE_COLUMNS=TILE_COLUMNS,
        SEGMENT_COLUMNS=SEGMENT_COLUMNS,
        GROUP=group,
        WIDTH=width,
        PADDED_WIDTH=padded_width(width),
        ROWS=shape.rows,
        KEYS=shape.keys,
        PRECISION=precision(dtype),
    )
    pointers = dict.fromkeys("qkv", SHORT[dtype]) | {
        "out": SHORT[dtype],
        "lse": "fp32",
        "tiles": "i32",
        "segments": "i32",
    }
    build(
        csa._attend_kernel,
        pointers,
        constants,
        arch=arch,
        floats=["scale"],
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def build_decode(dtype, width, group, arch):
    shape = decode_shape(width, group, dtype)
    pointers = dict.fromkeys(["q", "k_cache", "v_cache"], SHORT[dtype]) | {
        "out": "fp32",
        "lse": "fp32",
        **dict.fromkeys(["block_table", "starts", "ends"], "i32"),
    }
    build(
        paged_decode._decode_kernel,
        pointers,
        dict(
            BLOCK_SIZE=16,
            table_stride_m=1,
            GROUP=group,
            PADDED_GROUP=shape.heads,
            WIDTH=width,
            PADDED_WIDTH=shape.width,
            TOKENS=shape.tokens,
            PRECISION=shape.precision,
        ),
        arch=arch,
        floats=["scale"],
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    merged = {"out_C": "fp32", "lse_C": "fp32", "lse": "fp32", "out": SHORT[dtype]}
    merged |= dict.fromkeys(["starts", "ends"], "i32")
    constants = dict(WIDTH=width, PADDED_WIDTH=padded_width(width), HEADS=8)
    build(paged_decode._merge_chunks_kernel, merged, constants, arch=arch)


def build_merges(dtype, width, arch):
    rows, padded = lse._tile(width)
    constants = dict(WIDTH=width, PADDED_WIDTH=padded, ROWS=rows)
    of_type, of_lse = SHORT[dtype], "fp32"
    many = {"out": of_type, "lse": of_lse, "merged": of_type, "merged_lse": of_lse}
    build(lse._merge_kernel, many, constants, arch=arch)
    two = {"out_a": of_type, "lse_a": of_lse, "out_b": of_type, "lse_b": of_lse}
    two |= {"merged": of_type, "merged_lse": of_lse}
    build(lse._merge_two_kernel, two, constants, arch=arch)


def build_append(dtype, width, arch):
    pointers = dict.fromkeys(["k_cache", "v_cache", "k", "v"], SHORT[dtype]) | {"slots": "i64"}
    constants = dict(BLOCK_SIZE=16, WIDTH=width, ELEMENTS=8 * width, TILE=1024, slots_stride=1)
    constants |= {f"{name}_stride_h": 1 for name in ("k_cache", "v_cache", "k", "v")}
    build(paged_kv._append_kernel, pointers, constants, arch=arch)


def build_rotary(dtype, width, pairs, interleaved, arch):
    inputs = ["q", "k", "v", "k_cache", "v_cache", "cos", "sin"]
    pointers = dict.fromkeys(inputs, SHORT[dtype]) | {"slots": "i64"}
    constants = dict(
        BLOCK_SIZE=16,
        NUM_HEADS=32,
        NUM_KV_HEADS=8,
        WIDTH=width,
        PADDED_WIDTH=padded_width(width),
        PAIRS=pairs,
        PADDED_PAIRS=triton.next_power_of_2(pairs),
        INTERLEAVED=interleaved,
        HEADS=rotary_append._TILE_ELEMENTS // padded_width(width),
        slots_stride=1,
    )
    constants |= {f"{name}_stride_h": 1 for name in ("q", "k", "v", "k_cache", "v_cache")}
    constants |= {f"{name}_stride_r": 1 for name in ("cos", "sin")}
    build(rotary_append._rotate_and_append_kernel, pointers, constants, arch=arch)


def main() -> None:
    arch = int(sys.argv[1])
    build_csa(torch.bfloat16, 128, 4, arch)
    build_csa(torch.float16, 80, 3, arch)
    build_csa(torch.float32, 64, 1, arch)
    build_decode(torch.bfloat16, 128, 4, arch)
    build_decode(torch.float32, 96, 1, arch)
    build_merges(torch.bfloat16, 128, arch)
    build_append(torch.bfloat16, 128, arch)
    build_rotary(torch.bfloat16, 128, 64, False, arch)
    build_rotary(torch.float32, 96, 16, True, arch)


if __name__ == "__main__":
    main()
