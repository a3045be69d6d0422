"""Linear layers with their weights laid out: the same numbers, only where it may be, and nothing left behind."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from redistill.meters import Flops
from redistill.prepacked import linear_layers, prepacked

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Layers(nn.Module):
    def __init__(self, width=33, out=17, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(width, out, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(33,), (1, 33), (2, 5, 33), (0, 33), (130, 33)])
def test_the_same_numbers(shape, bias):
    model = Layers(bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted = (x.double() @ model.one.weight.double().T) + (model.one.bias.double() if bias else 0)
    with prepacked(model), torch.no_grad():
        found = model.one(x)
        across = model.one(x.movedim(0, -1).contiguous().movedim(-1, 0))
    for each in (found, across):
        torch.testing.assert_close(each.double(), wanted, rtol=1e-5, atol=1e-5)


def test_in_16_bits_by_dtype_and_by_autocast_as_linear_layers_compute():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU does not multiply bfloat16")
    x = torch.randn(4, 33)
    for model, autocast in ((Layers(dtype=torch.bfloat16), False), (Layers(), True)):
        given = x if autocast else x.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted = model.one(given)
            with prepacked(model):
                assert linear_layers(model) == []
                found = model.one(given)
        assert found.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_where_a_gradient_is_wanted_or_the_format_is_another_the_layer_is_itself():
    model, x = Layers(), torch.randn(4, 33)
    plain = model.one(x)
    with prepacked(model):
        # It would not follow: what was laid out stays.
        with torch.no_grad():
            model.one.weight.zero_()
        assert not torch.equal(model.one(x), plain), "with gradients, the weight as it is"
        model.one(x).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model.one(x), plain)
            with torch.autocast("cpu", torch.bfloat16):
                assert model.one(x).dtype == torch.bfloat16
    assert model.one.weight.grad is not None


def test_left_as_it_was_after_an_error_too_and_once_inside_another():
    model = tiny_llama()
    with pytest.raises(KeyError), prepacked(model):
        laid = [vars(each)["forward"] for each in model.modules() if "forward" in vars(each)]
        with prepacked(model):
            again = [vars(each)["forward"] for each in model.modules() if "forward" in vars(each)]
        assert laid == again != []
        raise KeyError
    assert not any("forward" in vars(each) for each in model.modules())


def test_only_plain_layers_with_their_whole_weight_on_a_cpu():
    class Other(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    class Ours(nn.Linear):
        """As FSDP2 makes one of its own."""

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 3),
            "ours": Ours(4, 3),
            "other": Other(4, 3),
            "meta": nn.Linear(4, 3, device="meta"),
            "fp64": nn.Linear(4, 3, dtype=torch.float64),
            "hooked": nn.Linear(4, 3),
            "partitioned": nn.Linear(4, 3),
        }
    )
    model["hooked"].forward = lambda _: 0
    model["partitioned"].weight.data = torch.empty(0)
    assert linear_layers(model) == [model["plain"], model["ours"]]


@pytest.mark.parametrize(
    "missing", ["_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"]
)
def test_a_torch_that_calls_the_operators_otherwise_computes_as_ever(monkeypatch, missing):
    names = {"_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"} - {missing}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**dict.fromkeys(names)))
    model, x, meter = Layers(), torch.ones(2, 33), Flops()
    with prepacked(model), torch.no_grad(), meter("product"):
        assert "forward" not in vars(model.one)
        torch.testing.assert_close(model.one(x), nn.functional.linear(x, model.one.weight, model.one.bias))
    assert meter.found == {"product": 2 * 2 * 33 * 17 * 2}


def test_its_products_count():
    model, meter = Layers(), Flops()
    with prepacked(model), torch.no_grad(), meter("product"):
        model.one(torch.ones(2, 5, 33))
    assert meter.found == {"product": 2 * 10 * 33 * 17}
