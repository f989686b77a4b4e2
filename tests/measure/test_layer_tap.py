"""LayerTap: the outputs that a model itself made, by name, in the order of execution."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure.layer_tap import LayerTap, layers_of
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.nn.resnet import ResNet
from mlcollage.nn.vit import ViT


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Twice(nn.Module):
    """Registers its layers in another order than it calls them, and calls one of them twice."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.act = nn.ReLU()
        self.first = nn.Linear(3, 4)
        self.middle = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.act(self.middle(self.act(self.first(x)))))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (MLP((1, 6, 6), 3, (5, 4)), (2, 1, 6, 6)),
        (ResNet((1, 8, 8), 3, blocks=(1, 1), width=4, norm="group"), (2, 1, 8, 8)),
        (ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=2, heads=2), (2, 1, 8, 8)),
    ],
    ids=["mlp", "resnet", "vit"],
)
def test_it_agrees_with_what_networks_report_of_themselves(model, shape):
    _, own = model(rand(*shape), activations=True)
    paths = [name for name in own if name in dict(model.named_modules())]
    assert len(paths) > 3
    with LayerTap(model, paths) as tap:
        model(rand(*shape))
    assert list(tap) == [name for name in own if name in paths]
    for name in paths:
        assert torch.equal(tap[name], own[name].detach())


def test_order_is_that_of_execution_and_each_call_counts():
    model = Twice()
    with LayerTap(model) as tap:
        out = model(rand(5, 3))
    assert list(tap) == ["first", "act", "middle", "act#1", "last"]
    assert torch.equal(tap["last"], out)
    assert torch.equal(tap["act#1"], tap["middle"].relu())


def test_selection_by_pattern_type_list_and_relu():
    model = ResNet((1, 8, 8), 3, blocks=(1, 1), width=4, norm="group")
    assert list(layers_of(model, "block*.relu2")) == ["block1.relu2", "block2.relu2"]
    assert set(layers_of(model, nn.Conv2d)) == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert list(layers_of(model, ["head", "stem"])) == ["stem", "head"]
    assert list(layers_of(model, [nn.Linear, "pool"])) == ["pool", "head"]
    assert all(isinstance(m, nn.ReLU) for m in layers_of(model, "relu").values())
    assert len(layers_of(model, "relu")) == 5
    assert all(not list(m.children()) for m in layers_of(model).values())


def test_nothing_is_copied_and_the_next_pass_replaces_the_last():
    model = Twice()
    with LayerTap(model, "last") as tap:
        out = model(rand(5, 3))
        assert tap["last"].data_ptr() == out.data_ptr()
        model(rand(7, 3))
        assert tap["last"].shape == (7, 2)
        tap.clear()
        assert len(tap) == 0


def test_hooks_are_removed_also_after_an_error():
    model = Twice()
    with pytest.raises(RuntimeError), LayerTap(model):
        model(rand(5, 99))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    tap = LayerTap(model).open().open()
    tap.close()
    model(rand(5, 3))
    assert len(tap) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_overwritten_output_is_refused_and_copies_and_reductions_are_right():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    x = rand(5, 3)
    truth = model[0](x).detach()
    with LayerTap(model) as tap:
        model(x)
        assert "0" in tap
        with pytest.raises(InvalidInput, match="overwritten in place"):
            tap["0"]
        assert torch.equal(tap["1"], truth.relu())
    with LayerTap(model, copy=True) as tap:
        model(x)
    assert torch.equal(tap["0"], truth)
    with LayerTap(model, reduce=lambda h: h.mean(0)) as tap:
        model(x)
    assert torch.equal(tap["0"], truth.mean(0))
    with LayerTap(model) as tap, torch.inference_mode(), pytest.raises(InvalidInput, match="inference mode"):
        model(x)
    with LayerTap(Twice()) as tap, torch.inference_mode():
        tap.model(x)
    assert len(tap) == 5


def test_a_tap_can_be_part_of_a_loss():
    model = build(Twice, 0)  # its ReLUs are not all dead, whatever was drawn before
    with LayerTap(model, "relu", detach=False, reduce=lambda h: h.square().mean()) as tap:
        model(rand(5, 3))
        torch.stack(list(tap.values())).sum().backward()
    assert model.first.weight.grad.abs().sum() > 0
    assert model.last.weight.grad is None
    with LayerTap(model) as tap:
        model(rand(5, 3))
    assert not any(h.requires_grad for h in tap.values())


def test_outputs_can_be_consumed_instead_of_kept():
    seen = []
    with LayerTap(Twice(), consume=lambda name, h: seen.append((name, h.shape[1]))) as tap:
        tap.model(rand(5, 3))
    assert seen == [("first", 4), ("act", 4), ("middle", 4), ("act#1", 4), ("last", 2)]
    assert len(tap) == 0


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.body, self.reentrant = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), reentrant

    def forward(self, x):
        return checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_count_once(reentrant):
    model = Checkpointed(reentrant)
    seen = []
    with LayerTap(model, consume=lambda name, h: seen.append(name)):
        model(rand(5, 3)).sum().backward()
    assert seen == ["stem", "body.0", "body.1"]


def test_checkpointed_layers_in_a_loss():
    with LayerTap(Checkpointed(True), detach=False) as tap, pytest.raises(InvalidInput, match="use_reentrant=False"):
        tap.model(rand(5, 3))
    model = Checkpointed(False)
    with LayerTap(model, "body.1", detach=False) as tap:
        model(rand(5, 3))
        tap["body.1"].square().sum().backward()
    assert model.body[0].weight.grad.abs().sum() > 0


def test_outputs_of_several_tensors():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    lstm = nn.LSTM(4, 3, batch_first=True)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.lstm = attention, lstm

        def forward(self, x):
            h, weights = self.attention(x, x, x)
            return {"out": self.lstm(h)[0], "weights": weights}

    with LayerTap(Both(), ["attention", "lstm"]) as tap:
        out = tap.model(rand(2, 5, 4))
    assert list(tap) == ["attention", "attention[1]", "lstm", "lstm[1][0]", "lstm[1][1]"]
    assert torch.equal(tap["lstm"], out["out"].detach())
    assert torch.equal(tap["attention[1]"], out["weights"].detach())
    nested = nn.Sequential(Both())
    with LayerTap(nested, "0") as tap:
        nested(rand(2, 5, 4))
    assert list(tap) == ["0", "0[weights]"]


def test_half_precision_and_functional_calls():
    model = Twice()
    with LayerTap(model, "first") as tap, torch.autocast("cpu", torch.bfloat16):
        model(rand(5, 3))
    assert tap["first"].dtype == torch.bfloat16
    stacked = {k: torch.stack([v, 2 * v]) for k, v in model.named_parameters()}
    x = rand(5, 3)

    def hidden(parameters):
        with LayerTap(model, "first") as tap:
            torch.func.functional_call(model, parameters, (x,))
        return tap["first"]

    both = torch.func.vmap(hidden)(stacked)
    torch.testing.assert_close(both[1], 2 * both[0])


def test_bad_input():
    model = Twice()
    with pytest.raises(InvalidInput, match=r"torch.compile.*_orig_mod"):
        LayerTap(torch.compile(model))
    inner = nn.Sequential(torch.compile(nn.Linear(3, 3)))
    with pytest.raises(InvalidInput, match=r"torch.compile"):
        LayerTap(inner)
    inplace = Twice()
    inplace.compile()
    with pytest.raises(InvalidInput, match=r"torch.compile"):
        LayerTap(inplace)
    with pytest.raises(InvalidInput, match="DataParallel"):
        LayerTap(nn.DataParallel(model))
    with pytest.raises(InvalidInput, match=r"must be an nn\.Module"):
        LayerTap(lambda x: x)
    with pytest.raises(UnknownName, match=r"no layer 'conv\*'; its modules are last, act"):
        LayerTap(model, "conv*")
    with pytest.raises(InvalidInput, match=r"functions such as .* cannot be tapped"):
        LayerTap(nn.Sequential(nn.Linear(2, 2)), "relu")
    with pytest.raises(InvalidInput, match=r"no module of type Conv2d"):
        LayerTap(model, nn.Conv2d)
    with pytest.raises(InvalidInput, match="no layer was asked for"):
        LayerTap(model, [])
    with pytest.raises(UnknownName, match="run the model while the tap is open"):
        LayerTap(model)["first"]
