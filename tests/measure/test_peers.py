"""The same numbers as BackPACK, Opacus and curvlinops on the same inputs, in double precision."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from backpack import backpack, extend
from backpack.extensions import BatchL2Grad, DiagGGNExact, DiagGGNMC
from curvlinops import FisherMCLinearOperator, GGNLinearOperator, HessianLinearOperator, hutchinson_trace
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from torch import nn

from mlcollage.measure.fisher import fisher_trace
from mlcollage.measure.grad_norms import per_example_grad_sqnorm
from mlcollage.measure.hessian import hessian_trace, hessian_vector_product
from mlcollage.nn.init import seeded

CLASSES = 3


def build(*layers):
    with seeded(0):
        return nn.Sequential(*(make() for make in layers)).double()


def mlp():
    return build(lambda: nn.Linear(4, 6), nn.Tanh, lambda: nn.Linear(6, CLASSES))


def convnet(norm=nn.Identity, groups=2):
    return build(
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=groups),
        norm,
        nn.ReLU,
        lambda: nn.Conv2d(4, 5, 2, bias=False),
        nn.Sigmoid,
        nn.Flatten,
        lambda: nn.Linear(45, CLASSES),
    )


def data(*shape):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=rng, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (shape[0],), generator=rng)


CASES = [(mlp, (7, 4)), (convnet, (5, 2, 8, 8))]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own deprecations
        yield


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (mlp, (7, 4)),
        # BackPACK's norms of grouped convolutions are not those of the gradients that autograd gives.
        (lambda: convnet(groups=1), (5, 2, 8, 8)),
        (lambda: convnet(lambda: nn.BatchNorm2d(4), groups=1), (5, 2, 8, 8)),
        (lambda: build(lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), nn.Flatten, lambda: nn.Linear(44, 3)), (4, 3, 5)),
    ],
)
def test_norms_are_those_of_backpack(make, shape):
    model, (x, y) = make().eval(), data(*shape)
    theirs = extend(copy.deepcopy(model))
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack(BatchL2Grad()):
        loss_fn(theirs(x), y).backward()
    norms = sum(p.batch_l2 for p in theirs.parameters())
    torch.testing.assert_close(per_example_grad_sqnorm(model, F.cross_entropy, x, y), norms)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        *CASES,
        (lambda: convnet(lambda: nn.GroupNorm(2, 4)), (5, 2, 8, 8)),
        (lambda: convnet(lambda: nn.InstanceNorm2d(4, affine=True)), (5, 2, 8, 8)),
        (
            lambda: build(lambda: nn.Linear(4, 6), lambda: nn.LayerNorm(6), nn.Flatten, lambda: nn.Linear(30, 3)),
            (6, 5, 4),
        ),
    ],
)
def test_norms_are_those_of_opacus(make, shape):
    model, (x, y) = make(), data(*shape)
    theirs = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    F.cross_entropy(theirs(x), y, reduction="sum").backward()
    norms = sum(p.grad_sample.flatten(1).square().sum(1) for p in theirs.parameters())
    torch.testing.assert_close(per_example_grad_sqnorm(model, F.cross_entropy, x, y), norms)
    ghost = GradSampleModuleFastGradientClipping(copy.deepcopy(model), loss_reduction="sum", use_ghost_clipping=True)
    F.cross_entropy(ghost(x), y, reduction="sum").backward()
    torch.testing.assert_close(ghost.get_norm_sample().square(), norms)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_traces_are_those_of_backpack_and_curvlinops(make, shape):
    model, (x, y) = make(), data(*shape)
    found = fisher_trace(model, x, per_layer=True)
    theirs = extend(copy.deepcopy(model))
    with backpack(DiagGGNExact()):
        extend(nn.CrossEntropyLoss())(theirs(x), y).backward()
    assert found.value == pytest.approx(float(sum(p.diag_ggn_exact.sum() for p in theirs.parameters())))
    for name, module in theirs.named_children():
        if name in found.per_layer:
            assert found.per_layer[name] == pytest.approx(
                float(sum(p.diag_ggn_exact.sum() for p in module.parameters()))
            )
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    ggn = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, [(x, y)])
    assert found.value == pytest.approx(float((ggn @ torch.eye(size, dtype=torch.float64)).trace()))


def test_drawn_traces_agree_within_their_errors():
    model, (x, y) = mlp(), data(7, 4)
    ours = fisher_trace(model, x, method="mc", draws=300, generator=0)
    theirs = extend(copy.deepcopy(model))
    loss_fn = extend(nn.CrossEntropyLoss())
    with seeded(0), backpack(DiagGGNMC(mc_samples=300)):
        loss_fn(theirs(x), y).backward()
    assert abs(ours.value - float(sum(p.diag_ggn_mc.sum() for p in theirs.parameters()))) < 4 * 2**0.5 * ours.stderr
    with seeded(1):
        fisher = FisherMCLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], mc_samples=300
        )
        size = sum(p.numel() for p in model.parameters())
        drawn = float((fisher @ torch.eye(size, dtype=torch.float64)).trace())
    assert abs(ours.value - drawn) < 4 * 2**0.5 * ours.stderr


def test_hessian_is_that_of_curvlinops():
    model, (x, y) = mlp(), data(7, 4)
    size = sum(p.numel() for p in model.parameters())
    theirs = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x[:4], y[:4]), (x[4:], y[4:])]
    )
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(hessian_vector_product(model, F.cross_entropy, [(x, y)], eye), theirs @ eye)
    ours = hessian_trace(model, F.cross_entropy, (x, y), n_vectors=200, generator=0)
    with seeded(0):
        drawn = [float(hutchinson_trace(theirs, 20)) for _ in range(10)]
    assert abs(ours.value - sum(drawn) / 10) < 4 * 2**0.5 * ours.stderr
