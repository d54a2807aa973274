"""Shapes of the parameters that the step benchmarks run over, computed from the architectures."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """ResNet-50 (He et al. 2016) with 1000 classes, as in torchvision: 161 tensors, 25.6 M parameters."""

    def conv(out: int, into: int, size: int) -> Shapes:
        return [(out, into, size, size), (out,), (out,)]  # with the weight and bias of its batch normalization

    shapes = conv(64, 3, 7)
    width = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(inner, width, 1) + conv(inner, inner, 3) + conv(4 * inner, inner, 1)
            if block == 0:
                shapes += conv(4 * inner, width, 1)  # the shortcut that changes the width
            width = 4 * inner
    return [*shapes, (1000, width), (1000,)]


def gpt2(layers: int = 12, width: int = 768, words: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2 small (Radford et al. 2019), head tied to the embedding: 148 tensors, 124.4 M parameters."""
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp: Shapes = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(words, width), (context, width), *(norm + attention + norm + mlp) * layers, *norm]


SHAPES: dict[str, Shapes] = {
    "one tensor of 32 M": [(32 << 20,)],
    "1000 tensors of 64x64": [(64, 64)] * 1000,
    "1000 tensors of 100x100": [(100, 100)] * 1000,
    "ResNet-50": resnet50(),
    "GPT-2 124M": gpt2(),
}
