"""The static gate: machine code of a representative set of the shipped GPU kernels.

`python -m benchmarks.gpu.code` compiles all of them and records the ceilings; here are, for each
kernel and each way of making it, the ones where something breaks first. A Triton upgrade that loses
what the kernels rely on fails here.
"""

from __future__ import annotations

import json

import pytest

code = pytest.importorskip("benchmarks.gpu.code", exc_type=ImportError)

CASES = {case.key: case for case in code.shipped_cases()}
REPRESENTATIVE = [
    "w8a8 128x256x64 8 warps 4 stages bias sm_86",
    "w8a8 128x128x128 8 warps 3 stages gate sm_80",
    "w4a8-g64 128x128x128 8 warps 3 stages bias sm_80",
    "w8a16 128x128x64 8 warps 3 stages gelu sm_89",
    "w4a16-g32 128x128x64 8 warps 3 stages bias sm_86",
    "w8a8 128x256x128 8 warps 3 stages bias sm_90",
    "w4a16-g64 128x128x64 8 warps 3 stages bias sm_90",
    "adaLN + quantize sm_80",
    "join GELU + quantize sm_86",
    "expand int4-g64 to fp16 sm_90",
]


@pytest.mark.parametrize("key", REPRESENTATIVE)
def test_machine_code(key: str) -> None:
    case = CASES[key]
    found = code.compile_case(case)
    ceiling = code.ceilings()[key] if case.gemm else None
    assert not code.faults(case, found, ceiling), found


def test_launch_arguments_that_are_constants_compile() -> None:
    """Triton makes constants of None and of sizes that are 1: one output, nothing optional."""
    case = CASES["w8a16 64x64x64 4 warps 4 stages bias sm_80"]
    constants = case.constants | {"BIAS": False, "EVEN_K": False}
    constants |= dict.fromkeys(("sx", "group", "bias", "gate", "residual"))
    constants |= {"N": 1, "stride_out": 1}
    single = code.Case("n1", 80, case.kernel, case.types, constants, case.warps)
    assert not code.compile_case(single).local


def test_every_shipped_binary_was_recorded_and_keeps_the_rules() -> None:
    """The report in benchmarks/results covers exactly what the tables can lead to."""
    record = json.loads(code.RESULTS.read_text())["cases"]
    assert set(record) == set(CASES)
    assert set(code.ceilings()) == {key for key, case in CASES.items() if case.gemm}
    for key, row in record.items():
        found = code.Code(**row, seconds=0.0)
        assert not code.faults(CASES[key], found, code.ceilings().get(key)), key
    assert {case.arch for case in CASES.values()} == {80, 86, 89, 90}


def test_rules_find_what_is_wrong() -> None:
    case = CASES["w8a8 128x256x64 8 warps 4 stages bias sm_86"]
    record = json.loads(code.RESULTS.read_text())["cases"][case.key]
    broken = {
        "spills": {"stack": 8}, "shared memory": {"shared": 200_000}, "main loop": {"kind": "HMMA"},
        "conversions": {"i2f": 1}, "copies of less": {"narrow": 1}, "no 128-bit": {"wide_loads": 0},
        "instructions per MMA": {"per_mma": 3.0},
    }  # fmt: skip
    for words, change in broken.items():
        found = code.Code(**(record | change), seconds=0.0)
        wrong = code.faults(case, found, code.ceilings()[case.key])
        assert len(wrong) == 1
        assert words in wrong[0]


def test_disassembly_is_counted_as_it_stands() -> None:
    """The main loop is the backward branch with most MMAs, predicates and all."""
    sass = """
        /*0000*/                   I2F.U32.RP R0, R1 ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0020*/              @!P0 LDG.E.U8 R2, [R4.64] ;
        /*0030*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*0040*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/                   BRA 0x70;
    """
    case = CASES["w8a8 128x256x64 8 warps 4 stages bias sm_86"]
    found = code.count(case, sass, 100, 0, 1024, 0.0)
    assert (found.loop, found.mmas, found.kind, found.per_mma) == (5, 2, "IMMA", 2.5)
    assert (found.i2f, found.local, found.narrow, found.wide_loads) == (0, 1, 0, 1)
    assert found.macs == 2 * 16 * 8 * 32
    # 8192 multiply-adds a warp at 1024 a cycle and SM against 5 instructions at 4 a cycle.
    assert found.utilisation == 1.0
    assert code.mac_count("HGMMA.64x128x16.F32") == 64 * 128 * 16 // 4
