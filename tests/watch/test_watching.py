"""A training under observation: what is found, measured and told, and that it goes on to the bit as without."""

import copy
import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pybatch.optim
from pybatch.jobs.options import WatchOptions
from pybatch.jobs.watch import Enough, Watching
from pybatch.records import Ceilings
from pybatch.watch import replay

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Replays long enough to be right, not to be exact."""
    monkeypatch.setattr("pybatch.capacity.timing._QUANTUM_S", 0.01)
    monkeypatch.setattr(replay, "measure_ceilings", lambda *given: Ceilings(1e11, 1e10))


class Net(nn.Module):
    """With all that a step changes beside the parameters: buffers, random numbers, attributes."""

    def __init__(self, norm=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24) if norm else nn.Identity(), nn.ReLU())
        self.head = nn.Linear(24, 3)
        self.calls, self.seen = 0, []

    def forward(self, x, scale=1.0):
        self.calls += 1
        self.seen.append(len(x))
        return {"logits": self.head(nn.functional.dropout(self.body(x), 0.2, self.training)) * scale}


def batch(n=16):
    x = torch.randn(n, 12)
    return x, (x[:, 0] > 0).long()


def train(model, optimizer, steps, *, micro=1, n=16, schedule=None, scaler=None, clip=False, after=lambda step: None):
    """A loop as scripts have it."""
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            x, y = batch(n if step % 20 != 19 else n // 2)  # an epoch's last batch is smaller
            loss = nn.functional.cross_entropy(model(x)["logits"], y) / micro
            (scaler.scale(loss) if scaler else loss).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if schedule:
            schedule.step()
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                model(batch(40)[0])
            model.train()
        after(step)


def watched(work, **options):
    """The run of a training, and what was said."""
    said = []
    watching = Watching(WatchOptions(**{"time_budget": 0.3} | options), say=said.append)
    watching.start()
    try:
        work()
    except Enough:
        pass
    except BaseException:
        watching.finish(measure=False)
        raise
    run = watching.finish()
    assert watching.fault is None, watching.fault
    return run, said, watching


def everything(model, optimizer, schedule=None):
    """All that a training has, by name."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"state.{i}.{name}": value for name, value in state.items()}
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"group.{i}.{name}": value for name, value in group.items() if name != "params"}
    found |= {"calls": model.calls, "seen": list(model.seen), "rng": torch.get_rng_state(), "mode": model.training}
    return copy.deepcopy(found | ({"schedule": schedule.state_dict()} if schedule else {}))


def same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two[name]), name
        else:
            assert value == two[name], name


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True, foreach=True),
    "fused": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01), fused=True),
    "pybatch": lambda params: __import__("pybatch.optim").optim.AdamW(params, lr=0.01, max_grad_norm=1.0),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.001, centered=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_all_is_put_back_to_the_bit(kind):
    """A training that goes on after the watch ends as one that was never watched."""

    def run(watch):
        torch.manual_seed(3)
        model = Net()
        optimizer = OPTIMIZERS[kind](model.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        loop = {"schedule": schedule, "clip": kind == "sgd", "micro": 2 if kind == "amsgrad" else 1}
        states = []
        if watch:
            found, _, _ = watched(lambda: train(model, optimizer, 30, **loop))
            assert len([p for p in found.capacity.batches if p.status == "ok"]) >= 1
        else:
            train(model, optimizer, 30, **loop)
        states.append(everything(model, optimizer, schedule))
        train(model, optimizer, 5, **loop)
        return [*states, everything(model, optimizer, schedule)]

    for plain, seen in zip(run(False), run(True), strict=True):
        same(plain, seen)


def plain(norm=True, kind="adamw"):
    torch.manual_seed(0)
    model = Net(norm)
    return model, OPTIMIZERS[kind](model.parameters())


def test_what_is_found_and_measured():
    """The usual batch, not the smaller last one of an epoch; shares that add up; a fit around it; largest predicted."""
    model, optimizer = plain(norm=False)
    run, said, _ = watched(lambda: train(model, optimizer, 200), time_budget=6.0)
    training, noise = run.training, run.noise
    assert (training.model, training.optimizer, training.batch, training.steps) == ("Net", "AdamW", 16, 200)
    assert said == ["watching Net (387 parameters) with AdamW"]
    parts = (training.waiting, training.forward, training.backward, training.between, training.update)
    assert sum(parts) == pytest.approx(1.0, abs=0.02)
    assert all(part > 0 for part in parts)
    assert [p.batch for p in run.capacity.batches] == [4, 8, 16, 32, 64, 128, 256]
    assert all(p.status == "ok" for p in run.capacity.batches)
    assert run.capacity.workload.optimizer == "adamw"
    assert run.capacity.max_batch_verified in (False, None)
    assert (noise.source, noise.large_batch) == ("per-example", pytest.approx(16, rel=0.1))
    assert run.verdict.critical_source == "noise"
    assert run.complete


def test_evaluations_and_small_batches_are_not_in_a_steps_time():
    model, optimizer = plain(norm=False)

    def slow(step):
        if step % 10 == 9:
            time.sleep(0.02)  # beside the evaluation pass

    run, _, watching = watched(lambda: train(model, optimizer, 100, after=slow))
    assert run.training.waiting < 0.5
    usual = watching._observer.steps.usual
    assert {step.sizes for step in usual} == {(16,)}
    assert len(usual) < 90


SOURCES = {
    "per-example": {"norm": False},
    "adam-moments": {},  # batch normalization has no gradient of one example
    "micro-batches": {"micro": 2},
}


@pytest.mark.parametrize("source", SOURCES)
def test_noise_by_what_the_run_offers(source):
    how = dict(SOURCES[source])
    model, optimizer = plain(how.pop("norm", True))
    run, _, _ = watched(lambda: train(model, optimizer, 400 if source == "adam-moments" else 120, **how))
    assert run.noise.source == source
    assert run.noise.steps >= 8
    assert run.training.accumulation == how.get("micro", 1)
    assert run.training.batch == 16 * how.get("micro", 1)


def test_no_source_is_said_with_the_remedy():
    model, optimizer = plain(kind="sgd")
    run, _, _ = watched(lambda: train(model, optimizer, 40))
    assert run.noise is None
    (note,) = [note.text for note in run.notes if note.figure == "noise"]
    assert "batch statistics" in note
    assert "gradient accumulation" in note


def test_gradscaler_and_clipping():
    model, optimizer = plain()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run, _, _ = watched(lambda: train(model, optimizer, 60, micro=2, scaler=scaler))
    assert run.training.wrapped == ("GradScaler",)
    assert run.noise.source == "micro-batches"
    assert run.noise.grad_sq < 100  # unscaled
    model, optimizer = plain(kind="sgd")
    run, _, _ = watched(lambda: train(model, optimizer, 30, clip=True))
    assert run.training.wrapped == ("gradient clipping",)


def test_steps_end_the_script_by_an_exit_that_it_sees():
    model, optimizer = plain()
    seen = []

    def script():
        try:
            train(model, optimizer, 1000)
        except SystemExit as stop:
            seen.append((stop.code, len(model.seen)))
            raise

    run, _, _ = watched(script, steps=25)
    assert seen == [(0, 25 + 2)]  # two evaluations
    assert run.training.steps == 25


def test_largest_model_of_several_or_the_one_asked_for():
    """A GAN's critic steps three times before its larger generator does."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(8, 64), nn.Linear(64, 1)

    def script():
        first, second = (torch.optim.Adam(m.parameters()) for m in (critic, generator))
        for step in range(80):
            optimizer = second if step % 4 == 3 else first
            optimizer.zero_grad()
            critic(generator(torch.randn(12, 8))).mean().backward()
            optimizer.step()

    run, said, _ = watched(script)
    assert run.training.batch == 12
    assert (
        "watching Linear (576 parameters) with Adam, optimizer 1 of 2; --optimizer-index takes another: 0" in said[-1]
    )
    run, said, _ = watched(script, index=0)
    assert "(65 parameters)" in said[-1]
    run, _, watching = watched(script, index=2)
    assert run is None
    assert "--optimizer-index 2: 2 optimizers stepped" in watching.problem


def test_closures():
    """Of one evaluation, as Lightning has them, a step can be run again; LBFGS evaluates several times."""
    model, optimizer = plain(norm=False)

    def steps(optimizer, count):
        for _ in range(count):
            x, y = batch()

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x)["logits"], y)
                loss.backward()
                return loss

            optimizer.step(closure)

    run, _, _ = watched(lambda: steps(optimizer, 40))
    assert len(run.capacity.batches) == 7
    assert run.training.batch == 16
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    run, _, _ = watched(lambda: steps(optimizer, 20))
    assert [p.batch for p in run.capacity.batches] == [run.training.batch]
    assert any("LBFGS.step(closure) evaluates the model several times" in n.text for n in run.capacity.notes)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x):
        return self.layer(x)


def steps_of(model, optimizer, forward, count=30):
    for _ in range(count):
        optimizer.zero_grad()
        forward(model).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_jit():
    model = torch.jit.script(Scripted())
    optimizer = torch.optim.Adam(model.parameters())
    run, _, _ = watched(lambda: steps_of(model, optimizer, lambda m: m(torch.randn(16, 12))))
    assert run.training.wrapped == ("torch.jit",)
    assert len(run.capacity.batches) == 7
    assert run.noise.source == "halves"  # neither single examples nor hooks on its own passes
    assert run.noise.steps == 3  # 1 in 10


@pytest.mark.parametrize("clear", ["before", "between", "zeros"])
def test_updates_by_hand(clear):
    """As PyTorch's language-model example has them: p.data.add_(p.grad, alpha=-lr)."""
    model = Net(norm=False)

    def script():
        for _ in range(60):
            if clear != "between":
                model.zero_grad(set_to_none=clear == "before")
            loss = nn.functional.cross_entropy(model(batch()[0])["logits"], torch.randint(3, (16,)))
            if clear == "between":
                model.zero_grad()
            loss.backward()
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-0.01)

    run, said, _ = watched(script)
    assert said == ["watching Net (387 parameters) with updates of the script's own"]
    assert (run.training.batch, run.training.accumulation, run.training.optimizer) == (16, 1, "by hand")
    assert 45 <= run.training.steps <= 60
    assert any("by hand" in note.text for note in run.capacity.notes)


class Graph(nn.Module):
    """Of nodes and edges, whose numbers do not go together."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, nodes, edges):
        return self.layer(nodes)[edges[0]] - self.layer(nodes)[edges[1]]


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(160, 1)

    def forward(self, x):
        return self.layer(x.reshape(1, 160))


class Drawn(Scripted):
    """That draws its batch itself."""

    def forward(self):
        return self.layer(torch.randn(16, 12))


REFUSED = {
    "shape baked in": (Fixed, lambda m: m(torch.randn(16, 10)), "shape '[1, 160]' is invalid"),
    "output that does not follow": (Graph, lambda m: m(torch.randn(16, 4), torch.randint(4, (2, 30))), "same shape"),
    "no tensor": (Drawn, lambda m: m(), "no forward pass with a tensor"),
}


class Words(nn.Module):
    """As word_language_model: tokens [length, batch] and a hidden state."""

    def __init__(self):
        super().__init__()
        self.embedding, self.recurrent, self.head = nn.Embedding(9, 4), nn.LSTM(4, 8), nn.Linear(8, 9)

    def forward(self, tokens, hidden):
        out, hidden = self.recurrent(self.embedding(tokens), hidden)
        return self.head(out), hidden


def test_tokens_as_long_as_the_batch_is_large_are_replayed_along_the_batch():
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def work():
        hidden = (torch.zeros(1, 8, 8), torch.zeros(1, 8, 8))
        for _ in range(12):
            tokens = torch.randint(9, (8, 8))
            optimizer.zero_grad()
            out, hidden = model(tokens, tuple(h.detach() for h in hidden))
            nn.functional.cross_entropy(out.flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()

    run, _, _ = watched(work, time_budget=3.0)
    assert len([p.batch for p in run.capacity.batches if p.status == "ok"]) > 1
    assert all(p.reason is None or "time budget" in p.reason for p in run.capacity.batches)


@pytest.mark.parametrize("what", REFUSED)
def test_inputs_that_cannot_be_resized(what):
    """Throughput at the batch of the script alone, and the reason."""
    kind, forward, reason = REFUSED[what]
    model = kind()
    run, _, _ = watched(lambda: steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), forward))
    assert sum(p.status == "ok" for p in run.capacity.batches) <= 1
    assert any(
        reason in str(text)
        for text in [*(n.text for n in run.capacity.notes), *(p.reason for p in run.capacity.batches)]
    )
    assert run.verdict.best_batch is None


@pytest.mark.parametrize(("noise", "counted"), [(True, 32), (True, 320), (False, 32)])
def test_gradients_that_the_optimizer_takes_away_are_no_cleared_ones(noise, counted):
    """`accumulate()` leaves `.grad` None after every pass; what it measures itself is the noise scale of the run."""
    torch.manual_seed(0)
    model = Scripted()
    optimizer = pybatch.optim.AdamW(model.parameters(), lr=0.01, noise=noise)

    def script():
        for _ in range(60):
            for _ in range(4):
                x, y = batch(32)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.accumulate(counted)
            optimizer.step()
            optimizer.zero_grad()

    run, _, watching = watched(script, time_budget=0.1)
    assert (run.training.batch, run.training.micro_batch, run.training.accumulation) == (128, 32, 4)
    timed = watching._observer.steps.usual
    assert {step.sizes for step in timed} == {(32,) * 4}
    if noise:
        assert run.noise.b_simple == pytest.approx(optimizer.noise.b_simple * 32 / counted)  # in examples
        assert run.noise.large_batch == pytest.approx(128)
        assert run.noise.status == "resolved"
        assert run.noise.steps >= 30  # the newest stretch of 60
    else:
        assert run.noise is None
        assert any("noise=True" in note.text for note in run.notes if note.figure == "noise")


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize("kind", [Output, lambda loss, logits: SimpleNamespace(parts=Output(loss, logits)), tuple])
def test_outputs_in_objects_are_seen(kind):
    """As a Hugging Face model gives them, in a class of the script's own."""

    class Lossy(Net):
        def forward(self, x, y):
            logits = super().forward(x)["logits"]
            loss = nn.functional.cross_entropy(logits, y)
            return kind((loss, logits)) if kind is tuple else kind(loss, logits)

    model = Lossy(norm=False)
    optimizer = torch.optim.AdamW(model.parameters())

    def script():
        for _ in range(10):
            output = model(*batch())
            output = getattr(output, "parts", output)
            (output[0] if kind is tuple else output.loss).backward()
            optimizer.step()
            optimizer.zero_grad()

    run, _, _ = watched(script, time_budget=0.2)
    assert run.training.batch == 16
    assert len(run.capacity.batches) == 7  # replayed: a busy machine leaves some no time, but none is refused
    assert all("time budget" in (p.reason or "time budget") for p in run.capacity.batches)


def test_trainings_one_after_another_are_told():
    """The first of those of one size is watched."""

    def script():
        for _ in range(3):
            train(*plain(norm=False, kind="sgd"), 6)

    run, _, _ = watched(script, time_budget=0.01)
    assert run.training.steps == 6
    note = next(n.text for n in run.training.notes if n.figure == "training.optimizer")
    assert note.startswith("number 0 of the 3 that stepped")


@pytest.mark.parametrize(("micro", "clip"), [(6, False), (6, True), (4, False), (1, True)])
def test_gradients_that_add_up_are_not_clipped_ones(micro, clip):
    model, optimizer = plain(norm=False, kind="sgd")
    run, _, _ = watched(lambda: train(model, optimizer, 8, micro=micro, clip=clip), time_budget=0.01)
    assert ("gradient clipping" in run.training.wrapped) == clip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_gradients_scaled_through_data_are_clipped_ones(factor, scaled):
    """They keep their version."""
    model, optimizer = plain(norm=False, kind="sgd")
    scaler = torch.amp.GradScaler("cpu") if scaled else None

    def script():
        for _ in range(8):
            optimizer.zero_grad()
            x, y = batch()
            loss = nn.functional.cross_entropy(model(x)["logits"], y)
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(optimizer)
            for p in model.parameters():
                p.grad.data.mul_(factor)
            scaler.step(optimizer) if scaler else optimizer.step()
            scaler.update() if scaler else None

    run, _, _ = watched(script, time_budget=0.01)
    assert ("gradient clipping" in run.training.wrapped) == (factor != 1.0)


def test_a_script_that_ends_with_an_evaluation_is_replayed_as_it_trained():
    """Each layer in its own mode of the pass, a frozen one's too, and all as the script left it afterwards."""
    model, optimizer = plain()
    seen = []
    model.body[1].register_forward_pre_hook(
        lambda norm, args: seen.append((model.training, norm.training, model.head.weight.requires_grad))
    )

    def script():
        model.train()
        model.body[1].eval()
        for _ in range(12):
            x, y = batch()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x)["logits"], y).backward()
            optimizer.step()
        model.eval()
        model.requires_grad_(False)
        seen.clear()

    run, _, _ = watched(script, time_budget=0.1)
    assert any(p.status == "ok" for p in run.capacity.batches)
    assert set(seen) == {(True, False, True)}
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("passes", "parts", "cleared"), [(16, 2, False), (40, 1, False), (12, 2, True)])
def test_many_passes_before_the_first_step_are_no_updates_by_hand(passes, parts, cleared):
    """Also where gradients are moved away after each pass, so that steps by hand seemed to be made."""
    model = Net(norm=False)
    given = [list(model.body.parameters()), list(model.head.parameters())] if parts == 2 else [list(model.parameters())]
    optimizers = [torch.optim.SGD(params, lr=0.1) for params in given]

    def script():
        for _ in range(8):
            sums = [torch.zeros_like(p) for p in model.parameters()]
            for _ in range(passes):
                x, y = batch()
                (nn.functional.cross_entropy(model(x)["logits"], y) / passes).backward()
                for p, total in zip(model.parameters(), sums, strict=True):
                    if cleared:
                        total += p.grad
                        p.grad = None
            for p, total in zip(model.parameters(), sums, strict=True):
                p.grad = total if cleared else p.grad
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    run, said, watching = watched(script, time_budget=0.05)
    assert run.training.optimizer == "SGD"
    assert run.training.steps == 8
    assert watching._observer.hand is None
    assert len(watching._observer.optimizers) == parts
    assert "ByHand" not in " ".join(said)
    if not cleared:
        assert (run.training.batch, run.training.accumulation) == (16 * passes, passes)
    if parts == 2:
        assert "SGD, optimizer 0 of 2; --optimizer-index takes another: 1 SGD" in said[-1]


def test_the_own_batch_is_timed_first_where_time_is_short(monkeypatch):
    """And that the time budget ended is said, with the remedy."""
    monkeypatch.setattr(replay, "_LOOKS", 0.0)
    monkeypatch.setattr("pybatch.capacity.timing._QUANTUM_S", 0.2)
    model, optimizer = plain(norm=False)
    run, _, _ = watched(lambda: train(model, optimizer, 30), time_budget=0.5)
    assert [p.batch for p in run.capacity.batches if p.step_ms is not None] == [16]
    assert any(
        "time budget of 0.5 s ended" in note.text and "--time-budget" in note.text for note in run.capacity.notes
    )


@pytest.mark.parametrize(("micro", "source"), [(1, "per-example"), (2, "micro-batches")])
def test_a_training_that_is_known_to_be_short_is_measured_oftener(micro, source):
    """One step of ten would leave three pairs, of which there is no interval."""
    model = Net(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run, _, _ = watched(lambda: train(model, optimizer, 1000, micro=micro), steps=40)
    assert run.training.steps == 40
    assert run.noise.source == source
    assert run.noise.steps >= 16
    assert "too few" not in " ".join(note.text for note in run.noise.notes)


class Outputs(nn.Module):
    """Gives what its head is fed with beside what that makes of it, as models of others' do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.body(x)[0][:, -1]
        return hidden, self.head(hidden)


def of_head(hidden, scores, y):
    nn.functional.cross_entropy(scores, y).backward()


def of_both(hidden, scores, y):
    (nn.functional.cross_entropy(scores, y) + hidden.square().mean()).backward()


def one_by_one(hidden, scores, y):
    nn.functional.cross_entropy(scores, y).backward(retain_graph=True)
    hidden.square().mean().backward()


@pytest.mark.parametrize(
    ("backward", "kind", "source", "reason"),
    [
        (of_head, "sgd", "halves", None),
        (of_both, "sgd", None, "or comes from another output that this one is made of"),
        (one_by_one, "sgd", None, "several backward passes of one forward pass (retain_graph=True)"),
        (one_by_one, "adam", "adam-moments", None),
    ],
)
def test_an_output_made_of_another_and_several_backward_passes(backward, kind, source, reason):
    """Which of them have a noise scale, by what, and why the others have none."""
    torch.manual_seed(0)
    model = Outputs()
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](model.parameters(), lr=0.01)

    def script():
        for _ in range(130):
            optimizer.zero_grad()
            x, y = torch.randn(16, 5, 12), torch.randint(3, (16,))
            backward(*model(x), y)
            optimizer.step()

    run, _, _ = watched(script)
    assert (run.noise.source if run.noise is not None else None) == source
    said = " ".join(note.text for note in run.notes)
    assert reason is None or reason in said
    assert "gradients come to several outputs" not in said


class Parts(nn.Module):
    """Its outputs are those of one node of the graph, or of several."""

    def __init__(self, part):
        super().__init__()
        self.body, self.head, self.part = nn.GRU(12, 8, batch_first=True), nn.Linear(8, 6), part

    def forward(self, x):
        return self.part(self.head(self.body(x)[0][:, -1]))


def halved(scores):
    return scores.chunk(2, 1)


def narrowed(scores):
    return scores[:, :3], scores[:, 3:]


def both(first, second):
    return first.square().mean() + (second - 1).square().mean()


def of_one(first, second):
    return (second - 1).square().mean()


@pytest.mark.parametrize("part", [halved, narrowed])
@pytest.mark.parametrize("loss", [both, of_one])
def test_outputs_of_one_node_are_several(part, loss):
    """Where the loss is of one of them torch calls hooks of the other with None, in the script's backward pass."""
    torch.manual_seed(0)
    model = Parts(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def script():
        for _ in range(130):
            optimizer.zero_grad()
            loss(*model(torch.randn(16, 5, 12))).backward()
            optimizer.step()

    run, _, watching = watched(script)
    said = " ".join(note.text for note in run.notes)
    assert "do not add up" not in said
    assert ("gradients come to several outputs" in said) == (loss is both)
    assert (run.noise.source if run.noise is not None else None) == (None if loss is both else "halves")
    assert watching._observer.kept.gradients.keys() == ({0, 1} if loss is both else {1})


def penalized(model, x, y, *, after):
    """A loss with a penalty on gradients at the input, or those asked for after the backward pass."""
    x.requires_grad_()
    scores = model(x)["logits"]
    loss = nn.functional.cross_entropy(scores, y)
    if after:
        loss.backward(retain_graph=True)
        torch.autograd.grad(scores.sum(), x)
    else:
        given = torch.autograd.grad(scores.sum(), x, create_graph=True)
        (loss + given[0].square().mean()).backward()


@pytest.mark.parametrize(
    ("micro", "after", "source", "reason"),
    [
        (4, False, "micro-batches", None),
        (4, True, "micro-batches", None),
        (1, True, "per-example", None),
        (1, False, None, "torch.autograd.grad() goes through a forward pass before its backward pass does"),
    ],
)
def test_a_penalty_on_gradients_gives_no_part_of_the_steps(micro, after, source, reason):
    """`torch.autograd.grad` leaves `.grad` alone: what a backward pass of the same forward pass gives is the whole."""
    torch.manual_seed(0)
    model = Net(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def script():
        for step in range(160):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for _ in range(micro):
                penalized(model, *batch(), after=after)
            optimizer.step()

    run, _, _ = watched(script)
    said = " ".join(note.text for note in run.notes)
    assert (run.noise.source if run.noise is not None else None) == source, said
    assert "each gives a part of its gradient" not in said
    assert reason is None or reason in said
    assert run.training.accumulation == micro


@pytest.mark.parametrize("micro", [1, 4])
def test_a_penalty_before_two_backward_passes_hides_neither(micro):
    torch.manual_seed(0)
    model = Net(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def script():
        for _ in range(60):
            optimizer.zero_grad()
            for _ in range(micro):
                x, y = batch()
                scores = model(x.requires_grad_())["logits"]
                torch.autograd.grad(scores.sum(), x, retain_graph=True)
                nn.functional.cross_entropy(scores, y).backward(retain_graph=True)
                scores.square().mean().backward()
            optimizer.step()

    run, _, _ = watched(script)
    assert run.noise is None
    assert any("each gives a part of its gradient" in note.text for note in run.notes)


def test_one_backward_pass_of_two_is_not_taken_for_the_step():
    """Gradients of single examples would be those of the first loss alone."""
    model = Net(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def script():
        for _ in range(60):
            optimizer.zero_grad()
            x, y = batch()
            scores = model(x)["logits"]
            nn.functional.cross_entropy(scores, y).backward(retain_graph=True)
            scores.square().mean().backward()
            optimizer.step()

    run, _, _ = watched(script)
    assert run.noise is None
    assert any("each gives a part of its gradient" in note.text for note in run.notes)


def test_the_record_has_the_scripts_own_threads_and_its_highest_rate():
    """What it sets after the watch began; a schedule of its own ends where it is no rate to train with."""
    model, optimizer = plain(norm=False)
    torch.set_num_threads(2)  # put back by `one_thread`

    def script():
        torch.set_num_threads(1)

        def schedule(step):
            optimizer.param_groups[0]["lr"] = 0.01 * min(step, 39 - step) / 20

        train(model, optimizer, 40, after=schedule)

    run, _, _ = watched(script)
    assert run.environment.threads == 1
    assert run.capacity.workload.learning_rate == pytest.approx(0.0095)
