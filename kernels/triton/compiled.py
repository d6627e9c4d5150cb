"""What the compiler made of a launch, for a GPU that need not be there: read from PTX, cubin or AMDGCN assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .common import Launch


@dataclass(frozen=True)
class Architecture:
    """A GPU generation's limits: CUDA C++ programming guide, "Compute Capabilities"; AMD CDNA 3 ISA guide."""

    name: str
    gpu: str
    target: GPUTarget
    registers: int
    """32-bit registers of a multiprocessor (of a compute unit: 4 SIMDs x 512 x 64 lanes)."""
    register_step: int
    """A thread's registers are handed out in multiples of this."""
    warps: int
    """Warps (wavefronts) that a multiprocessor holds."""
    shared: int
    """Bytes of shared memory of a multiprocessor."""
    shared_block: int
    """Bytes of shared memory that one block may have."""
    shared_reserved: int
    """Bytes the system takes of it for every block."""
    wide_store: int
    """Bits a lane stores in a wide access: a wavefront's 64 lanes fill with 64 what a warp's 32 fill with 128."""


ARCHITECTURES = {
    "sm_80": Architecture("sm_80", "A100", GPUTarget("cuda", 80, 32), 65536, 8, 64, 167936, 166912, 1024, 128),
    "sm_90": Architecture("sm_90", "H100", GPUTarget("cuda", 90, 32), 65536, 8, 64, 233472, 232448, 1024, 128),
    "sm_100": Architecture("sm_100", "B200", GPUTarget("cuda", 100, 32), 65536, 8, 64, 233472, 232448, 1024, 128),
    "gfx942": Architecture("gfx942", "MI300X", GPUTarget("hip", "gfx942", 64), 131072, 8, 32, 65536, 65536, 0, 64),
}

WIDE = 128  # bits: the widest load or store of one lane

_TENSOR_CORE = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "v_mfma": r"\bv_mfma_",
}


Widths = dict[tuple[str, bool], set[int]]
"""(file:line, is a store) -> widths in bits of the line's instructions."""


@dataclass(frozen=True)
class Access:
    """One load or store of a tile in the source, and the widths of the instructions it became."""

    source: str
    """file:line"""
    store: bool
    tile: str
    """Shape and element, for example 64x64xf16."""
    bytes_each: float
    """The tile's bytes per thread."""
    bits: tuple[int, ...]
    """Widths of its instructions, ascending; empty where none bears its source line."""

    def narrow(self, architecture: Architecture) -> bool:
        """Narrower than a wide access though every thread has a wide one's worth to move."""
        wide = architecture.wide_store if self.store else WIDE
        return self.bytes_each >= WIDE // 8 and min(self.bits, default=wide) < wide


@dataclass(frozen=True)
class Compiled:
    registers: int
    """32-bit registers a thread."""
    spilled: int
    """Bytes a thread keeps in local memory because registers ran out."""
    shared: int
    """Bytes of shared memory a block."""
    occupancy: float
    """Resident warps as a share of those a multiprocessor holds."""
    limit: str
    """What bounds the occupancy: "registers", "shared memory" or "warps"."""
    accesses: tuple[Access, ...]
    tensor_core: dict[str, int]
    """Tensor-core instructions in the code, by kind."""
    products: bool
    """The source multiplies matrices in 16 bits: there should be tensor-core instructions."""
    wide_products: bool = False
    """The source multiplies matrices in fp32."""
    serialised: bool = False
    """Each wgmma is waited for before the next is issued, as ptxas's warning C7515 says."""
    unread: tuple[str, ...] = ()
    """Loads and stores of tiles that stand in the compiler's output and could not be read."""


def compile_launch(launch: Launch, architecture: Architecture) -> Compiled:
    """Compiles `launch` for `architecture` (or takes it from Triton's cache) and reads what came out."""
    source = ASTSource(launch.kernel, launch.signature(), launch.constexprs(), launch.attributes())
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return examine(triton.compile(source, target=architecture.target, options=options), launch, architecture)


def compile_here(launch: Launch, architecture: Architecture) -> Compiled:
    """Compiles `launch`, whose tensors have memory, as its first run on the current GPU would, which then finds it."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binary = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **options)
    return examine(binary, launch, architecture)


def examine(binary: CompiledKernel, launch: Launch, architecture: Architecture) -> Compiled:
    """Reads what came out of the compiler."""
    if architecture.target.backend == "cuda":
        assembly = binary.asm["ptx"]
        registers, spilled = _cubin_resources(binary.asm["cubin"])
        serialised = "wgmma" in assembly and _serialised(_cuobjdump("-sass", binary.asm["cubin"]))
        widths = _widths_in_llvm(binary.asm["llir"])
    else:
        assembly = binary.asm["amdgcn"]
        (registers, spilled), serialised = _amdgcn_resources(assembly), False
        widths = _widths_in_assembly(assembly)
    threads = launch.num_warps * architecture.target.warp_size
    accesses, unread = _accesses(binary.asm["ttgir"], widths, threads)
    occupancy, limit = _occupancy(architecture, launch.num_warps, registers, binary.metadata.shared)
    return Compiled(
        registers=registers,
        spilled=spilled,
        shared=binary.metadata.shared,
        occupancy=occupancy,
        limit=limit,
        accesses=accesses,
        tensor_core={
            kind: len(found) for kind, pattern in _TENSOR_CORE.items() if (found := re.findall(pattern, assembly))
        },
        products=bool(re.search(r"tt\.dot .*x(f16|bf16)> \*", binary.asm["ttir"])),
        wide_products=bool(re.search(r"tt\.dot .*xf32> \*", binary.asm["ttir"])),
        serialised=serialised,
        unread=unread,
    )


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes."""
    printed = _cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {printed[:1000]!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _cuobjdump(option: str, cubin: bytes) -> str:
    """What NVIDIA's cuobjdump prints with `option`. With "-sass" it takes a hundred times as long as with the rest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _serialised(sass: str) -> bool:
    """Whether each wgmma is waited for: ptxas's C7515, read from the code itself, since Triton keeps no warnings.

    A product takes several (one for 16 of the inner dimension), and one wait where they overlap.
    """
    issued, waits = (len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", r"WARPGROUP\.DEPBAR"))
    return 0 < issued <= waits


def _amdgcn_resources(assembly: str) -> tuple[int, int]:
    """Vector registers (with the accumulation registers, which share one file), and bytes of scratch."""
    values = {
        key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly)
    }
    return values["vgpr_count"], values["private_segment_fixed_size"]


def _occupancy(architecture: Architecture, num_warps: int, registers: int, shared: int) -> tuple[float, str]:
    step = architecture.register_step
    a_warp = -(-max(registers, 1) // step) * step * architecture.target.warp_size
    blocks = {
        "warps": architecture.warps // num_warps,
        "registers": architecture.registers // a_warp // num_warps,
        "shared memory": architecture.shared // max(shared + architecture.shared_reserved, 1),
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return min(blocks.values()) * num_warps / architecture.warps, limit


def _accesses(ttgir: str, widths: Widths, threads: int) -> tuple[tuple[Access, ...], tuple[str, ...]]:
    """Tiles from the compiler's own view of the source, widths from its output, joined by source line; and the accesses
    that could not be read."""
    found: dict[tuple[str, bool], Access] = {}
    tiles, unread = _tiles(ttgir)
    for source, store, shape, element in tiles:
        bits = widths.get((source, store), set())
        dims = [int(dim) for dim in shape.split("x")]
        size = int(re.sub(r"\D", "", element)) // 8
        elements = 1
        for dim in dims:
            elements *= dim
        access = Access(source, store, f"{shape}x{element}", elements * size / threads, tuple(sorted(bits)))
        known = found.get((source, store))
        if known is None or access.bytes_each > known.bytes_each:
            found[source, store] = access
    return tuple(_merged(access, found.values()) for access in found.values()), tuple(unread)


def _merged(access: Access, others: Iterable[Access]) -> Access:
    """Where two branches end with the same instruction, LLVM keeps one, with the line of one: the other has its widths
    too."""
    if access.bits:
        return access
    alike = (other.bits for other in others if (other.store, other.tile) == (access.store, access.tile))
    return replace(access, bits=max(alike, key=len))


_ACCESS = r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local|amdg(?:pu)?\.buffer_\w+) "


def _tiles(ttgir: str) -> tuple[list[tuple[str, bool, str, str]], list[str]]:
    """(file:line, is a store, shape, element) of every access to a tile in global memory, and the lines of those that
    could not be read. Scalars are left out."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    tiles, unread = [], []
    # Without {...} inside a line; the body of a loop, which begins with a brace at the end of one, stays.
    for line in re.sub(r" \{[^{}\n]*\}", "", ttgir).splitlines():
        operation = re.search(_ACCESS, line)
        if operation is None or "tensor<" not in line:
            continue
        tile = re.search(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)[>,].*loc\((#loc\d*)\)$", line[operation.end() :])
        if tile is None or tile[3] not in locations:
            unread.append(line.strip())
            continue
        is_store = operation[1].endswith("store")
        tiles.append((_source_line(locations, tile[3]), is_store, tile[1].rstrip("x"), tile[2]))
    return tiles, unread


def _source_line(locations: dict[str, str], name: str) -> str:
    """The innermost file:line of a location, through names and call sites."""
    text = locations[name]
    while True:
        place = re.match(r'"([^"]+)":(\d+)', text)
        if place:
            return f"{Path(place[1]).name}:{place[2]}"
        inner = re.search(r"#loc\d*", text)
        if inner is None:
            return text
        text = locations[inner[0]]


def _widths_in_llvm(llir: str) -> Widths:
    """Accesses in PTX, which Triton writes as inline assembly: LLVM's own location is exact where PTX's `.loc` lags
    behind."""
    metadata = dict(re.findall(r"^(!\d+) = (?:distinct )?(.*)$", llir, re.MULTILINE))
    widths: Widths = {}
    for call, location in re.findall(r"^(.* asm .*), !dbg (!\d+)$", llir, re.MULTILINE):
        instruction = _width(call.replace(r"\0A\09", " "))
        if instruction is not None:
            store, bits = instruction
            widths.setdefault((_debug_line(metadata, location), store), set()).add(bits)
    return widths


def _debug_line(metadata: dict[str, str], location: str) -> str:
    """file:line of LLVM debug metadata `location`: its line, and its scope's file."""
    line = re.search(r"line: (\d+)", metadata[location])
    scope = location
    while (file := re.search(r"\bfile: (!\d+)", metadata[scope])) is None:
        scope = re.findall(r"scope: (!\d+)", metadata[scope])[0]
    name = re.search(r'filename: "([^"]+)"', metadata[file[1]])
    return f"{Path(name[1]).name if name else '?'}:{line[1] if line else '?'}"


def _widths_in_assembly(assembly: str) -> Widths:
    """Accesses in AMDGCN: from `.loc` lines and the global instructions after them. The kernel's own arguments are read
    by the address in s[0:1], between instructions of any line."""
    pattern = r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"'
    files = {number: Path(name).name for number, name in re.findall(pattern, assembly)}
    widths: Widths = {}
    place = ""
    for line in assembly.splitlines():
        located = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        instruction = _width(line)
        if located:
            place = f"{files.get(located[1], located[1])}:{located[2]}"
        elif instruction is not None and not re.match(r"\s*s_load_\w+ \S+, s\[0:1\], ", line):
            store, bits = instruction
            widths.setdefault((place, store), set()).add(bits)
    return widths


_DWORDS = {
    "dword": 32,
    "dwordx2": 64,
    "dwordx3": 96,
    "dwordx4": 128,
    "dwordx8": 256,
    "ushort": 16,
    "short": 16,
    "ubyte": 8,
    "byte": 8,
}


def _width(line: str) -> tuple[bool, int] | None:
    """(is a store, bits) of a global load or store instruction, PTX or AMDGCN; None for anything else."""
    copy = re.search(r"\bcp\.async\.c[ag]\.shared\.global .*?, (0x[0-9a-f]+|\d+)", line)
    if copy:
        return False, 8 * int(copy[1], 0)
    ptx = re.search(r"\b(ld|st)\.global([\w.:]*)", line)
    if ptx:
        vector = re.search(r"\.v(\d)\b", ptx[2])
        element = re.search(r"\.[busf](\d+)$", ptx[2])
        return ptx[1] == "st", int(vector[1] if vector else 1) * int(element[1] if element else 0)
    amd = re.match(r"\s*(?:global|buffer|flat|s)_(load|store)_([a-z]+\d?)(?!\d)", line)  # s: the same for all lanes
    if amd and ", s[0:1], 0x" not in line:  # a kernel begins with the address of its arguments there
        return amd[1] == "store", _DWORDS.get(amd[2], 0)
    return None
