"""codegen reads compiled code correctly, and the kernels' code is what their docstrings promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton

from phi_fast.kernels import codegen
from phi_fast.kernels.triton.compiled import (
    ARCHITECTURES,
    Access,
    Compiled,
    _accesses,
    _occupancy,
    _serialised,
    _source_line,
    _width,
    _widths_in_assembly,
    _widths_in_llvm,
)
from phi_fast.kernels.triton.specimens import compiled_as, specimens, variants

ROOT = Path(__file__).parents[2]


def run(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    """The command in a separate process, so that kernels imported for the interpreter do not affect it."""
    command = [sys.executable, "-m", "phi_fast.kernels.codegen", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("\t@%p1 ld.global.v4.b32 { %r40, %r41, %r42, %r43 }, [ %rd47 + 0 ];", (False, 128)),
        ("\tld.global.L1::evict_last.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ], %rd2;", (False, 128)),
        ("\t@%p2 ld.global.b16 { %rs1 }, [ %rd4 + 0 ];", (False, 16)),
        ("\tst.global.v2.b64 [ %rd4 + 0 ], { %rd1, %rd2 };", (True, 128)),
        ("\tcp.async.cg.shared.global [ %r544 + 0 ], [ %rd55 + 0 ], 0x10, %r72;", (False, 128)),
        ("\tcp.async.ca.shared.global [ %r5 + 0 ], [ %rd5 + 0 ], 0x4, %r7;", (False, 32)),
        ("\tglobal_load_dwordx4 v[6:9], v[4:5], off", (False, 128)),
        ("\tglobal_store_dwordx2 v[6:7], v[4:5], off", (True, 64)),
        ("\tbuffer_load_ushort v1, v2, s[0:3], 0 offen", (False, 16)),
        ("\tglobal_store_short_d16_hi v[6:7], v4, off", (True, 16)),
        ("\tst.shared.v4.b32 [ %r1 + 0 ], { %r1, %r2, %r3, %r4 };", None),
        ("\tld.param.b64 %rd1, [kernel_param_0];", None),
    ],
)
def test_width_of_an_instruction(line: str, expected: tuple[bool, int] | None) -> None:
    assert _width(line) == expected


TTGIR = """
#loc = loc("/somewhere/kernel.py":10:1)
  %a = tt.load %p, %m, %o : tensor<64x64x!tt.ptr<f16>, #blocked> loc(#loc4)
  %b = tt.load %q {tt.divisibility = dense<16> : tensor<1xi32>} : !tt.ptr<f32> loc(#loc2)
  tt.store %r, %a, %m : tensor<128x!tt.ptr<f32>, #blocked1> loc(#loc3)
  %c = amdg.buffer_load %w[%i], %m {contiguity = 8 : i32} : !tt.ptr<f16> -> tensor<2048xf16, #blocked1> loc(#loc7)
#loc2 = loc("/somewhere/kernel.py":12:5)
#loc3 = loc("/somewhere/kernel.py":13:5)
#loc4 = loc("a"(#loc5))
#loc5 = loc(callsite(#loc6 at #loc2))
#loc6 = loc("/somewhere/helper.py":3:9)
#loc7 = loc("/somewhere/kernel.py":14:5)
"""
LLVM = """
  %1 = tail call { i32, i32 } asm sideeffect "@$3 ld.global.v2.b32 { $0, $1 }, [ $2 + 0 ];", "=r,=r,l,b"(x), !dbg !5
  %2 = tail call i64 asm sideeffect "mov.u64 $0, 0x0;\\0A\\09ld.global.v4.b32 { $0 }, [ $1 + 0 ];", "=l"(y) #9, !dbg !5
  tail call void asm sideeffect "st.global.b32 [ $0 + 0 ], { $1 };", "l,r"(z), !dbg !6
!1 = !DIFile(filename: "kernel.py", directory: "/somewhere")
!2 = !DIFile(filename: "/somewhere/helper.py", directory: "/")
!3 = distinct !DISubprogram(name: "kernel", file: !1, line: 10)
!4 = !DILexicalBlockFile(scope: !3, file: !2, discriminator: 0)
!5 = !DILocation(line: 3, column: 9, scope: !4, inlinedAt: !6)
!6 = !DILocation(line: 13, column: 5, scope: !3)
"""
AMDGCN = """
	.file	1 "/somewhere" "kernel.py"
	.loc	1 14 5                          ; kernel.py:14:5
	s_load_dwordx2 s[2:3], s[0:1], 0x40
	global_load_dwordx4 v[6:9], v[4:5], off
	.loc	1 15 5
	global_store_short v[6:7], v4, off
"""


def test_widths_by_source_line() -> None:
    assert _widths_in_llvm(LLVM) == {("helper.py:3", False): {64, 128}, ("kernel.py:13", True): {32}}
    assert _widths_in_assembly(AMDGCN) == {("kernel.py:14", False): {128}, ("kernel.py:15", True): {16}}


def test_accesses_join_tiles_and_instructions() -> None:
    widths = {("helper.py:3", False): {64, 128}, ("kernel.py:13", True): {32}, ("kernel.py:12", False): {32}}
    accesses, unread = _accesses(TTGIR, widths, threads=128)
    assert accesses == (
        Access("helper.py:3", False, "64x64xf16", 64.0, (64, 128)),
        Access("kernel.py:13", True, "128xf32", 4.0, (32,)),
        Access("kernel.py:14", False, "2048xf16", 32.0, ()),  # no instruction has this line
    )
    assert not unread


def test_accesses_of_two_branches_share_the_instruction_that_llvm_keeps() -> None:
    branches = """
#loc1 = loc("kernel.py":1:1)
#loc2 = loc("kernel.py":2:1)
    tt.store %p, %a, %m : tensor<4x1024x!tt.ptr<f16>, #blocked> loc(#loc1)
    tt.store %q, %b, %m : tensor<4x1024x!tt.ptr<f16>, #blocked> loc(#loc2)
    %c = tt.load %q, %m : tensor<4x1024x!tt.ptr<f16>, #blocked> loc(#loc2)
"""
    accesses, _ = _accesses(branches, {("kernel.py:1", True): {64}}, threads=256)
    assert [access.bits for access in accesses] == [(64,), (64,), ()], "a load is no store"


def test_accesses_inside_a_loop_are_read_and_others_said() -> None:
    """The body of a loop stands in braces, as attributes do."""
    loop = """
#loc = loc("kernel.py":1:1)
  %r = scf.for %i = %c0 to %n step %c1 iter_args(%a = %zero) -> (tensor<2048xf32>) : i32 {
    %x = tt.load %p, %m {isVolatile = false} : tensor<2048x!tt.ptr<f16>, #blocked> loc(#loc)
    %y = tt.load %q {tt.divisibility = dense<16> : tensor<1xi32>} : !tt.ptr<i64> loc(#loc)
    tt.store %strange : tensor<*x!tt.ptr<f16>> loc(#loc)
  } loc(#loc)
"""
    accesses, unread = _accesses(loop, {("kernel.py:1", False): {128}}, threads=256)
    assert accesses == (Access("kernel.py:1", False, "2048xf16", 16.0, (128,)),)
    assert unread == ("tt.store %strange : tensor<*x!tt.ptr<f16>> loc(#loc)",)


def test_a_location_without_a_line_is_left_as_it_is() -> None:
    assert _source_line({"#loc": "unknown"}, "#loc") == "unknown"


def test_narrow_is_what_could_have_been_wide() -> None:
    h100, mi300 = ARCHITECTURES["sm_90"], ARCHITECTURES["gfx942"]
    assert Access("k.py:1", False, "64x64xf16", 64.0, (64, 128)).narrow(h100)
    assert not Access("k.py:1", False, "64x64xf16", 64.0, (128,)).narrow(h100)
    assert not Access("k.py:1", False, "128xf32", 4.0, (32,)).narrow(h100), "4 bytes per thread fill 32 bits"
    assert Access("k.py:1", True, "64x64xf16", 32.0, (64,)).narrow(h100)
    assert not Access("k.py:1", True, "64x64xf16", 32.0, (64,)).narrow(mi300)
    assert Access("k.py:1", False, "64x64xf16", 32.0, (64,)).narrow(mi300)


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "expected"),
    [
        ("sm_90", 4, 32, 0, (1.0, "warps")),
        ("sm_90", 8, 128, 0, (0.25, "registers")),  # 65536 / (128 * 256) = 2 blocks of 8 warps, of 64
        ("sm_90", 8, 129, 0, (0.125, "registers")),  # registers are allocated in units of 8: 136
        ("sm_80", 4, 64, 65536, (0.125, "shared memory")),  # 2 blocks of 4
        ("gfx942", 4, 256, 0, (0.25, "registers")),  # 512 per lane: 2 wavefronts of 8 on each SIMD
        ("gfx942", 4, 128, 32768, (0.25, "shared memory")),
    ],
)
def test_occupancy(arch: str, warps: int, registers: int, shared: int, expected: tuple[float, str]) -> None:
    assert _occupancy(ARCHITECTURES[arch], warps, registers, shared) == expected


def test_problems_name_what_is_wrong() -> None:
    narrow = Access("k.py:7", True, "64x64xf16", 64.0, (16, 128))
    lost = Access("k.py:8", False, "64x64xf16", 64.0, ())
    bad = Compiled(255, 24, 300000, 0.1, "registers", (narrow, lost), {}, True)
    assert codegen.problems(bad, ARCHITECTURES["sm_90"]) == (
        "spills 24 bytes per thread",
        "wants 300000 bytes of shared memory, a block may have 232448",
        "multiplies matrices without tensor-core instructions",
        "stores 64x64xf16 by 16 bits at k.py:7",
        "loads 64x64xf16 at k.py:8 by no instruction that could be found",
    )
    wide = Access("k.py:7", True, "64x64xf16", 64.0, (128,))
    good = Compiled(64, 0, 0, 1.0, "warps", (wide,), {"wgmma": 4}, True)
    assert codegen.problems(good, ARCHITECTURES["sm_90"]) == ()
    assert codegen.problems(replace(good, serialised=True), ARCHITECTURES["sm_90"]) == (
        "waits for each wgmma before the next (ptxas C7515)",
    )
    assert codegen.problems(replace(good, accesses=()), ARCHITECTURES["sm_90"]) == (
        "moves no tile that could be found: its widths were not checked",
    )
    assert codegen.problems(replace(good, unread=("tt.load %x",)), ARCHITECTURES["sm_90"]) == (
        "has an access that could not be read: tt.load %x",
    )


def test_spills_in_fp32_products_are_remarked() -> None:
    """fp32 attention multiplies on the ordinary units, from registers: what spills there is said, and no failure."""
    wide = Access("k.py:7", True, "16x128xf32", 64.0, (128,))
    single = Compiled(255, 424, 0, 0.1, "registers", (wide,), {}, False, wide_products=True)
    assert codegen.problems(single, ARCHITECTURES["sm_80"]) == ()
    assert codegen.remarks(single) == ("spills 424 bytes per thread, in fp32",)
    for spilling in (replace(single, products=True), replace(single, wide_products=False)):
        assert "spills 424 bytes per thread" in codegen.problems(spilling, ARCHITECTURES["sm_80"])
        assert codegen.remarks(spilling) == ()


@pytest.mark.parametrize(("waits", "serialised"), [(8, True), (2, False)])
def test_a_wait_for_each_wgmma_is_seen(waits: int, serialised: bool) -> None:
    sass = "  HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;\n" * 8 + "  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n" * waits
    assert _serialised(sass) == serialised
    assert not _serialised("  HMMA.16816.F32 R4, R8, R12, R4 ;\n")


def test_forward_attention_on_hopper(tmp_path: Path) -> None:
    """With at most 128 registers, two blocks of 8 warps fit: one's softmax overlaps with the other's products."""
    report = tmp_path / "codegen.json"
    only = "attention.forward (2, 2048, 32, 64) float16"
    done = run("--arch", "sm_90", "--only", only, "--check", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    plain, rotary = json.loads(report.read_text())
    assert "rotary" in rotary["note"]
    assert plain["spilled"] == 0 and plain["registers"] <= 128 and plain["occupancy"] == 0.25
    assert plain["tensor_core"]["wgmma"] > 0
    wide = [access for access in plain["accesses"] if access["bytes_each"] >= 16]
    assert len(wide) >= 3, "q; k and v, by one line; out"
    assert all(access["bits"] == [128] for access in wide)


def row(name: str, *wrong: str) -> codegen.Row:
    accesses = (Access("k.py:7", True, "64x64xf16", 64.0, (128,)),)
    compiled = Compiled(64, 0, 0, 1.0, "warps", accesses, {}, False)
    [specimen, *_] = specimens("sm_90", torch.float16)
    return codegen.Row("sm_90", replace(specimen, name=name), compiled, wrong, (), True)


def test_an_interrupt_keeps_what_was_found(tmp_path, monkeypatch, capsys) -> None:
    """Hundreds of launches take long: each problem is said when it is found, and Ctrl-C loses none."""

    def two_and_an_interrupt(planned):
        yield row("one", "spills 24 bytes per thread")
        assert "sm_90 one" in capsys.readouterr().err
        yield row("two")
        raise KeyboardInterrupt

    monkeypatch.setattr(codegen, "_require_compiler", lambda: None)
    monkeypatch.setattr(codegen, "rows", two_and_an_interrupt)
    report, page = tmp_path / "codegen.json", tmp_path / "codegen.md"
    arguments = ["--check", "--arch", "sm_90", "--json", str(report), "--markdown", str(page)]
    assert codegen.main(arguments) == 130
    printed = capsys.readouterr()
    assert re.search(r"2 of \d{3} launches compiled, 1 with problems", printed.out)
    assert "the same command goes on from here" in printed.err
    assert [launch["kernel"] for launch in json.loads(report.read_text())] == ["one", "two"]
    assert not page.exists(), "a page of half of the launches would pass for one of all"


def test_the_plan_begins_with_what_is_used_most(monkeypatch) -> None:
    """The tables of every architecture, then fp16, bf16 and fp32; nothing twice, and nothing left out."""
    monkeypatch.setattr(codegen, "_require_compiler", lambda: None)
    planned = codegen.plan(codegen.Options(arch=("sm_80", "sm_90"), check=True))
    tabled = [launch.tabled for launch in planned]
    assert tabled == sorted(tabled, reverse=True) and 50 < sum(tabled) < 100
    others = [launch.specimen.launch for launch in planned if not launch.tabled and launch.arch == "sm_90"]
    found = [next((t for t in ("*fp16", "*bf16") if t in x.signature().values()), "*fp32") for x in others]
    assert found == sorted(found, key=["*fp16", "*bf16", "*fp32"].index) and len(set(found)) == 3
    for arch in ("sm_80", "sm_90"):
        compiled = [compiled_as(launch.specimen.launch) for launch in planned if launch.arch == arch]
        wanted = {compiled_as(x.launch) for x in (*specimens(arch, torch.float16), *variants(arch))}
        assert set(compiled) == wanted
        others = [compiled_as(launch.specimen.launch) for launch in planned if launch[::2] == (arch, False)]
        tables = {compiled_as(launch.specimen.launch) for launch in planned if launch[::2] == (arch, True)}
        assert len(others) == len(set(others)) and not tables & set(others)


def test_the_page_counts_runs_with_other_compilers(monkeypatch) -> None:
    monkeypatch.setattr(codegen, "_accepted", {"sm_80": 7, "sm_90": 5}.get)
    other = {"triton": "3.0.1", "arch": "sm_80", "kernel": "dkv", "remarks": []}
    beside = [other | {"note": "n", "problems": ["spills 8 bytes"]}, other | {"note": "m", "problems": []}]
    again = codegen.as_json(row("two", "is wide"))
    page = codegen.as_markdown([row("one"), row("two", "is wide")], [*beside, again])
    assert f"| {triton.__version__} | sm_90 | 2 | 5 | 1 |\n| 3.0.1 | sm_80 | 2 | 7 | 1 |\n" in page
    assert page.count("is wide") == 1, "a launch that two runs compiled is one"
    assert "- Triton 3.0.1, sm_80 dkv, n: spills 8 bytes\n" in page
    assert page.endswith("## Remarks\n\nNone.\n")


PRINT_CODE = """
import json, re, sys
import triton
from triton.compiler import ASTSource
from phi_fast.kernels.triton.compiled import ARCHITECTURES
from phi_fast.kernels.triton.specimens import specimens
import torch
found = {}
for specimen in specimens("sm_90", getattr(torch, sys.argv[1])):
    launch, key = specimen.launch, f"{specimen.name} {specimen.note}"
    if key.startswith(tuple(sys.argv[2:])):
        source = ASTSource(launch.kernel, launch.signature(), launch.constexprs(), launch.attributes())
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        asm = triton.compile(source, target=ARCHITECTURES["sm_90"].target, options=options).asm
        # Triton 3.4 numbers the arguments of run time; later versions name them.
        names = dict(enumerate(name for name, kind in launch.signature().items() if kind != "constexpr"))
        ttir = re.sub(r"%arg(\\d+)", lambda match: "%" + names.get(int(match[1]), match[0][1:]), asm["ttir"])
        found[key] = {"ttir": ttir, "ptx": asm["ptx"]}
print(json.dumps(found))
"""


def code(*specimens: str, dtype: str = "float16") -> dict[str, dict[str, str]]:
    """Compiles the specimens whose names begin with one of these; name -> code for sm_90, "ttir" and "ptx"."""
    command = [sys.executable, "-c", PRINT_CODE, dtype, *specimens]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


@pytest.mark.slow
def test_the_target_is_read_before_any_warp_writes_gradients_over_it() -> None:
    """Warps synchronise only at the sums; after that, another warp may have overwritten what one reads from the row."""
    [found] = code("linear_cross_entropy.loss_and_gradient").values()
    accesses = re.findall(r"bar\.sync|ld\.global\S*\.b16|st\.global\S*\.v4", found["ptx"])
    target, barrier = (max(i for i, x in enumerate(accesses) if kind in x) for kind in (".b16", "bar.sync"))
    assert target < barrier < len(accesses) - 1, accesses


@pytest.mark.slow
def test_fp32_products_of_a_tile_are_summed_apart() -> None:
    """A key's gradient sums over every row of every query head of its group: in one chain of fp32 numbers the largest
    error of 65 rows and 4 heads is three times that of a chain for each head, which is plain PyTorch's."""
    found = code("attention.dkv (2, 2048, 32, 64) float32", dtype="float32")
    assert found
    for asm in found.values():
        sums = re.findall(r"tt\.dot %\S+ %\S+ %([a-z]+)", asm["ttir"])
        assert sums and set(sums) == {"cst"}, sums  # a constant, which is zero


@pytest.mark.slow
def test_offsets_of_heads_are_64_bits_wide() -> None:
    """transformers' heads lie a whole sequence apart: 64 heads of 128 dims and 262,144 tokens reach 2**31 elements."""
    shape = "(2, 2048, 16, 128) float16, head_dim 128, 4 queries per key"
    names = [f"attention.{name} {shape}" for name in ("forward", "dq", "dkv")]
    found = code(*names, "rotary.forward")
    assert len(found) == 4
    for name, asm in found.items():
        body = re.split(r"tt\.func public .*\n", asm["ttir"])[1]
        uses = re.findall(r"^.*%(?:stride_\w+_h|head_stride)\b.*$", body, re.MULTILINE)
        assert uses and all("arith.extsi" in use for use in uses), (name, uses)


@pytest.mark.parametrize(
    ("interpret", "message"), [("1", "TRITON_INTERPRET=1 replaces the compiler"), ("0", "contains 'no such kernel'")]
)
def test_what_cannot_be_compiled_is_said(interpret: str, message: str) -> None:
    done = run("--only", "no such kernel", interpret=interpret)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")


@pytest.mark.slow
def test_a_second_run_compiles_nothing_again(tmp_path, monkeypatch) -> None:
    """A stopped check goes on from Triton's cache: what it holds is neither compiled nor disassembled again."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    only = ("--arch", "sm_90", "--only", "rotary.forward q, k")
    first = run(*only)
    assert first.returncode == 0, first.stderr
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert written
    second = run(*only)
    assert second.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == written


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_that_the_ops_accept_compiles_without_a_problem(architecture: str) -> None:
    done = run("--check", "--arch", architecture)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
