"""Triton's kernels compiled for sm_90, which needs no GPU."""


def compile_kernel(kernel, arguments, warps=8, **constants):
    """What Triton makes of a kernel with these constants, as a launch would.

    Args:
        arguments: Triton's types of arguments that carry none in the kernel, by name; of others it is taken from there.
        warps: of a block.
    """
    from pybatch.kernels.table import LAUNCH
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        p.name: "constexpr" if p.name in constants else arguments.get(p.name) or p.annotation_type or "i32"
        for p in kernel.params
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=LAUNCH | {"num_warps": warps})
    assert made.asm["cubin"]
    return made
