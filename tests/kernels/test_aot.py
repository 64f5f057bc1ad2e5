"""Kernels compiled for GPUs that are not here: registers, spills, instructions per logit, and the model above them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from grpoforge_kernels import aot, aot_cases
from grpoforge_kernels.aot_code import Counts, parse_amdgcn, parse_sass
from grpoforge_kernels.aot_model import TARGETS, occupancy, roofline
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.triton import configs

SASS = """
	.headerflags	@"EF_CUDA_SM90"
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, UR4, PT ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   MUFU.EX2 R5, R4 ;
        /*0050*/                   MUFU.EX2 R6, R4 ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/              @!P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_1:
        /*0090*/                   STL [R1], R5 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP ;
"""

AMDGCN = """
kernel:
; %bb.0:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	v_mov_b32_e32 v1, 0
.LBB0_1:
	global_load_dwordx4 v[2:5], v1, s[0:1]
	v_exp_f32_e32 v2, v2
	v_add_f32_e32 v3, v2, v3
	global_store_dwordx4 v1, v[2:5], s[0:1]
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	s_endpgm
.Lfunc_end0:
	v_never_counted v0
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 1
    .vgpr_count:     40
    .vgpr_spill_count: 2
"""


def test_sass_is_read() -> None:
    program = parse_sass(SASS, 32, 0, 16)
    assert program.spills == 1
    assert program.loop() == Counts(instructions=5, exponentials=2, stores=1)
    # 3 before the loop, 4 turns of 5, and the exit; the way around the loop has no exponential.
    assert program.path("shortest", 4, 8, 4) == Counts(3 + 4 * 5 + 1, 8, 4)


def test_amd_assembly_is_read() -> None:
    program = parse_amdgcn(AMDGCN, 0)
    assert (program.registers, program.spills, program.local_bytes) == (40, 3, 8)
    assert program.loop() == Counts(instructions=2, exponentials=1, stores=1)
    assert program.path("longest", 2, 2, 2) == Counts(1 + 2 * 2, 2, 2)


def test_occupancy_is_what_the_tightest_resource_leaves() -> None:
    h100 = TARGETS["sm_90"]
    assert occupancy(h100, 32, 0, 4) == 1.0
    assert occupancy(h100, 48, 16, 4) == 10 * 128 / 2048, "65536 registers hold 10 blocks of 128 threads with 48"
    assert occupancy(h100, 33, 0, 4) == occupancy(h100, 40, 0, 4) == 12 * 128 / 2048, "in steps of 8"
    assert occupancy(h100, 32, 100 * 1024, 8) == 2 * 256 / 2048, "by shared memory"
    assert occupancy(h100, 16, 0, 1) == 32 * 32 / 2048, "by blocks"
    assert occupancy(TARGETS["gfx942"], 128, 0, 4) == 0.5


def test_roofline_of_the_forward_by_hand() -> None:
    b200 = TARGETS["sm_100"]
    bound = roofline(b200, 7.09, 1.03125, 40_000, 2)
    logits_per_second = 8e12 / 2
    assert bound.issue == pytest.approx(7.09 * logits_per_second / (148 * 128 * 1.85e9))
    assert bound.exponential == pytest.approx(1.03125 * logits_per_second / (148 * 16 * 1.85e9))
    assert bound.latency == pytest.approx(40_000 / (670e-9 * 8e12 / 148))
    assert bound.bandwidth == 1.0 and bound.limit == "exponentials"
    starved = roofline(b200, 7.09, 1.03125, 10_000, 2)
    assert starved.bandwidth == pytest.approx(starved.latency) and starved.limit == "bytes in flight"
    busy = roofline(b200, 20.0, 1.0, 40_000, 2)
    assert busy.bandwidth == pytest.approx(1 / busy.issue) and busy.limit == "issue slots"
    amd = roofline(TARGETS["gfx942"], 8.0, 1.0, 40_000, 2)
    assert amd.issue == pytest.approx(11.0 * 5.3e12 / 2 / (304 * 64 * 2.1e9)), "an exponential takes 4 slots there"


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(KernelError) as error:
        aot.compile_all(["sm_70"])
    assert str(error.value) == "`sm_70` is no target"
    assert error.value.hint == "the targets are sm_80, sm_90, sm_100, gfx942"


def test_an_interpreting_process_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError) as error:
        aot.compile_all(["sm_90"])
    assert str(error.value) == "kernels cannot be compiled in a process whose Triton interprets"
    assert error.value.hint == "unset TRITON_INTERPRET"


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelError) as error:
        aot.compile_all(["sm_90"])
    assert str(error.value).startswith("Triton is missing: ")
    assert error.value.hint == "pip install 'triton>=3.7,<3.8'"


PROGRAM = """
import dataclasses, json, sys
from grpoforge_kernels import aot
found = aot.compile_all(json.loads(sys.argv[1]), every=json.loads(sys.argv[2]), kernels=json.loads(sys.argv[3]))
print(json.dumps([{**dataclasses.asdict(one), "allowed": one.bound and one.bound.bandwidth} for one in found]))
"""


def compiled(targets: list[str], kernels: list[str], *, every: bool) -> list[dict[str, Any]]:
    """In a process of its own: a process in which Triton interprets cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(targets), json.dumps(every), json.dumps(kernels)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_sound(one: dict[str, Any]) -> None:
    name = f"{one['kernel']} {one['variant']} {one['form']} {one['configuration']} on {one['target']}"
    assert one["spills"] == 0 and one["local_bytes"] == 0, f"{name} spills"
    if one["is_default"] and one["allowed"] is not None:
        assert one["allowed"] >= 0.9, f"{name}: {one['allowed']:.2f} of the memory bandwidth at most"


def assert_lean(one: dict[str, Any]) -> None:
    """Budgets of the default configurations."""
    name = f"{one['kernel']} {one['variant']} {one['configuration']} on {one['target']}"
    # The scalars of a block weigh more in a short row.
    most = 1.007 if "small V" in one["variant"] else 1.002
    assert one["bytes_per_token"] <= most * one["minimal_bytes_per_token"], name
    if one["kernel"] == "row_stats":
        # One more for each lane and turn, of at least 8 logits (float32, small V), else of 16.
        assert one["exponentials_per_logit"] <= (1.125 if "small V" in one["variant"] else 1.07), name
        assert one["instructions_per_logit"] <= 10.5, name
        assert one["shared_bytes"] <= 64, name
    else:
        assert one["exponentials_per_logit"] == 1, name
        assert one["instructions_per_logit"] <= 18.5, name
        assert one["shared_bytes"] == 0, name


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_row_kernels_keep_their_budget(target: str) -> None:
    rows = [one for one in compiled([target], ["row_stats"], every=False) if one["variant"] == "bf16"]
    assert len(rows) == 1
    assert_sound(rows[0])
    assert_lean(rows[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", list(TARGETS))
def test_every_kernel_and_configuration_compiles_without_spills(target: str) -> None:
    found = compiled([target], [], every=True)
    assert {one["kernel"] for one in found} == {
        "row_stats", "row_gradient", "merge", "grpo_loss", "scale", "linear_stats"
    }  # fmt: skip
    for one in found:
        assert_sound(one)
        if one["is_default"] and not one["form"] and one["kernel"].startswith("row_"):
            assert_lean(one)


def chosen(kernel: str, target: str) -> set[tuple[str, str]]:
    """Variant and configuration of all that the launchers and `tune` choose from."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    variants: dict[str, Any]
    if kernel == "row_stats":
        variants = {name: (configs.row_stats_candidates, dtype) for name, dtype in dtypes.items()}
    else:
        pairs = ("bf16 to bf16", "fp16 to fp16", "fp32 to fp32", "fp32 to bf16", "fp32 to fp16")
        variants = {pair: (configs.row_gradient_candidates, dtypes[pair[:4]]) for pair in pairs}
    return {
        (f"{name}{bucket}", option)
        for name, (candidates, dtype) in variants.items()
        for bucket, size in (("", 151_936), (", small V", 8192))
        for option in candidates(dtype, size, target).options
    }


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kernel", ["row_stats", "row_gradient"])
def test_whatever_can_be_chosen_is_compiled_plain_and_with_everything(kernel: str, target: str) -> None:
    found = [case for case in aot_cases.cases(target) if case.kernel == kernel]
    for form in ("", aot_cases.FULLEST):
        assert {(case.variant, case.configuration) for case in found if case.form == form} == chosen(kernel, target)


def test_a_default_is_compiled_with_each_thing_alone() -> None:
    found = list(aot_cases.cases("sm_90"))
    expected = {
        "row_stats": {"", "no entropy", "masked", "scale", "softcap", "V of twos", "odd V", aot_cases.FULLEST},
        "row_gradient": {"", "masked", "scale", "softcap", "odd V", "unlike strides", aot_cases.FULLEST},
        "linear_stats": {"", "masked", "scale", "softcap", "bias", "odd H", aot_cases.FULLEST},
    }
    for kernel, forms in expected.items():
        for variant in ("bf16", "fp32") if kernel != "row_gradient" else ("bf16 to bf16", "fp32 to fp32"):
            some = [c for c in found if (c.kernel, c.variant, c.is_default) == (kernel, variant, True)]
            assert {case.form for case in some} == forms
    fullest = next(case for case in found if (case.kernel, case.form) == ("row_stats", aot_cases.FULLEST))
    assert fullest.types["mask"] == "*i1" and "mask" not in fullest.constants
    assert {name: fullest.constants[name] for name in ("HAS_MASK", "SCALE", "SOFTCAP", "VECTOR")} == {
        "HAS_MASK": True, "SCALE": 0.7, "SOFTCAP": 30.0, "VECTOR": 1,
    }  # fmt: skip
    assert fullest.constants["UNROLL"] == 16, "as many logits for each thread as four vectors of four float32 hold"
    losses = {case.variant for case in found if case.kernel == "grpo_loss"}
    assert len(losses) == 16 and {"k1", "no KL, from statistics", "k2, no gradient"} < losses
    assert {case.variant for case in found if case.kernel == "merge"} == {
        f"{parts} parts" for parts in (2, 4, 8, 16, 32, 64)
    }
    assert {case.variant for case in found if case.kernel == "scale"} == {
        *("fp32", "bf16", "fp16"), *(f"{name}, odd size" for name in ("fp32", "bf16", "fp16"))
    }  # fmt: skip
