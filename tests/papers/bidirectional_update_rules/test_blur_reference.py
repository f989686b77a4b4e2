"""The rule beside a transcription of the paper's equations into loops of NumPy, over random networks and settings."""

import itertools

import numpy as np
import pytest
import torch

from mlcollage.papers.bidirectional_update_rules import BlurNetwork, Genome

ACT = {"tanh": np.tanh, "identity": lambda z: z, "relu_tanh": lambda z: np.maximum(np.tanh(z), 0)}


def normalized(message, gain, shift):
    """Over the rows of a batch, message[b, j, c]."""
    mean, variance = message.mean(0), message.var(0)
    return (message - mean) / np.sqrt(variance + 1e-5) * gain + shift


def step(w, back, g, s, x, y):
    """Synapses w[layer][i, j, c], bias last, and back[layer][j, i, c] or None, after a step on x[b, i] and y[b]."""
    k, rows, top = s.k, len(x), len(w)

    def channels(v):
        return v if v.shape[-1] == k else np.repeat(v, k, -1)

    def with_bias(a):
        return np.concatenate([a, np.ones((rows, 1, k))], axis=1)

    a = [np.zeros((*x.shape, k))]
    a[0][..., 0] = x
    for i in range(top):
        message = np.einsum("ijc,dc,bid->bjc", channels(w[i]), g["nu"], with_bias(a[i]))
        if s.norm in ("both", "forward") and i < top - 1:
            message = normalized(message, g["gain_forward"], g["shift_forward"])
        a.append(ACT[s.activation if i < top - 1 else s.top_activation](g["update"] * message))
    a[top][..., 1:] = 0
    a[top][..., 1] = -1
    a[top][np.arange(rows), y, 1] = 1
    for i in range(top - 1, 0, -1):
        v = channels(w[i])[:-1].transpose(1, 0, 2) if back is None else channels(back[i])
        message = np.einsum("jic,dc,bjd->bic", v, g["mu"], a[i + 1])
        if s.norm in ("both", "backward"):
            message = normalized(message, g["gain_backward"], g["shift_backward"])
        new = g["keep"] * a[i]
        if s.backward == "additive":
            new = new + g["update"] * message
        else:
            first = 1 if s.backward == "multiplicative_second" else 0
            new[..., first:] = new[..., first:] * message[..., first:]
        a[i] = ACT[s.backward_activation](new)

    def hebb(pre, post, old, senders):
        change = np.einsum("bie,ec,cd,bjd->ijc", pre, g["hebb_pre"], g["hebb_post"], post)[..., : old.shape[-1]]
        change = change / rows if s.reduction == "mean" else change
        change = change / senders if s.step_scale == "fan_in" else change
        return g["synapse_keep"] * old + g["synapse_update"] * change

    new = [hebb(with_bias(a[i]), a[i + 1], w[i], len(w[i]) - 1) for i in range(top)]
    if back is None:
        return new, None
    return new, [None, *(hebb(a[i + 1], a[i], back[i], len(back[i])) for i in range(1, top))]


def plain(parts):
    return [p[0].permute(1, 2, 0).numpy().copy() if p.numel() else None for p in parts]


@pytest.mark.parametrize(
    ("sizes", "rows", "k"),
    [((3, 2), 4, 2), ((5, 4, 3), 7, 3), ((4, 6, 5, 2), 2, 4), ((1, 1, 2), 3, 2), ((7, 3, 3, 3, 5), 33, 2)],
)
def test_steps_are_those_of_the_equations(sizes, rows, k):
    rng = np.random.default_rng(sum(sizes))
    variants = itertools.product(
        ("additive", "multiplicative", "multiplicative_second"), (True, False), (True, False),
        ("both", "none", "forward", "backward"),
    )  # fmt: skip
    for number, (backward, symmetric, multistate, norm) in enumerate(variants):
        function = str(rng.choice(["tanh", "relu_tanh"]))
        genome = Genome.random(
            k, seed=number, spread=0.5, backward=backward, symmetric=symmetric, multistate=multistate, norm=norm,
            reduction=str(rng.choice(["mean", "sum"])), step_scale=str(rng.choice(["fan_in", "plain"])),
            activation=function, backward_activation=function,
        )  # fmt: skip
        for name, value in genome.numbers.items():
            genome.numbers[name] = value.double() + 0.1 * torch.as_tensor(rng.normal(size=value.shape))
        genome.numbers["synapse_update"] *= 0.1
        network = BlurNetwork(sizes, genome, seed=number, dtype=torch.float64)
        network._told = None
        g = {name: value.numpy() for name, value in genome.numbers.items()}
        w, back = plain(network.weights.forward), plain(network.weights.backward) or None
        for _ in range(3):
            x, y = rng.normal(size=(rows, sizes[0])), rng.integers(sizes[-1], size=rows)
            w, back = step(w, back, g, genome.settings, x, y)
            network.learn(torch.as_tensor(x), torch.as_tensor(y))
        for ours, theirs in ((network.weights.forward, w), (network.weights.backward, back or ())):
            for a, b in zip(plain(ours), theirs, strict=True):
                if b is not None:
                    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
