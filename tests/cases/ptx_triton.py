"""Triton's backend on the emulator: every launch is compiled to PTX for sm_90 and emulated."""

import struct
from contextlib import ExitStack
from unittest import mock

import torch
from cases import ptx

from pybatch import ops

TYPES = {torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32", torch.int32: "*i32"}
FORMATS = {"i32": "i", "i64": "q", "fp64": "d"}


class TritonPtx(ops.TritonBackend):
    """Triton's backend on an emulated device. Every launch has memory of its own, and races are sought within it."""

    chunk = 256  # two elements a thread

    def __init__(self, library, seed=1):
        self.library, self.seed, self.setup, self.more = library, seed, None, {}
        self.emulators = {}  # by kernel and constants

    @property
    def faults(self):
        """Of all launches so far."""
        return [fault for emulator, *_ in self.emulators.values() for fault in emulator.faults]

    def _run(self, entry, tensors, call):
        from pybatch.kernels import accumulate, step

        memory = ptx.memory_of(tensors, self.setup) | self.more
        with ExitStack() as stack:
            for module in (step, accumulate):
                stack.enter_context(mock.patch.multiple(module, **self._kernels(module, memory)))
            getattr(accumulate if entry == "accumulate" else step, entry)(tensors, call)

    def _kernels(self, module, memory):
        names = [name for name in vars(module) if name.endswith("_kernel")]
        return {name: _Kernel(self, getattr(module, name), memory) for name in names}

    def compiled(self, kernel, types, constants, options):
        """(emulator with the program, dynamic shared memory) of a kernel with these constants."""
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        key = kernel.__name__, str(types), str(constants)
        if key not in self.emulators:
            source = ASTSource(fn=kernel, signature=types, constexprs=constants)
            made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            emulator = ptx.Emulator(self.library, [made.asm["ptx"]], seed=self.seed)
            self.emulators[key] = emulator, made.metadata.shared
        return self.emulators[key]


class _Kernel:
    """In place of a JIT function: `kernel[grid](*arguments, **constants)`."""

    def __init__(self, backend, kernel, memory):
        self.backend, self.kernel, self.memory = backend, kernel, memory

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            parameters = self.kernel.params
            names = [p.name for p in parameters]
            values = dict(zip(names, arguments, strict=False)) | {n: v for n, v in named.items() if n in names}
            options = {n: v for n, v in named.items() if n not in names}
            constants = {p.name: values[p.name] for p in parameters if p.is_constexpr}
            types = {p.name: "constexpr" if p.is_constexpr else _type(p, values[p.name]) for p in parameters}
            emulator, shared = self.backend.compiled(self.kernel, types, constants, options)
            passed = {name: of for name, of in types.items() if of != "constexpr"}
            packed = "".join("Q" if of[0] == "*" else FORMATS[of] for of in passed.values())
            held = [values[name] for name in passed]
            held = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in held]
            emulator.see(self.memory)
            emulator.launch(self.kernel.__name__, struct.pack(f"@{packed}QQ", *held, 0, 0), grid[0], shared)

        return launch


def _type(parameter, value):
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else parameter.annotation_type or "i32"
