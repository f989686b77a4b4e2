"""What real models, targets and loops do around a cut: the right behavior, or one clear sentence."""

import copy
import warnings
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import SplitPoint
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.synthetic_gradients import (
    Context,
    DecoupledSequential,
    SyntheticGradient,
    compare_gradients,
    decouple,
    divisor_of,
    sg_quality,
    split_blocks,
)

LOSS = nn.CrossEntropyLoss()
X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def chain(*extra):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(*extra, nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)
    )


def randomize(net):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.synthesizer_parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return net


# Scale ---------------------------------------------------------------------------------------------------------


def test_the_divisor_is_the_losses_own():
    y = torch.tensor([0, 1, 2, -100, -100, -100, -100, -100])
    assert divisor_of(LOSS, y) == 3
    z = torch.zeros(8, 4, requires_grad=True)
    (g,) = torch.autograd.grad(LOSS(z, y), z)
    assert (g[0] * 3).tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25])
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    assert divisor_of(weighted, torch.tensor([0, 0, 0, 1])) == 6
    assert divisor_of(nn.CrossEntropyLoss(reduction="sum"), y) == 1
    assert divisor_of(partial(F.cross_entropy, ignore_index=0), torch.tensor([0, 0, 1])) == 1
    assert divisor_of(F.mse_loss, torch.zeros(4, 5)) == 20
    assert divisor_of(F.cross_entropy, torch.full((4, 3), 1 / 3)) == 4  # soft labels
    assert divisor_of(None, y, "samples") == 8


def test_a_loss_that_cannot_be_read_is_asked_about():
    with pytest.raises(InvalidInput, match="divisor='samples'"):
        decouple(chain(), ["0"], example=X, context=3).training_step(X, Y, lambda z, y: LOSS(z, y))
    with pytest.raises(InvalidInput, match="reduction='none'"):
        divisor_of(nn.MSELoss(reduction="none"), X)


def test_ignored_rows_get_no_synthetic_gradient():
    y = Y.clone()
    y[6:] = -100
    found = []
    for x, labels in ((X, y), (X[:6], y[:6])):
        net = randomize(decouple(chain(), ["0", "1"], example=X, context=3))
        net.training_step(x, labels, LOSS)
        found.append([p.grad for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# Contexts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [Y[:, None], Y.int(), Y.to(torch.uint8), F.one_hot(Y, 3), F.one_hot(Y, 3).float()])
def test_labels_of_all_shapes(y):
    assert torch.equal(Context("labels", 3)(y).context, F.one_hot(Y, 3).float())


def test_contexts_that_do_not_fit():
    with pytest.raises(InvalidInput, match="3 classes"):
        Context("labels", 3)(torch.tensor([0, 3]))
    with pytest.raises(InvalidInput, match="context='values'"):
        Context("labels", 3)(torch.tensor([1.0, 2.0]))
    with pytest.raises(InvalidInput, match="give y"):
        Context("labels", 3)(None)
    with pytest.raises(InvalidInput, match="context of 3 units"):
        SyntheticGradient(4, 3)(torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match="floating"):
        SyntheticGradient(4)(torch.zeros(2, 4, dtype=torch.long))


def test_values_in_large_units_are_standardized():
    context = Context("values", 1)
    prices = 1e5 + 2e4 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        given = context(prices).context
    assert float(given.mean()) == pytest.approx(0, abs=1e-3)
    assert float(given.std()) == pytest.approx(1, abs=0.01)
    held = context.center.clone()
    context(prices * 0)  # after ten batches the units stay
    assert torch.equal(context.center, held)
    missing = context(torch.tensor([1e5, float("nan")]))
    assert missing.rows.tolist() == [True, False]
    assert missing.context[1].item() == 0


# Autograd ------------------------------------------------------------------------------------------------------


def test_layers_that_write_in_place_above_a_cut():
    for above in (nn.ReLU(inplace=True), nn.Identity()):
        model = chain(above)
        net = randomize(decouple(model, ["0"], example=X - 1, context=3))
        for _ in range(2):
            net.zero_grad()
            net.training_step(X, Y, LOSS)
        if above.__class__ is nn.ReLU:
            first = [p.grad.clone() for p in model.parameters()]
    assert all(torch.isfinite(g).all() for g in first)


class Checkpointed(nn.Module):
    def __init__(self, inside, reentrant):
        super().__init__()
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)


def test_checkpointed_blocks_between_cuts():
    found = []
    for wrap in (lambda m: m, partial(Checkpointed, reentrant=False), partial(Checkpointed, reentrant=True)):
        model = chain()
        model[1] = wrap(model[1])
        net = randomize(decouple(model, ["0", "1"], example=X, context=3))
        net.training_step(X, Y, LOSS)
        net.zero_grad()
        net.training_step(X, Y, LOSS)
        found.append([p.grad for p in model.parameters()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_a_reentrant_block_at_the_input_is_named():
    model = chain()
    model[0] = Checkpointed(model[0], True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = decouple(model, ["0", "1"], example=X, context=3)
        with pytest.raises(InvalidInput, match=r"ends in '0' got no gradient.*use_reentrant=False"):
            net.training_step(X, Y, LOSS)


def test_a_cut_inside_a_checkpoint_is_refused():
    model = nn.Sequential(Checkpointed(chain(), False))
    net = decouple(model, ["0.inside.0"], example=X, context=3)
    with pytest.raises(InvalidInput, match="checkpointed region"):
        net.training_step(X, Y, LOSS)


def test_one_forward_pass_and_step():
    model = chain(nn.BatchNorm1d(8))
    for unlock in ("update", "backward"):
        net = decouple(copy.deepcopy(model), ["0", "1"], example=X, context=3, unlock=unlock)
        for _ in range(4):
            net.training_step(X, Y, LOSS)
        assert int(net.model[1][0].num_batches_tracked) == 4


def test_frozen_parts():
    model = chain()
    for p in model[0].parameters():
        p.requires_grad_(False)
    net = randomize(decouple(model, ["0", "1"], example=X, context=3))
    net.training_step(X, Y, LOSS)
    assert model[0][0].weight.grad is None
    assert net.synthesizers["0"].layers[0].weight.grad is None  # nothing to train below, so it is not run
    assert net.skipped["0: nothing to train below"] == 1
    above = chain()
    for p in above[1].parameters():
        p.requires_grad_(False)
    net = randomize(decouple(above, ["0", "1"], example=X, context=3))
    net.training_step(X, Y, LOSS)
    assert above[0][0].weight.grad.abs().sum() > 0  # a frozen part still passes gradient on
    assert net.synthesizers["0"].layers[0].weight.grad.abs().sum() > 0


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle, self.up = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x):
        early = self.down(x)
        return self.up(torch.cat([early, torch.relu(self.middle(early))], 1))


def test_a_path_around_a_cut_is_named():
    net = decouple(Skips(), ["middle"], example=X, context=3)
    with pytest.raises(InvalidInput, match=r"output of 'down' reaches the loss around the cut 'middle'"):
        net.training_step(X, Y, LOSS)
    with pytest.raises(InvalidInput, match="around the cut 'middle'"):
        split_blocks(Skips(), ["middle"], example=X)
    coupled = randomize(decouple(Skips(), ["middle"], example=X, context=3, allow_paths=True))
    coupled.training_step(X, Y, LOSS)
    assert coupled.model.down.weight.grad.abs().sum() > 0


def test_losses_inside_add_to_the_target():
    """L = w h, a local loss 0.1 h^2 / 2 at h = 2: the target is w + 0.2."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(2.0), model[2].weight.fill_(5.0)
    seen = {}
    model[2].register_forward_pre_hook(lambda m, a: seen.update(h=a[0]))
    net = decouple(model, ["0"], example=torch.ones(1, 1), divisor="samples")
    net.training_step(torch.ones(1, 1), None, lambda z, y: z.sum() + 0.05 * seen["h"].square().sum())
    assert float(net.targets()["0"][1]) == pytest.approx(5.2)


def test_shared_weights():
    w = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        w.weight.fill_(1.5)
    model = nn.Sequential(w, nn.Identity(), w)  # within a process both parts add up: 13.5 + 13.5
    x = torch.full((1, 1), 2.0)
    net = decouple(model, ["1"], example=x, lam=1.0, divisor="samples")
    net.training_step(x, None, lambda z, y: z.square().sum() / 2)
    assert float(w.weight.grad) == pytest.approx(27.0)
    with pytest.raises(InvalidInput, match="shares its parameter 'weight' with block 0"):
        DecoupledSequential([w, w], None, nn.Linear(1, 1), example=x)


@dataclass
class Output:
    hidden: torch.Tensor
    ids: torch.Tensor
    none: None = None


class Structured(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.block, self.kind = nn.Linear(6, 8), kind

    def forward(self, x):
        h, ids = torch.relu(self.block(x)), torch.arange(len(x))
        return {"tuple": (h, ids, None), "dict": {"hidden": h, "ids": ids}, "dataclass": Output(h, ids)}[self.kind]


class Reads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head, self.kind = Structured(kind), nn.Linear(8, 3), kind

    def forward(self, x):
        found = self.body(x)
        h = found[0] if self.kind == "tuple" else found["hidden"] if self.kind == "dict" else found.hidden
        return self.head(h)


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_structured_outputs(kind):
    net = randomize(decouple(Reads(kind), ["body"], example=X, context=3))
    net.training_step(X, Y, LOSS)
    assert net.model.body.block.weight.grad.abs().sum() > 0


def test_two_tensors_with_gradient_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(6, 8)

        def forward(self, x):
            return self.inside(x), 2 * self.inside(x)

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Two()

        def forward(self, x):
            return sum(self.body(x))

    with pytest.raises(InvalidInput, match="returns 2 tensors that carry gradient"):
        decouple(Sums(), ["body"], example=X)


class Tokens(nn.Module):
    """(B, T) tokens, or (T, B), to logits; pooled over what counts."""

    def __init__(self, first=True):
        super().__init__()
        self.embed, self.body, self.head, self.first = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3), first

    def forward(self, ids, mask):
        h = torch.tanh(self.body(self.embed(ids)))
        m = mask if self.first else mask.T
        return self.head((h * m[..., None]).sum(1 if self.first else 0))


@pytest.mark.parametrize("first", [True, False])
def test_tokens_and_padding(first):
    ids = torch.randint(9, (5, 5), generator=torch.Generator().manual_seed(0))  # as many tokens as samples
    mask = torch.arange(5)[None] < torch.tensor([5, 4, 3, 2, 1])[:, None]
    y = torch.arange(5) % 3
    torch.manual_seed(0)
    model = Tokens(first)
    x = (ids if first else ids.T, mask)
    net = randomize(decouple(model, ["body"], example=x, context=3, batch_dim=0 if first else 1))
    net.training_step(x, y, LOSS, mask=mask)
    predicted, target, rows = net.targets()["body"]
    assert torch.equal(rows, mask)
    assert (target[~mask] == 0).all()
    error = (predicted - target).square().sum(-1)[mask].mean()
    assert torch.isfinite(error)
    used = model.embed.weight.grad.abs().sum(1) > 0
    assert set(torch.where(used)[0].tolist()) == set(ids[mask].tolist())  # padding sends nothing down


def test_maps_have_convolutions_and_label_maps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x, y = torch.randn(3, 2, 6, 6), torch.randint(3, (3, 6, 6))
    net = randomize(decouple(model, ["1"], example=x, context=3))
    net.training_step(x, y, LOSS)
    assert net.synthesizers["1"].layers[0].weight.grad.abs().sum() > 0


# Names and copies ----------------------------------------------------------------------------------------------


def test_the_plain_model_comes_out():
    model = chain()
    expected = model(X)
    net = randomize(decouple(model, ["0", "1"], example=X, context=3))
    net.training_step(X, Y, LOSS)
    assert torch.equal(net.eval()(X), expected)
    assert list(net.model.state_dict()) == list(chain().state_dict())
    assert sum(p.numel() for p in net.base_parameters()) == sum(p.numel() for p in chain().parameters())
    assert not model[0]._forward_hooks


def test_copies_train_by_themselves():
    net = randomize(decouple(chain(), ["0", "1"], example=X, context=3))
    net.training_step(X, Y, LOSS)
    twin = copy.deepcopy(net)
    twin.zero_grad()
    twin.training_step(X, Y, LOSS)
    assert twin.model[0][0].weight.grad is not net.model[0][0].weight.grad
    torch.testing.assert_close(twin.model[0][0].weight.grad, net.model[0][0].weight.grad)


def test_states_go_into_equal_networks_only():
    net = randomize(decouple(chain(), ["0", "1"], example=X, context=3))
    net.training_step(X, Y, LOSS)
    same = decouple(chain(), ["0", "1"], example=X, context=3)
    same.load_state_dict(net.state_dict())
    assert same.steps == 1
    other = decouple(chain(), ["0", "1"], example=X, context=3, credit="bp", synthesizers=dict(net.synthesizers))
    with pytest.raises(InvalidInput, match="credit sg"):
        other.load_state_dict(net.state_dict())


def test_cuts_that_are_none():
    with pytest.raises(UnknownName, match=r"it has 0, 0\.0, 0\.1"):
        decouple(chain(), ["layer9"], example=X)
    with pytest.raises(InvalidInput, match="inside the cut"):
        decouple(chain(), ["0", "0.1"], example=X)
    with pytest.raises(InvalidInput, match="compile"):
        decouple(torch.compile(chain()), ["0"], example=X)
    layer = nn.Linear(6, 6)
    with pytest.raises(InvalidInput, match="more than once"):
        decouple(nn.Sequential(layer, nn.Sequential(layer)), ["0"], example=X)
    with pytest.raises(InvalidInput, match="list of module paths"):
        decouple(chain(), "0", example=X)
    with pytest.raises(InvalidInput, match="lam must be a finite number"):
        decouple(chain(), ["0"], example=X, lam=1.5)
    with pytest.raises(InvalidInput, match="must agree"):
        decouple(chain(), ["0"], example=X, synthesizers={"0": SyntheticGradient(8, out_dim=5)}).training_step(
            X, Y, LOSS
        )


def test_split_points_of_torchs_pipelining():
    net = decouple(chain(), {"1": SplitPoint.BEGINNING, "2": SplitPoint.BEGINNING}, example=X)
    assert net.cuts == ("0", "1")
    assert decouple(chain(), {"1": SplitPoint.END}, example=X).cuts == ("1",)


def test_blocks_of_a_residual_network():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return x + torch.relu(self.b(self.a(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer1, self.layer2, self.head = nn.Linear(6, 8), Residual(), Residual(), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer2(self.layer1(self.stem(x))))

    model = Net().eval()
    blocks = split_blocks(model, ["layer1", "layer2"], example=X)
    h = X
    for block in blocks:
        h = block.eval()(h)
    assert torch.equal(h, model(X))
    assert [n for n, _ in blocks[1].named_parameters()] == [f"layer2.{n}" for n, _ in model.layer2.named_parameters()]
    assert blocks[1].get_parameter("layer2.a.weight") is model.layer2.a.weight


# Steps ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_step_is_finished():
    net = decouple(chain(), ["0"], example=X, context=3)
    loss = net.training_step(X, Y, LOSS)
    with pytest.raises(InvalidInput, match="filled all gradients already"):
        loss.backward()
    assert float(loss) > 0


def test_what_is_not_finite_is_named():
    net = decouple(chain(), ["0"], example=X, context=3)
    with pytest.raises(InvalidInput, match="the loss is nan at step 0"):
        net.training_step(X * float("nan"), Y, LOSS)
    with torch.no_grad():
        net.synthesizers["0"].layers[0].bias.fill_(float("inf"))
    with pytest.raises(InvalidInput, match="cut '0' is not finite"):
        net.training_step(X, Y, LOSS)


def test_half_precision_and_single_rows():
    model = chain(nn.BatchNorm1d(8))
    with pytest.raises(InvalidInput, match="one row"):
        decouple(model, ["0"], example=X, context=3).training_step(X[:1], Y[:1], LOSS)
    with pytest.raises(InvalidInput, match="bfloat16"):
        decouple(chain().half(), ["0"], example=X.half(), context=3).training_step(X.half(), Y, LOSS)
    net = decouple(chain(), ["0"], example=X, context=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net.training_step(X, Y, LOSS)
    assert net.targets()["0"][1].dtype == torch.float32


def test_a_diverging_synthesizer_is_told_of():
    net = decouple(chain(), ["0"], example=10 * X, context=3)
    sgd = torch.optim.SGD(net.synthesizer_parameters(), lr=0.1)

    def train():
        for _ in range(21):
            sgd.zero_grad()
            net.training_step(10 * X, Y, LOSS)
            sgd.step()

    with pytest.warns(UserWarning, match="'0' is .* it diverges"):
        train()


def test_a_perfect_fit_has_no_cosine():
    found = compare_gradients(torch.zeros(4, 3), torch.zeros(4, 3))
    assert found["zero_rows"] == 1
    assert found["cosine"] != found["cosine"]
    half = compare_gradients(torch.ones(2, 3), torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
    assert half["zero_rows"] == 0.5
    assert half["cosine"] == pytest.approx(1)


def test_quality_changes_nothing():
    net = randomize(decouple(chain(nn.BatchNorm1d(8)), ["0", "1"], example=X, context=3))
    net.training_step(X, Y, LOSS)
    before = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    found = sg_quality(net, X, Y, LOSS)
    assert set(found) == {"0", "1"}
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[0][key]), key
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before[1], strict=True))
