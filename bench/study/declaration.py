"""What the study measures: problems, learning-rate rules, batch sizes, seeds and targets, part by part.

A part is a list of commands of pybatch, each of which writes one record: `python bench/study/run.py --list`.
Parts are meant for two cores and at most 60 minutes each, `quick` for 15; bench/results/NOTES-sweep.md has what is
known of the time they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

JUDGE = 3000  # first seed of the runs that judge an advice; those that advise count from 0
JUDGED_BY = "adamw"  # of `bench`'s own training: its advice is judged on sweeps with the same optimizer
ALONG = 2  # trainings along which the noise scale is read
GAP_EPOCHS = 25  # after which test losses are compared


@dataclass(frozen=True)
class Problem:
    """What is trained."""

    name: str  # of its records
    workload: str
    model: str
    options: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        dials = [word for option in self.options for word in ("--option", option)]
        return ["--workload", self.workload, "--model", self.model, *dials, "--cpu"]


@dataclass(frozen=True)
class Record:
    """One record: of which part, problem and kind, and the command that makes it."""

    part: str
    problem: Problem
    kind: str  # "sweep", "own", "judge", "times-0", "bench", "thorough", "advice", "sgd", "muon", "along-0"
    flags: tuple[str, ...]  # past those of the problem

    @property
    def path(self) -> str:
        """Below the folder of the study's records."""
        return f"{self.part}/{self.problem.name}-{self.kind}.json"


def sweep(
    part: str,
    problem: Problem,
    kind: str,
    batches: str,
    rules: str,
    seeds: int,
    *,
    target: str | None = None,
    optimizer: str | None = None,
    first_seed: int = 0,
    noise_s: int = 0,
    gap: bool = False,
    most: int | None = None,
) -> Record:
    """Steps to target; by default the workload's targets and the optimizer that it is swept by."""
    flags = ["--batch", batches, "--rule", rules, "--seeds", str(seeds), "--noise-budget", str(noise_s)]
    flags += ["--target", target] if target is not None else []
    flags += ["--optimizer", optimizer] if optimizer is not None else []
    flags += ["--seed", str(first_seed)] if first_seed else []
    flags += ["--gap-epochs", str(GAP_EPOCHS)] if gap else []
    flags += ["--max-steps", str(most)] if most is not None else []
    return Record(part, problem, kind, tuple(flags))


def advised(
    part: str,
    problem: Problem,
    batches: str,
    seeds: int,
    *,
    timings: int = 3,
    timing_s: int = 40,
    thorough: bool = True,
) -> Iterator[Record]:
    """What pybatch advises by a bench, a thorough one and a sweep, and the sweep of other seeds that judges it.

    Args:
        part, problem: of the records.
        batches, seeds: of both sweeps.
        timings: runs that time the judge's steps: what a disturbed machine does to one shows in the others.
        timing_s: seconds of each.
        thorough: whether `bench --thorough` advises too.
    """
    target = TRAIN[problem.workload]
    yield sweep(part, problem, "own", batches, "tuned", seeds, optimizer=JUDGED_BY, target=target)
    yield sweep(part, problem, "judge", batches, "tuned", seeds, optimizer=JUDGED_BY, target=target, first_seed=JUDGE)
    for place in range(timings):
        yield Record(part, problem, f"times-{place}", ("--batch", batches, "--time-budget", str(timing_s)))
    yield Record(part, problem, "bench", ())
    if thorough:
        yield Record(part, problem, "thorough", ("--thorough",))
    yield Record(part, problem, "advice", ())  # of `bench` and `own` together
    for seed in range(ALONG):  # the noise scale along a training at about the critical batch of `own`
        yield Record(part, problem, f"along-{seed}", (str(seed),))


MLP = Problem("digits-mlp", "digits", "mlp")
CNN = Problem("digits-cnn", "digits", "cnn")
LSTM = Problem("text-lstm", "text", "lstm")
TRANSFORMER = Problem("text-transformer", "text", "transformer")
UNET = Problem("scenes-unet", "scenes", "unet")
DILATED = Problem("scenes-dilated", "scenes", "dilated")
DOMAINS = {"digits": (MLP, CNN), "text": (LSTM, TRANSFORMER), "scenes": (UNET, DILATED)}

RULES = "constant,linear,sqrt,tuned"
# By domain: batch sizes of the whole study and of the quick one.
BATCHES = {"digits": "2-2048*2", "text": "2-512*2", "scenes": "2-512*2"}
QUICK = {"digits": "8-2048*4", "text": "8-128*2", "scenes": "8-128*2"}
SEEDS, QUICK_SEEDS = 3, 2
# Steps of a run under the rules, above the medians of the smallest batch: a larger one that takes more has failed.
MOST = {"digits": 18_000, "text": 1500, "scenes": 1500}  # the first: GAP_EPOCHS of the smallest batch
QUICK_MOST = {"text": 600, "scenes": 1300}
TRAIN = {"digits": "train=0.1", "text": "train=2.45", "scenes": "train=0.3"}  # the workloads' own

# Architecture x data complexity x data size. One target for all of them: a train loss that wrong labels leave in
# reach, ln of the right class given 1 in 20 wrong being 0.31.
FACTORS = {"model": ("mlp", "cnn"), "label_noise": ("0", "0.05"), "subset": ("0.25", "1")}
FACTOR_TARGET = "train=0.5"


def factorial() -> Iterator[Record]:
    for model, noise, subset in product(*FACTORS.values()):
        problem = Problem(
            f"digits-{model}-{noise}-{subset}", "digits", model, (f"label_noise={noise}", f"subset={subset}")
        )
        yield sweep("factorial", problem, "sweep", BATCHES["digits"], "tuned", SEEDS, target=FACTOR_TARGET)


def whole(domain: str) -> Iterator[Record]:
    """The rules, on both architectures of a domain."""
    for problem in DOMAINS[domain]:
        gap, most = domain == "digits", MOST.get(domain)
        yield sweep(domain, problem, "sweep", BATCHES[domain], RULES, SEEDS, noise_s=10, gap=gap, most=most)


def advice(domain: str) -> Iterator[Record]:
    for problem in DOMAINS[domain]:
        yield from advised(f"{domain}-advice", problem, BATCHES[domain], SEEDS)


def optimizers() -> Iterator[Record]:
    """SGD, AdamW and Muon on one architecture a domain; AdamW's sweep is `own` of the advice."""
    for domain, (problem, _) in DOMAINS.items():
        for name in ("sgd", "muon"):
            batches, target = BATCHES[domain], TRAIN[domain]
            yield sweep("optimizers", problem, name, batches, "tuned", SEEDS, optimizer=name, target=target)


def quick() -> Iterator[Record]:
    """One architecture a domain, two rules, five batch sizes, two seeds."""
    for domain, (problem, _) in DOMAINS.items():
        most = QUICK_MOST.get(domain)
        yield sweep("quick", problem, "sweep", QUICK[domain], "linear,tuned", QUICK_SEEDS, noise_s=5, most=most)
        yield from advised("quick", problem, QUICK[domain], QUICK_SEEDS, timings=1, timing_s=20, thorough=False)


PARTS: dict[str, tuple[Record, ...]] = {
    "quick": tuple(quick()),
    "factorial": tuple(factorial()),
    **{domain: tuple(whole(domain)) for domain in DOMAINS},
    **{f"{domain}-advice": tuple(advice(domain)) for domain in DOMAINS},
    "optimizers": tuple(optimizers()),
}
