"""The PTX of the CUDA kernels, run by the emulator of tests/ptx/emulator, as a backend of CPU tensors."""

import ctypes
import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cases import lists, sass
from cases.agreement import assert_same, assert_same_but_for_codes
from cases.compilers import SOURCES, compile_once
from cases.paths import ROOT
from cases.problem import same_bits

from pybatch import _C, ops
from pybatch.base.errors import DeviceError

EMULATOR = ROOT / "tests/ptx/emulator"
KERNELS = tuple(sorted(path.stem for path in (ROOT / "kernels").glob("*.cu")))
ARCHITECTURE = "compute_90"


def nvcc():
    """The CUDA compiler, or None."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def _compile_all(compiler, options, sources, suffix, includes):
    """Side by side; the files in the order of their sources."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda source: compile_once(compiler, options, [source], suffix, includes), sources))


def compile_kernels(folder, patches=(), kernels=KERNELS):
    """PTX of the kernels, by name; `patches`: (file in kernels/, old text, new text), each of which must apply."""
    source = folder / "kernels"
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name, old, new in patches:
        text = (source / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (source / name).write_text(text.replace(old, new))
    options = ["-std=c++17", f"-arch={ARCHITECTURE}", "-ptx", "--expt-relaxed-constexpr"]
    sources = [source / f"{name}.cu" for name in kernels]
    made = _compile_all([nvcc()], options, sources, ".ptx", [source, ROOT / "csrc"])
    return {name: path.read_text() for name, path in zip(kernels, made, strict=True)}


def sources_of(folder):
    """What the kernels in a folder are made of, as the core that is compiled from them names it."""
    files = sorted((file for file in folder.iterdir() if file.suffix in SOURCES), key=lambda file: file.name)
    told = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
    return hashlib.sha256(told.encode()).hexdigest()


def installed_kernels(folder=ROOT / "kernels"):
    """PTX of the kernels as the installed core holds it, by name; None where it holds none, or was compiled from others
    than those in the folder."""
    built = (ops.build().cuda_architectures or "").split()
    dumper = sass.tool("cuobjdump")
    if dumper is None or not {"90", "90-virtual"} & set(built) or _C.kernel_sources != sources_of(folder):
        return None
    return ptx_in(_C.__file__, dumper)


def ptx_in(binary, dumper):
    """PTX of each kernel file of a binary, by name."""
    dumped = subprocess.run([dumper, "-ptx", "-arch", "sm_90", binary], capture_output=True, text=True, check=True)
    parts = re.split(r"^Fatbin (\w+) code:$", dumped.stdout, flags=re.MULTILINE)[1:]
    texts = [
        text[text.index(".version") :] for kind, text in zip(parts[::2], parts[1::2], strict=True) if kind == "ptx"
    ]
    found = {name: [text for text in texts if f"_{name}_cu_" in text] for name in KERNELS}
    counts = {name: len(of) for name, of in found.items()}
    assert set(counts.values()) == {1}, f"{binary}: PTX of {counts}"
    return {name: of[0] for name, of in found.items()}


def compile_emulator():
    """Build the emulator; returns the library."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [EMULATOR, *(ROOT / name for name in ("tests/kernels/cuda_on_host", "kernels", "csrc"))]
    options = ["-std=c++20", "-O1", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    objects = _compile_all(compiler, [*options, "-c"], sorted(EMULATOR.glob("*.cpp")), ".o", includes)
    library = ctypes.CDLL(str(compile_once(compiler, ["-shared"], objects, ".so")))
    library.ptx_new.restype = ctypes.c_void_p
    library.ptx_faults.restype = library.ptx_error.restype = library.ptx_lines.restype = ctypes.c_char_p
    return library


class Emulator:
    """One emulated device: its programs, its memory, and the faults it has seen.

    Args:
        library: from `compile_emulator`.
        programs: PTX texts.
        seed: how threads are interleaved.
        resident: blocks that run at a time.
    """

    def __init__(self, library, programs, seed=1, resident=6):
        self._library = library
        self._self = ctypes.c_void_p(library.ptx_new(ctypes.c_uint32(seed), ctypes.c_uint32(resident)))
        for text in programs:
            self._check(library.ptx_load(self._self, text.encode()))

    def __del__(self):
        self._library.ptx_delete(self._self)

    def _check(self, code):
        if code < 0:
            raise DeviceError(self._library.ptx_error(self._self).decode())

    def see(self, tensors):
        """Make these the memory of the device: name -> tensor; int64 ones may hold addresses of the others."""
        self._library.ptx_forget(self._self)
        for name, tensor in tensors.items():
            assert tensor.is_contiguous()
            size, element = ctypes.c_uint64(tensor.nbytes), ctypes.c_uint32(tensor.element_size())
            addresses = tensor.element_size() == 8 and not tensor.is_floating_point()
            pointer = ctypes.c_void_p(tensor.data_ptr())
            self._library.ptx_add(self._self, name.encode(), pointer, size, element, ctypes.c_bool(addresses))

    def run_pass(self, entry, table, call):
        """A pass of the project's table and call, with the launches that csrc/step_cuda.cpp makes of it."""
        address = ctypes.c_void_p(table.address), ctypes.c_void_p(call.address)
        self._check(self._library.ptx_pass(self._self, entry.encode(), *address))

    def launch(self, kernel, params, blocks, shared=0):
        """One launch of the kernel whose name holds `kernel`; params: its parameters' bytes."""
        held = np.frombuffer(params, dtype=np.uint8).copy()
        sizes = ctypes.c_uint64(len(held)), ctypes.c_uint32(blocks), ctypes.c_uint32(shared)
        self._check(self._library.ptx_launch(self._self, kernel.encode(), ctypes.c_void_p(held.ctypes.data), *sizes))

    @property
    def faults(self):
        """What was found so far, a line each."""
        return self._library.ptx_faults(self._self).decode().splitlines()

    def lines(self, program, ran=True):
        """The lines of a program, by its place in `programs`, whose instructions ran, or did not."""
        text = self._library.ptx_lines(self._self, ctypes.c_uint32(program), ctypes.c_bool(ran))
        return {int(line) for line in text.split()}

    @property
    def counts(self):
        """(instructions, launches) so far."""
        instructions, launches = ctypes.c_uint64(), ctypes.c_uint64()
        self._library.ptx_counts(self._self, ctypes.byref(instructions), ctypes.byref(launches))
        return instructions.value, launches.value


class PtxCuda(ops.CudaBackend):
    """The CUDA backend on an emulated device."""

    chunk = 8192  # eight vectors a thread: loops that take four at once take two turns

    def __init__(self, library, programs, **how):
        self.emulator = Emulator(library, programs.values(), **how)
        self.setup = None  # the `lists.Setup` that it works for
        self.more = {}  # memory beside that of the list: name -> tensor

    def _run(self, entry, tensors, call):
        self.emulator.see(memory_of(tensors, self.setup) | self.more)
        self.emulator.run_pass(entry, tensors.table, call)


def memory_of(tensors, setup):
    """All memory of a pass over a `TensorList` made by a `lists.Setup`: name -> tensor."""
    found = {name: tensor for name, tensor in vars(tensors).items() if isinstance(tensor, torch.Tensor)}
    found |= {"ledger": tensors.ledger.values, "ring": tensors.ledger.ring}
    several = {"param": setup.params, "grad": setup.grads, "sum": setup.sums, "master": setup.masters}
    for kind in ("states", "scales"):
        several |= {f"{kind} {k}": of for k, of in enumerate(zip(*getattr(setup, kind), strict=True))}
    for name, of in several.items():
        found |= {f"{name} of tensor {i}": tensor for i, tensor in enumerate(of) if tensor is not None}
    return found


# Two chunks and a bit, aligned; odd ones are not: a few, a chunk's end, one. Of one of each the states are not.
COUNTS = [PtxCuda.chunk + 37, 6, 0, PtxCuda.chunk // 4 - 1, 39, 1]
SHIFTED = (3, 4)
# With 0.05 many of Lion's 16-bit values lie midway between two of the storage, and go by the order of fp32 arithmetic.
RATE = 0.0487


def setup(rule, backend, storage=None, layers=False, state_type="fp32", counts=COUNTS):
    """A list of tensors for a backend; an emulated one is shown its memory."""
    dtype = getattr(torch, (storage or "float32").split("_")[0])
    kept = torch.zeros(len(counts), ops.LAYER_SIZE, dtype=torch.float64) if layers else None
    how = {"layers": kept, "backend": backend, "state_type": state_type, "shifted": SHIFTED}
    made = lists.Setup(lists.draw(counts, dtype, seed=5, whole=True), rule, storage, **how)
    made.set_rate(RATE)
    backend.setup = made
    return made


# The first step of each scenario has whole numbers, so that one other element in a sum of squares shows; later ones
# have all their bits.


def clip(made):
    """Two clipped steps, on gradients of the parameters' dtype and in fp32, those aligned where parameters are not."""
    for step, dtype in enumerate((made.params[0].dtype, torch.float32)):
        grads = lists.draw(COUNTS, dtype, seed=step, turn=step, whole=not step)
        made.step(grads, norm=True, clip=True, max_norm=300.0)


def accumulate(made, noise=False):
    """Two steps on sums of two micro-batches of two dtypes, one of which does not touch a tensor.

    The second step has more examples, so that no statistic of both is a multiple of another.
    """
    for step in range(2):
        n = 4.0 + 2.0 * step
        for i, dtype in enumerate((torch.bfloat16, torch.float32)[:: 1 - 2 * step]):
            grads = lists.draw(COUNTS, dtype, seed=2 * step + i, whole=not step)
            made.accumulate([None if i and j == 3 else g for j, g in enumerate(grads)], n, first=not i)
        how = {"noise": noise, "inverse": 0.5, "examples": 2 * n, "micro_batches": 2.0}
        made.step([None] * len(COUNTS), sum=True, known=True, clip=True, max_norm=20.0, **how)


def noise(made):
    """The same with pairs of norms; where the list has layers, theirs too."""
    accumulate(made, noise=True)


def skip(made):
    """A good step and a bad one, which changes nothing."""
    made.step(lists.draw(COUNTS, seed=1, whole=True), norm=True, clip=True, max_norm=300.0)
    before, grads = made.bits(), lists.draw(COUNTS, seed=2)
    grads[-1][-1] = math.inf
    made.step(grads, norm=True, clip=True, max_norm=300.0)
    assert same_bits(before, made.bits())
    assert float(made.ledger["skipped"]) == float(made.ledger["skip"]) == 1.0


def scaler(made):
    """Steps that leave their gradients unscaled, of the parameters' dtype and in fp32."""
    for step, dtype in enumerate((made.params[0].dtype, torch.float32)):
        lists.unscale(made, dtype, whole=not step)


SCENARIOS = {"clip": clip, "accumulate": accumulate, "noise": noise, "layers": noise, "skip": skip, "scaler": scaler}


def check(library, programs, rule, storage, scenario, state_type="fp32", seed=1):
    """Run a scenario on the C++ core and on the emulator, which must agree without a fault; returns the emulator."""
    twin = PtxCuda(library, programs, seed=seed)
    setups = [setup(rule, backend, storage, scenario == "layers", state_type) for backend in (ops.CppBackend(), twin)]
    for made in setups:
        SCENARIOS[scenario](made)
    assert not twin.emulator.faults, twin.emulator.faults
    if state_type == "fp32":
        assert_same(*setups, storage)
    else:
        assert_same_but_for_codes(*setups)
    return twin.emulator


def faults_of(library, programs, rule, storage, scenario):
    """Kinds of the faults in one run of a scenario, whatever it computes."""
    twin = PtxCuda(library, programs)
    try:
        SCENARIOS[scenario](setup(rule, twin, storage, layers=scenario == "layers"))
    except AssertionError:
        assert twin.emulator.faults
    return {fault.split(",")[0] for fault in twin.emulator.faults}
