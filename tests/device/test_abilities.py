"""What this processor refuses is known before anything is measured, and said with cause and remedy."""

import pytest
import torch
from torch import nn

from pybatch.base.errors import DeviceError
from pybatch.device import abilities
from pybatch.device.abilities import refusal, refused_layer
from pybatch.workloads.running.session import Session
from pybatch.workloads.text import Text

CPU = torch.device("cpu")
LAYERS = (nn.LSTM, nn.GRU, nn.RNN)


@pytest.mark.isa
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_found_for_a_small_layer_holds_for_a_larger_one(layer, dtype):
    """Two layers of another width on another batch are refused where the probe was, in the same words, or train."""
    model, inputs = layer(24, 40, num_layers=2, batch_first=True), torch.randn(5, 7, 24)
    with torch.autocast("cpu", dtype):
        if (why := refusal(layer, dtype)) is None:
            model(inputs)[0].float().sum().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
        else:
            with pytest.raises(RuntimeError, match=why):
                model(inputs)


@pytest.mark.isa
def test_a_workload_in_bf16_trains_or_is_refused_at_once():
    if (why := refusal(nn.LSTM, torch.bfloat16)) is None:
        session = Session(Text("lstm"), CPU, "bf16")
        assert session.backward(session.batch(4)).isfinite()
    else:
        with pytest.raises(DeviceError, match=why):
            Session(Text("lstm"), CPU, "bf16")


@pytest.fixture
def refusing(monkeypatch):
    """A processor without a 16-bit LSTM."""
    monkeypatch.setattr(abilities, "refusal", lambda layer, dtype: "no primitive" if layer is nn.LSTM else None)


def test_the_layer_is_found_wherever_it_is(refusing):
    hidden = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"body": nn.LSTM(2, 2)}))
    assert refused_layer(hidden, torch.bfloat16) == ("LSTM", "no primitive")
    assert refused_layer(nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2)), torch.bfloat16) is None


def test_a_refusal_names_processor_operation_and_remedy(refusing):
    with pytest.raises(DeviceError, match=r"LSTM.* in bf16 on this processor \(.+\): no primitive\. Take --dtype fp32"):
        Session(Text("lstm"), CPU, "bf16")
    for allowed in (Session(Text("lstm"), CPU, "fp32"), Session(Text("transformer"), CPU, "bf16")):
        assert allowed.backward(allowed.batch(2)).isfinite()


def test_asking_leaves_the_random_numbers_alone():
    refusal.cache_clear()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    refusal(nn.GRU, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), before)
