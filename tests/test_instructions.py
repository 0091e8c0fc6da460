"""What is counted of a chain's kernels, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from moeexp_kernels.bench.instructions import Counts, count, launches
from moeexp_kernels.bench.shapes import FULL
from moeexp_kernels.ops import linear, moe_routed
from moeexp_kernels.parts import pdl, tuning

ASSEMBLY = """
        .section .text.a_kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/              @!P0 LDG.E.128.STRONG.GPU R4, desc[UR6][R2.64] ;
        /*0030*/                   ACQBULK ;
        /*0040*/             @!UP0 UMOV UR4, 0x1 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   STG.E desc[UR6][R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_0:
        /*0080*/                   BRA `(.L_x_0);
        /*0090*/                   NOP;
"""
USAGE = " Function a_kernel:\n  REG:24 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536\n"


def test_instructions_stand_before_the_wait_or_behind_it():
    assert count(ASSEMBLY, USAGE) == Counts(before=3, behind=5, barriers=1, registers=24)
    assert count(ASSEMBLY.replace("ACQBULK", "NOP"), USAGE).before == 0


@pytest.mark.parametrize(("assembly", "usage"), [("", USAGE), (ASSEMBLY, ""), ("no such file", USAGE)])
def test_what_is_no_kernel_is_an_error(assembly, usage):
    with pytest.raises(ValueError, match="no instructions"):
        count(assembly, usage)


def test_a_chain_launches_its_kernels_once_each_and_all_is_as_before():
    kept = tuning.architecture, pdl.architecture, linear.wrap_triton, moe_routed.wrap_triton
    found = launches(FULL, sequences=2, arch="sm_90")
    assert (tuning.architecture, pdl.architecture, linear.wrap_triton, moe_routed.wrap_triton) == kept
    names = [launch.name for launch in found]
    assert names == [
        "gemv_kernel", "_decode_kernel", "gated_gemv_kernel", "logits_packed_kernel", "gate_up_routed_kernel",
        "down_routed_kernel", "gemv_kernel", "_qk_norm_rope_kernel", "_attend_splits_kernel", "_merge_kernel", "gemv_kernel",
    ]  # fmt: skip
    assert all(launch.arguments["PDL"] for launch in found), "as on a GPU that knows the instruction"
    rows = tuning.lookup("moe_down_packed", "int4/2048x512/2", "sm_90")
    assert found[5].grid == (FULL.hidden // rows["BLOCK_D"], 2)


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moeexp_kernels.bench", "instructions", "--tokens", "1,2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "_kernel " in line]
    for wanted in ("gemv_kernel", "_decode_kernel", "gate_up_routed_kernel", "down_routed_kernel", "_attend_splits_kernel"):
        assert sum(name == wanted for name, *_ in rows) >= 2, wanted
    # A warp loads what it multiplies, by whichever Triton (`parts/spread.py`): otherwise there are dozens of barriers.
    barriers_allowed = {"gate_up_routed_kernel": 8, "down_routed_kernel": 12, "logits_packed_kernel": 15, "gated_gemv_kernel": 8}
    for name, programs, warps, before, behind, barriers, registers, shared in rows:
        assert int(programs) > 0 and int(warps) in (1, 2, 4, 8, 16), name
        assert int(before) > 0 and int(behind) > int(barriers) >= 0, name
        assert 16 <= int(registers) <= 255 and 0 <= int(shared) < 227 * 1024, name
        if name in barriers_allowed:
            assert int(barriers) <= barriers_allowed[name] and int(registers) <= 168, (name, barriers, registers)
    # `down` of one token chooses, that of two is told: half as much before its wait.
    chooses, told = (int(before) for name, _, _, before, *_ in rows if name == "down_routed_kernel")
    assert told < chooses


PLACES = """
import math, re, triton
from triton.backends.compiler import GPUTarget
from moeexp_kernels.bench.instructions import launches, source_of
from moeexp_kernels.bench.shapes import FULL
from moeexp_kernels.parts import tuning

for warps in (2, 4, 8):
    row = {"BLOCK_D": 8, "CACHE": ".cg", "num_warps": warps}
    with tuning.override("moe_down_packed", "int4", row):
        (down,) = (found for found in launches(FULL, sequences=2, arch="sm_90") if found.name == "down_routed_kernel")
    source, options = source_of(down)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    asked = re.findall(r"isVolatile = true.* : tensor<([0-9x]+)x!tt.ptr<i32>, (#[a-z0-9]+)>", made)
    assert len(asked) == 2, "once, and again"
    for shape, layout in asked:
        (each,) = re.findall(rf"^{layout} = .*sizePerThread = \\[([0-9, ]+)\\]", made, re.M)
        assert math.prod(map(int, shape.split("x"))) == 32 * warps and set(each) <= set("1, "), (warps, shape, layout)
"""


@pytest.mark.slow
def test_each_thread_of_down_looks_at_a_place_of_its_own():
    """So that whether all experts are known is one answer for all warps, which go round a loop with barriers together: by
    whichever Triton. Where several warps held the same places, each might see another answer."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PLACES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
