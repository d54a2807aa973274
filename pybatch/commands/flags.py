"""The flags that several commands share, as annotated types. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Workload = Annotated[
    str, typer.Option(help="One of 'pybatch list', or your own, FILE.py:NAME: a class, or a workload.")
]
Model = Annotated[str | None, typer.Option(help="One of the workload's models.")]
Data = Annotated[str | None, typer.Option(help="The workload's data, where it takes a file or folder.")]
Dials = Annotated[
    list[str] | None,
    typer.Option("--option", help="A dial of the workload as KEY=VALUE, see 'pybatch list'; any number of them."),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="tiny or base: GPT-2 124M (text), ResNet-50 (images), a five-level U-Net (scenes). Default: tiny, on a "
        "GPU too: a run ends in time and compares with a CPU's."
    ),
]
Gpu = Annotated[int | None, typer.Option(help="Measure on this GPU. Default: GPU 0 if there is one.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Measure on the CPU.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast over fp32 parameters).")]
Seed = Annotated[int, typer.Option(help="Of the model, the data order and the resampling.")]
Format = Annotated[
    str | None, typer.Option("--format", help="table, md, json, jsonl or csv. Default: table; with -o, by its ending.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the result here; the table is still printed.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every note, not only those that change the answer.")]
Price = Annotated[
    float | None, typer.Option(help="Of a device-hour, in any currency: what training costs is told in it as well.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
