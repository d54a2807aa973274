"""KEY=VALUE lists: what is read, and what is refused with the part that is wrong."""

import pytest

from pybatch.base.errors import UsageError
from pybatch.commands.assignments import parse_optimizer, parse_targets, parse_train_target


def test_targets():
    assert parse_targets("train=0.1, test=2e-1") == {"train": 0.1, "test": 0.2}
    assert parse_targets("0.3") == {"train": 0.3}
    assert parse_train_target("0.3") == parse_train_target("train=0.3") == 0.3
    for text in ("test=0.3", "train=0.3,test=0.3"):
        with pytest.raises(UsageError, match="branches go by the train loss"):
            parse_train_target(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sgd", ("sgd", {})),
        ("sgd:momentum=0.9,nesterov=True", ("sgd", {"momentum": 0.9, "nesterov": True})),
        ("adamw:betas=(0.9, 0.95),weight_decay=0", ("adamw", {"betas": (0.9, 0.95), "weight_decay": 0})),
    ],
)
def test_optimizers(text, found):
    assert parse_optimizer(text) == found


@pytest.mark.parametrize("text", ["train", "train=", "=0.1", "train=low", "train=0.1,", "train=0.1,train=0.2"])
def test_targets_that_are_refused(text):
    with pytest.raises(UsageError, match=r"target .*(Write|Give)"):
        parse_targets(text)


@pytest.mark.parametrize("loss", ["0", "-0.0", "-1", "nan", "inf", "1e999", "-1e999", "9" * 5000])
def test_losses_that_nothing_reaches_are_refused(loss):
    with pytest.raises(UsageError, match="finite and above 0") as refused:
        parse_targets(f"train={loss}")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [("sgd:", "KEY=VALUE"), ("sgd:momentum=os.system('x')", "not a number"), ("sgd:lr=0.1", "the sweep chooses")],
)
def test_optimizers_that_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_optimizer(text)
