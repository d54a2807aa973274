"""Faults planted into the kernels' source or PTX, each of which the emulator must find."""

import re

# name: (file in kernels/, what stands there, what is planted, kind of the fault that must be found)
SOURCE = {
    "no fence before the ticket": ("reduce.cuh", "__threadfence();\n        last =", "last =", "race"),
    "no fence after the ticket": ("reduce.cuh", "gridDim.x - 1;\n        __threadfence();", "gridDim.x - 1;", "race"),
    "no barrier before shared sums are read": (
        "reduce.cuh",
        "sum;\n    __syncthreads();\n    Pair total",
        "sum;\n    Pair total",
        "race",
    ),
    "the last block but one": ("reduce.cuh", "== gridDim.x - 1", "== gridDim.x - 2", "race"),
    "a barrier that some threads miss": (
        "reduce.cuh",
        "sum = warp_sum(sum);\n    __syncthreads();",
        "sum = warp_sum(sum);\n    if (threadIdx.x < 224) __syncthreads();",
        "barrier",
    ),
    "loads shifted by an element": ("chunk.cuh", "N>*>(from);", "N>*>(from + 1);", "misaligned"),
    "loads shifted by a vector": ("chunk.cuh", "N>*>(from);", "N>*>(from + N);", "out of bounds"),
    "loads shifted back by a vector": ("chunk.cuh", "N>*>(from);", "N>*>(from - N);", "out of bounds"),
    "stores shifted by a vector": ("chunk.cuh", "N>*>(to) =", "N>*>(to + N) =", "out of bounds"),
    "every chunk is the first": ("chunk.cuh", "begin(t.chunks[2 * i + 1] * t.chunk)", "begin(0)", "race"),
    "a vector over the end": ("accumulate.cu", "size - size % kWidth : 0", "size : 0", "out of bounds"),
    "an element over the end": ("accumulate.cu", "threadIdx.x; i < size;", "threadIdx.x; i <= size;", "out of bounds"),
    "half a warp's mask": ("reduce.cuh", "kWarp = 0xffffffffu", "kWarp = 0x0000ffffu", "warp"),
}
# One of each sort; bench/ptx.py plants all.
SAMPLE = (
    "no fence before the ticket",
    "no barrier before shared sums are read",
    "the last block but one",
    "a barrier that some threads miss",
    "loads shifted by an element",
    "loads shifted by a vector",
    "a vector over the end",
    "half a warp's mask",
)


def kernel_lines(text, kernel):
    """Lines of a kernel's body: (first, last)."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if ".entry" in line and kernel in line)
    last = next(i for i in range(first, len(lines)) if lines[i] == "}")
    return first, last


def planted(text, kernel):
    """Every fault of one instruction of a kernel: (line, what, PTX text with it).

    Barriers and fences left out, atomics without their wrap, accesses shifted by their own size either way.
    """
    lines = text.splitlines()
    first, last = kernel_lines(text, kernel)
    for i in range(first, last):
        for what, line in _faults_of(lines[i]):
            yield i + 1, what, "\n".join([*lines[:i], line, *lines[i + 1 :]])


def _faults_of(line):
    if re.search(r"\bbar\.sync\b", line):
        yield "no barrier", ""
    elif re.search(r"\bmembar\.gl\b", line):
        yield "no fence", ""
    elif access := re.search(r"\b(ld|st)\.(?:global\.|shared\.|cg\.)*(?:(v[24])\.)?[busf](\d+)\b", line):
        size = int(access[3]) // 8 * int((access[2] or "v1")[1:])
        place = re.search(r"\[(%\w+)(?:\+(-?\d+))?\]", line)
        if place and ".param" not in line:
            for by in (size, -size):
                shifted = f"[{place[1]}+{int(place[2] or 0) + by}]"
                yield f"{access[0]} shifted by {by}", line[: place.start()] + shifted + line[place.end() :]
