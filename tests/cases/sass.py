"""Machine code of NVIDIA GPUs as text: what a kernel's loops load before they store, registers, local memory."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


def tool(name):
    """Path of "cuobjdump" or "nvdisasm": of the CUDA toolkit, else as Triton ships it; None where neither is there."""
    if found := shutil.which(name):
        return found
    spec = find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec else None
    return str(shipped) if shipped and shipped.is_file() else None


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str

    @property
    def name(self):
        return self.opcode.split(".")[0]

    @property
    def is_double(self):
        """Whether it computes in fp64, or converts to or from it."""
        return self.name in ("DADD", "DMUL", "DFMA", "DSETP") or "F64" in self.opcode or "64H" in self.opcode

    @property
    def bytes(self):
        """Of one access to memory."""
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 4)


@dataclass(frozen=True)
class Kernel:
    name: str
    instructions: tuple[Instruction, ...]
    registers: int
    stack: int  # bytes

    def innermost_loops(self):
        """Instructions between a backward branch and its target, of loops that hold no other."""
        spans = []
        for i in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", i.operands) if i.name == "BRA" else None
            if target and int(target[1], 16) < i.address:
                spans.append((int(target[1], 16), i.address))
        inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [[i for i in self.instructions if low <= i.address <= high] for low, high in inner]


def kernels(binary, architecture="sm_90"):
    """The kernels for an architecture in a binary, by mangled name."""
    text = _cuobjdump("-sass", "-arch", architecture, binary)
    usage = _cuobjdump("-res-usage", "-arch", architecture, binary)
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name = part.split()[0]
        of = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+)", usage)
        rows = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", part)
        found[name] = Kernel(
            name, tuple(Instruction(int(a, 16), op, rest) for a, op, rest in rows), int(of[1]), int(of[2])
        )
    return found


def _cuobjdump(*arguments):
    done = subprocess.run([tool("cuobjdump"), *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loads_before_a_store(loop, names=("LD", "LDG")):
    """The loads of a loop that are under way before its first store."""
    loads = []
    for i in loop:
        if i.name in ("ST", "STG"):
            break
        if i.name in names:
            loads.append(i)
    return loads
