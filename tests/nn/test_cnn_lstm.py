"""The CNN-LSTM of the paper: its count, torch's LSTM as the truth, and the promises every network makes."""

import warnings

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.cnn_lstm import _LSTM, CNNLSTM
from mlcollage.nn.init import build


def small(**options):
    sizes = {"length": 16, "embedding": 6, "filters": 5, "kernel_size": 3, "pool": 2, "hidden": 4}
    return build(lambda: CNNLSTM(30, 3, **sizes, **options), 0)


def tokens(n=5, length=16, vocabulary=30):
    return torch.randint(0, vocabulary, (n, length), generator=torch.Generator().manual_seed(0))


def test_the_parameter_count_is_the_paper_s():
    with torch.device("meta"):
        model = CNNLSTM()
    assert sum(p.numel() for p in model.parameters()) == 2_700_098
    logits, acts = model(torch.zeros(2, 100, dtype=torch.long, device="meta"), activations=True)
    assert logits.shape == (2, 2)
    assert acts["lstm"].shape == (2, 24, 128)


def test_the_lstm_is_torch_s_with_one_bias_and_an_open_forget_gate():
    ours = _LSTM(5, 4).double()
    theirs = torch.nn.LSTM(5, 4, batch_first=True).double()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(generator=rng)
        order = [0, 2, 1, 3]  # ours has the authors' order i, g, f, o; torch's is i, f, g, o

        def rearranged(p):
            return torch.cat([p.chunk(4)[k] for k in order])

        theirs.weight_ih_l0.copy_(rearranged(ours.weight_x))
        theirs.weight_hh_l0.copy_(rearranged(ours.weight_h))
        theirs.bias_ih_l0.copy_(rearranged(ours.bias))
        theirs.bias_hh_l0.zero_()
        theirs.bias_hh_l0[4:8] = 1
    x = torch.randn(3, 7, 5, dtype=torch.float64, generator=rng)
    torch.testing.assert_close(ours(x), theirs(x)[0])


def test_asking_for_activations_does_not_change_the_logits_and_names_are_modules():
    model, x, seen = small().eval(), tokens(), {}
    plain = model(x)
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, path=path: seen.setdefault(path, out))
    logits, acts = model(x, activations=True)
    assert list(acts) == ["embedding", "conv", "relu", "pool", "lstm", "last", "logits"]
    assert torch.equal(plain, logits)
    assert all(torch.equal(acts[name], seen[name]) for name in ("embedding", "conv", "relu", "pool", "lstm"))
    assert torch.equal(acts["last"], acts["lstm"][:, -1])
    grads = torch.autograd.grad(logits.square().sum(), [*acts.values(), *model.parameters()])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_the_same_seed_gives_the_same_network_with_the_documented_scales():
    a, b = (build(lambda: CNNLSTM(400, 2), 3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    cut = 0.8796  # standard deviation of a standard normal cut at two
    for weight, std in ((a.embedding.weight, 1), (a.conv.weight, 640**-0.5), (a.lstm.weight_h, 192**-0.5)):
        assert float(weight.detach().std()) == pytest.approx(cut * std, rel=0.02)
        assert float(weight.detach().abs().max()) <= 2 * std
    assert all(not p.any() for p in (a.conv.bias, a.lstm.bias, a.head.bias))


def test_precision_vmap_compilation_and_second_derivatives():
    model, x = small(activation="silu"), tokens()
    expected = model.double()(x)
    torch.testing.assert_close(model.float()(x).double(), expected, rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    assert float((half.double() - expected).detach().abs().max()) < 0.05 * float(expected.detach().abs().max())
    params, buffers = stack_module_state([model, small(activation="silu")])
    both = vmap(lambda p, b: functional_call(model, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(both[0], model(x))
    (grad,) = torch.autograd.grad(model(x).square().sum(), model.lstm.weight_h, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), model.conv.weight)[0].abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CNNLSTM(0), InvalidInput, "vocabulary must be a whole number"),
        (lambda: CNNLSTM(hidden=2.5), InvalidInput, "hidden must be a whole number"),
        (lambda: CNNLSTM(length=6), InvalidInput, "leaves no step .* at least 8 tokens"),
        (lambda: CNNLSTM(activation="swish"), UnknownName, "activation must be one of .relu."),
        (lambda: small()(tokens(length=12)), InvalidInput, r"samples of shape \(16,\)"),
        (lambda: small()(tokens().float()), InvalidInput, r"torch.float32; tokens are whole numbers"),
    ],
)
def test_bad_arguments_are_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()
