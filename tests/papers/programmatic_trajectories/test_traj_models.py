"""Models against the official code's losses, gradients and rollouts; exact likelihoods; masks, scales and intents."""

import copy

import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.papers.programmatic_trajectories import (
    VRAEMI,
    GridIntent,
    MacroVRNN,
    RNNGauss,
    TrackBatch,
    VRNNIndep,
    VRNNMixed,
    VRNNSingle,
    Wiring,
    load_official_weights,
    official_model,
    vrnn,
)
from mlcollage.papers.programmatic_trajectories.rollout import Draws, IntentPlan, roll_out

SIZES = {"z": 2, "hidden": 5, "rnn": 4, "min_std": 0.0}
MODELS = {
    "macro_vrnn": lambda: MacroVRNN(3, 4, macro_rnn=5, **SIZES),
    "macro_shared_vrnn": lambda: MacroVRNN(3, 4, True, macro_rnn=5, **SIZES),
    "vrnn_indep": lambda: VRNNIndep(3, **SIZES),
    "vrnn_mixed": lambda: VRNNMixed(3, **SIZES),
    "vrnn_single": lambda: VRNNSingle(3, **SIZES),
    "rnn_gauss": lambda: RNNGauss(3, hidden=5, rnn=4, min_std=0.0, first_frame=True),
    "vrae_mi": lambda: VRAEMI(3, z=2, hidden=5, rnn=4, min_std=0.0, entropy="official"),
}
VRNNS = [name for name in MODELS if name.startswith(("macro", "vrnn"))]


def close(a, b, tol=1e-12):
    a, b = (np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for v in (a, b))
    return np.abs(a - b).max() <= tol * max(1.0, np.abs(b).max())


def loaded(official, name):
    d = official(f"model_{name}")
    model = MODELS[name]().double()
    load_official_weights(model, {k[2:]: torch.from_numpy(v) for k, v in d.items() if k.startswith("w/")})
    x = torch.from_numpy(d["states"]).unflatten(-1, (3, 2)).transpose(0, 1)
    g = torch.from_numpy(d["macro"]).transpose(0, 1)
    return d, model, x, g[..., 0] if name == "macro_shared_vrnn" else g


def official_gradients(model, d, kind):
    """The file's gradients in our layout: loaded as if they were weights, zeros where there was none."""
    other = copy.deepcopy(model)
    state = {
        k[2:]: torch.from_numpy(d.get(f"{kind}/{k[2:]}", np.zeros_like(v))) for k, v in d.items() if k.startswith("w/")
    }
    load_official_weights(other, state)
    return dict(other.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_the_official_ones(official, name):
    d, model, x, g = loaded(official, name)
    macro = name.startswith("macro")
    batch = TrackBatch(x, g if macro else None)
    options = {}
    if name in VRNNS:
        options["eps"] = torch.from_numpy(d["eps"]).permute(2, 0, 1, 3)
    elif name == "vrae_mi":
        options["eps"] = torch.from_numpy(d["eps"])[0]
    terms = model.loss(batch, **options)
    b = len(x)
    if name == "rnn_gauss":
        assert close(terms["nll"] * b, d["nll"])
    else:
        assert close(terms["kl"] * b, d["kl_loss"])
        assert close(terms["nll"] * b, d["recon_loss"])
    if name == "vrae_mi":
        assert close(terms["entropy"] * b, d["z_entropy"])
        assert close(terms["discriminator"] * b, d["discrim_loss"])
    if macro:
        assert close(terms["ce"] * b, d["crossentropy_loss"])
    ((terms["loss"] - terms.get("ce", 0.0)) * b).backward(retain_graph=True)
    want = official_gradients(model, d, "g")
    for key, p in model.named_parameters():
        assert close(torch.zeros_like(p) if p.grad is None else p.grad, want[key]), key
    if macro:
        model.zero_grad()
        (terms["ce"] * b).backward()
        want = official_gradients(model, d, "gce")
        for key, p in model.named_parameters():
            assert close(torch.zeros_like(p) if p.grad is None else p.grad, want[key]), key


class Given(Draws):
    """The file's draws in the place of random ones."""

    def __init__(self, d, start):
        super().__init__()
        self.d, self.start, self.probabilities = d, start, []

    def latent(self, t, like):
        return torch.from_numpy(self.d["roll_eps_z"][t])

    def position(self, t, like):
        return torch.from_numpy(self.d["roll_eps_x"][t - self.start])

    def intent(self, t, probabilities):
        self.probabilities.append(probabilities)
        return torch.from_numpy(self.d["roll_macro_draw"][t - self.start].T)


@pytest.mark.parametrize("name", VRNNS)
def test_rollouts_are_the_official_ones(official, name):
    d, model, x, g = loaded(official, name)
    burn = int(d["roll_burn_in"])
    steps = x.shape[1] - burn - 1
    draws, plan = Given(d, burn), None
    if name.startswith("macro"):
        fixed = (g[..., None] if g.ndim == 2 else g)[:, :-1].clone()
        fixed[:, burn:] = -1
        plan = IntentPlan(fixed)
    seen = x[:, : burn + 1]
    seen = seen.flatten(2)[:, :, None] if name == "vrnn_single" else seen
    with torch.no_grad():
        found, intents = roll_out(model, seen, steps, plan, draws, "prior")
    assert close(found.flatten(2), np.moveaxis(d["roll_states"], 0, 1))
    if plan is not None:
        p = torch.stack(draws.probabilities).transpose(1, 2)
        # The file may hold logarithms' exponentials; both sum to one.
        assert close(p, d["roll_macro_probs"])
        want = np.moveaxis(d["roll_macro_intents"], 0, 1)[:, :-1]
        assert (np.asarray(intents).reshape(want.shape) == want).all()


def test_rollouts_of_the_others_are_the_official_ones(official):
    d, model, x, _ = loaded(official, "rnn_gauss")
    burn = int(d["roll_burn_in"])
    found, _ = model.sample(x[:, :burn], x.shape[1] - burn, eps=torch.from_numpy(d["roll_eps_x"]))
    assert close(found[0].flatten(2), np.moveaxis(d["roll_states"], 0, 1))
    d, model, x, _ = loaded(official, "vrae_mi")
    eps = torch.from_numpy(d["roll_eps_z"]), torch.from_numpy(d["roll_eps_x"])
    found, _ = model.sample(x[:, : burn + 1], x.shape[1] - burn - 1, eps=eps)
    assert close(found[0].flatten(2), np.moveaxis(d["roll_states"], 0, 1))


def mlp(n_in, hidden, out):
    """Weights of a Gaussian net as the architecture table has it."""
    return n_in * hidden + hidden + hidden * hidden + hidden + 2 * (hidden * out + out)


def gru(n_in, r, layers=2):
    return sum(3 * r * ((n_in if i == 0 else r) + r) + 6 * r for i in range(layers))


def test_official_sizes_are_those_of_the_table():
    ours = 5 * (
        mlp(2 + 90 + 200, 200, 16)
        + mlp(90 + 200, 200, 16)
        + mlp(10 + 90 + 16 + 200, 200, 2)
        + gru(2 + 16, 200)
        + (10 + 200) * 200
        + 200
        + 200 * 90
        + 90
    ) + gru(5 * 90, 200)
    indep = 5 * (mlp(2 + 10 + 250, 200, 16) + mlp(10 + 250, 200, 16) + mlp(10 + 16 + 250, 200, 2) + gru(2 + 16, 250))
    single = mlp(20 + 900, 250, 80) + mlp(910, 250, 80) + mlp(10 + 80 + 900, 250, 10) + gru(90, 900)
    gauss = mlp(900, 250, 10) + gru(10, 900)
    for name, want in (("macro_vrnn", ours), ("vrnn_indep", indep), ("vrnn_single", single), ("rnn_gauss", gauss)):
        assert sum(p.numel() for p in official_model(name).parameters()) == want, name


OWN = {
    "macro": lambda **o: MacroVRNN(3, 4, z=2, hidden=6, rnn=5, **o),
    "shared": lambda **o: MacroVRNN(3, 4, True, z=2, hidden=6, rnn=5, **o),
    "tied": lambda **o: MacroVRNN(
        3, 4, z=2, hidden=6, rnn=5, agent_params="tied", context="neighbors", target="step", joint_macro=False, **o
    ),
    "tied_shared": lambda **o: MacroVRNN(
        3, 4, True, z=2, hidden=6, rnn=5, agent_params="tied", context="neighbors", target="step", **o
    ),
    "indep": lambda **o: VRNNIndep(3, z=2, hidden=6, rnn=5, **o),
    "mixed": lambda **o: VRNNMixed(3, z=2, hidden=6, rnn=5, **o),
    "single": lambda **o: VRNNSingle(3, z=2, hidden=6, rnn=5, **o),
}


def own(name, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OWN[name](**options).double()


def data(name, b=4, t=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, 3, 2, generator=g, dtype=torch.float64).cumsum(1)
    intents = torch.randint(4, (b, t) if name in ("shared", "tied_shared") else (b, t, 3), generator=g)
    return TrackBatch(x, intents if own(name).n_intents else None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", OWN)
def test_kl_and_density_are_those_of_torch(name):
    model, batch = own(name), data(name)
    rows = model._rows(batch)
    h, z, mean, std = model._filter(rows, None, seeded(), 1)
    nll, kl = model._terms(rows, h, z, mean, std)
    normal = torch.distributions.Normal
    prior = normal(*model.prior(rows.known | {"h": h}))
    assert torch.allclose(kl, torch.distributions.kl_divergence(normal(mean, std), prior), atol=1e-12)
    decoder = normal(*model.decoder(rows.known | {"h": h, "z": z}))
    assert torch.allclose(nll, -decoder.log_prob(rows.known["x"]), atol=1e-12)


@pytest.mark.parametrize("name", OWN)
def test_bounds_are_ordered_and_in_the_users_unit(name):
    model, batch = own(name), data(name)
    elbo, iwae, fivo = (
        model.log_likelihood(batch, 64, bound, generator=seeded(3)) for bound in ("elbo", "iwae", "fivo")
    )
    assert (elbo < iwae + 0.5).all()
    assert elbo.mean() < iwae.mean() < fivo.mean() + 0.5
    # Feet or meters: the scaled model is the same, the log density of each number moves by log c.
    c = 0.3048
    scaled = own(name, shift=(1.0, -2.0), scale=(3.0, 5.0))
    other = own(name, shift=(c * 1.0, c * -2.0), scale=(c * 3.0, c * 5.0))
    one = scaled.log_likelihood(batch, 8, generator=seeded(3))
    moved = TrackBatch(batch.x * c, batch.intents)
    two = other.log_likelihood(moved, 8, generator=seeded(3))
    numbers = 8 * 3 * 2
    assert torch.allclose(two - one, torch.full_like(one, -numbers * np.log(c)), atol=1e-8)


class Linear:
    """Modules for a linear Gaussian chain in the place of the networks: z' = a z + noise, x = z' + noise."""

    def __init__(self, weights, std, names):
        self.weights, self.std, self.names = weights, std, names

    def lift(self, known):
        return self._sum(known)

    def _sum(self, inputs):
        found = [self.weights[n] * inputs[n][..., :1] for n in self.names if n in inputs]
        return sum(found) if found else 0.0

    def late_weight(self, names):
        return None

    def late(self, pre, inputs, weight=None):
        mean = pre + self._sum(inputs)
        return mean, torch.full_like(mean, self.std)

    def __call__(self, inputs):
        return self.late(self._sum(inputs), {})


class Carry:
    """A recurrent network whose state is the latent itself."""

    def initial(self, rows, like):
        return [like.new_zeros(1, rows, 1)]

    def lift(self, known):
        return known["x"] * 0

    def late_weight(self, names):
        return None

    def step(self, pre, inputs, states, weight=None):
        return [inputs["z"]]


def kalman(x, a, q, r):
    mean, var, total = 0.0, 0.0, 0.0
    for value in x:
        mean, var = a * mean, a * a * var + q
        s = var + r
        total += -0.5 * (np.log(2 * np.pi * s) + (value - mean) ** 2 / s)
        gain = var / s
        mean, var = mean + gain * (value - mean), (1 - gain) * var
    return total


def test_the_bounds_reach_the_kalman_filter():
    a, q, r = 0.9, 0.5, 0.3
    x = torch.randn(3, 13, 1, 1, generator=seeded(), dtype=torch.float64)
    model = VRNNIndep(1, dim=1, z=1, hidden=2, rnn=1).double()
    gain = q / (q + r)
    nets = {
        "prior": Linear({"h": a}, q**0.5, "h"),
        "decoder": Linear({"z": 1.0}, r**0.5, "z"),
        # The exact posterior of one step.
        "encoder": Linear({"x": gain, "h": a * (1 - gain)}, ((1 - gain) * q) ** 0.5, "xh"),
        "rnn": Carry(),
    }
    for name, net in nets.items():
        delattr(model, name)
        object.__setattr__(model, name, net)
    exact = torch.tensor([kalman(x[i, 1:, 0, 0].numpy(), a, q, r) for i in range(3)])
    fivo = model.log_likelihood(x, 4000, "fivo", generator=seeded(1))
    iwae = model.log_likelihood(x, 4000, "iwae", generator=seeded(1))
    elbo = model.log_likelihood(x, 4000, "elbo", generator=seeded(1))
    assert (fivo - exact).abs().max() < 0.05
    assert (iwae - exact).abs().max() < 0.3
    assert (elbo < exact).all()


@pytest.mark.parametrize("name", OWN)
def test_lengths_together_are_lengths_apart(name):
    model, batch = own(name), data(name, b=2, t=12)
    x, mask = batch.x.clone(), torch.ones(2, 12, 3, dtype=torch.bool)
    mask[1, 7:] = False
    x[1, 7:] = torch.nan
    eps = torch.randn(2, 11, 1 if name == "single" else 3, 2, generator=seeded(), dtype=torch.float64)
    together = model.loss(TrackBatch(x, batch.intents, mask), eps=eps)
    intents = [None, None] if batch.intents is None else [batch.intents[:1], batch.intents[1:, :7]]
    apart = [
        model.loss(TrackBatch(x[:1], intents[0]), eps=eps[:1]),
        model.loss(TrackBatch(x[1:, :7], intents[1]), eps=eps[1:, :6]),
    ]
    for term in ("nll", "kl", "steps"):
        assert close(2 * together[term], apart[0][term] + apart[1][term], 1e-10), term


def test_masked_density_is_the_hard_case():
    # 2 of 4 frames count, two coordinates, x = mean = 0, deviation 1.
    model = own("indep")
    rows = model._rows(TrackBatch(torch.zeros(1, 5, 3, 2, dtype=torch.float64)))
    unit = torch.zeros_like(rows.unit)
    unit[0, 1:3] = True
    one = torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(()).double())
    assert float((unit[0] * one * torch.ones(2)).sum()) == pytest.approx(-3.6758, abs=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_sequences_and_later_frames_do_not_leak(name):
    model, batch = own(name), data(name)
    one = 1 if name == "single" else 3
    eps = torch.randn(4, 8, one, 2, generator=seeded(), dtype=torch.float64)

    def terms(x, intents):
        rows = model._rows(TrackBatch(x, intents))
        h, z, mean, std = model._filter(rows, eps, None, 1)
        nll, kl = model._terms(rows, h, z, mean, std)
        found = model._by_agent(nll.sum(-1, keepdim=True) + kl.sum(-1, keepdim=True), 4)
        return found[..., 0]  # (B, T - 1, K)

    before = terms(batch.x, batch.intents)
    x = batch.x.clone()
    x[2] += 1
    other = terms(x, batch.intents)
    changed = ((other - before).abs() > 1e-12).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]
    x, g = batch.x.clone(), None if batch.intents is None else batch.intents.clone()
    x[:, 6:] += 1  # the step from frame 5 to 6 is the first that may change
    if g is not None:
        g[:, 6:] = (g[:, 6:] + 1) % 4
    changed = ((terms(x, g) - before).abs() > 1e-12).any(2).any(0)
    assert not changed[:5].any()
    assert changed[5]


def test_permuting_agents_leaves_the_tied_model_alone():
    model, batch = own("tied"), data("tied")
    order = [2, 0, 1]
    eps = torch.randn(4, 8, 3, 2, generator=seeded(), dtype=torch.float64)
    one = model.loss(batch, eps=eps)
    two = model.loss(TrackBatch(batch.x[:, :, order], batch.intents[:, :, order]), eps=eps[:, :, order])
    assert close(one["loss"], two["loss"], 1e-12)


@pytest.mark.parametrize("name", ["macro", "shared", "tied", "tied_shared"])
def test_intents_are_obeyed_and_the_future_is_not_read(name):
    model, batch = own(name), data(name)
    shared = model.shared_intent
    steps, burn = 6, batch.x[:, :4]
    want = torch.randint(4, (steps,) if shared else (steps, 3), generator=seeded(2))
    want[2] = -1
    x, g = model.sample(burn, steps, want, n=2, history=batch.intents[:, :4], generator=seeded(5))
    assert g.shape == (2, 4, 9) if shared else (2, 4, 9, 3)
    fixed = want >= 0
    assert (g[:, :, 3:][:, :, fixed] == want[fixed]).all()
    assert (g[:, :, :3] == batch.intents[:, :3]).all()
    # Later intents change nothing before them.
    later = want.clone()
    later[4:] = (later[4:] + 1) % 4
    y, _ = model.sample(burn, steps, later, n=2, history=batch.intents[:, :4], generator=seeded(5))
    assert torch.equal(x[:, :, :8], y[:, :, :8])
    assert not torch.equal(x[:, :, 8:], y[:, :, 8:])
    # The last frame's label of the history belongs to the future.
    moved = batch.intents[:, :4].clone()
    moved[:, 3] = (moved[:, 3] + 1) % 4
    z, _ = model.sample(burn, steps, want, n=2, history=moved, generator=seeded(5))
    assert torch.equal(x, z)


def test_intents_by_function_and_labels_of_the_burn_in():
    model = MacroVRNN(2, 90, z=2, hidden=6, rnn=5)
    asked = []

    def ask(t, x, p):
        asked.append((t, x.shape, p.shape, float(p.sum(-1).min())))
        return torch.full((len(x), 2), t)

    burn = 20 + torch.randn(3, 4, 2, 2)
    _, g = model.sample(burn, 2, ask, n=2, history=GridIntent())
    assert [a[0] for a in asked] == [3, 4]
    assert asked[0][1:3] == ((6, 4, 2, 2), (6, 2, 90))
    assert asked[0][3] == pytest.approx(1, abs=1e-5)
    assert (g[0, :, :3].numpy() == GridIntent()(burn.numpy())[:, :3]).all()
    assert g[0, 0, 3:].tolist() == [[3, 3], [4, 4]]


def test_sampling_leaves_the_users_state_alone():
    model = own("macro").train()
    state = torch.random.get_rng_state()
    one, _ = model.sample(data("macro").x[:, :3], 4, generator=seeded())
    two, _ = model.sample(data("macro").x[:, :3], 4, generator=seeded())
    assert torch.equal(one, two)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not torch.equal(model.sample(data("macro").x[:, :3], 4, n=2)[0][0], one[0])


def test_absent_agents_stay_absent():
    model = own("tied")
    burn = data("tied").x[:, :5].clone()
    burn[0, 4, 1] = torch.nan
    x, _ = model.sample(burn, 3)
    assert x[0, 0, 5:, 1].isnan().all()
    assert x[0, 1:].isfinite().all()
    assert x[0, 0, :, 0].isfinite().all()


def test_abstaining_is_ignored_and_has_a_code_of_its_own():
    model = own("macro")
    for p in model.macro.second.parameters():
        torch.nn.init.zeros_(p)
    batch = data("macro")
    g = batch.intents.clone()
    g[:, ::2] = -1
    nll = model.intent_nll(TrackBatch(batch.x, g))
    assert torch.allclose(nll, torch.full_like(nll, 4 * 3 * np.log(4)))
    assert not torch.equal(
        model.loss(TrackBatch(batch.x, g), generator=seeded())["nll"],
        model.loss(TrackBatch(batch.x, g.clamp(min=3)), generator=seeded())["nll"],
    )


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (torch.zeros(2, 5, 6), "float tensor"),
        (torch.zeros(2, 5, 4, 2), "3 agents"),
        (torch.zeros(2, 5, 3, 2), "macro-intents: give"),
        ((torch.zeros(2, 5, 3, 2), torch.zeros(2, 5, dtype=torch.long)), r"must be \(2, 5, 3\)"),
        ((torch.zeros(2, 5, 3, 2), torch.full((2, 5, 3), 4)), "0 to 3"),
        ((torch.zeros(2, 5, 3, 2), torch.zeros(2, 5, 3)), "whole numbers"),
        ((torch.zeros(2, 5, 3, 2), None, torch.ones(2, 5)), "mask"),
        ({"y": torch.zeros(2, 5, 3, 2)}, "a batch has x"),
    ],
)
def test_bad_batches(batch, match):
    with pytest.raises(InvalidInput, match=match):
        MacroVRNN(3, 4, z=2, hidden=4, rnn=4).loss(batch)


@pytest.mark.parametrize(
    ("intents", "match"),
    [(np.zeros((5, 2), int), r"\(6, 3\)"), (np.zeros((6, 3)), "whole numbers"), (np.full((6, 3), 4), "0 to 3")],
)
def test_bad_intents(intents, match):
    with pytest.raises(InvalidInput, match=match):
        MacroVRNN(3, 4, z=2, hidden=4, rnn=4).sample(torch.zeros(1, 4, 3, 2), 6, intents)
    with pytest.raises(InvalidInput, match="no macro-intents"):
        VRNNIndep(3, z=2, hidden=4, rnn=4).sample(torch.zeros(1, 4, 3, 2), 6, intents)


def test_weights_of_another_model_are_refused(official):
    d = official("model_vrnn_indep")
    state = {k[2:]: torch.from_numpy(v) for k, v in d.items() if k.startswith("w/")}
    missing = {k: v for k, v in state.items() if k != "prior.1.2.weight"}
    with pytest.raises(InvalidInput, match="another kind"):
        load_official_weights(MODELS["vrnn_indep"](), missing)
    with pytest.raises(InvalidInput, match="entries that the model lacks"):
        load_official_weights(MODELS["vrnn_indep"](), state | {"more": torch.zeros(1)})
    with pytest.raises(InvalidInput, match="the model has"):
        load_official_weights(VRNNIndep(3, z=2, hidden=6, rnn=4), state)
    with pytest.raises(InvalidInput, match="no model like"):
        load_official_weights(torch.nn.Linear(1, 1), state)


@pytest.mark.parametrize("name", MODELS)
def test_any_floating_type_of_tracks(name):
    model = MODELS[name]()
    x = torch.randn(4, 6, 3, 2, dtype=torch.float64)
    g = torch.randint(4, (4, 6) if "shared" in name else (4, 6, 3))
    batch = lambda v: (v, g) if name.startswith("macro") else v  # noqa: E731
    eps = torch.randn(4, 2) if name == "vrae_mi" else torch.randn(4, 5, 3, 2)
    options = {} if name == "rnn_gauss" else {"eps": eps[:, :, :1] if name == "vrnn_single" else eps}
    same = model.loss(batch(x.float()), **options)["loss"]
    assert model.loss(batch(x), **options)["loss"] == same
    # Tracks come back in the type they were given in: in double precision they may be far from their origin.
    assert model.sample(x, 2)[0].dtype == torch.float64
    assert model.sample(x.float(), 2)[0].dtype == torch.float32
    assert model.log_likelihood(batch(x), 2).dtype == torch.float32
    assert model.double().sample(x.float(), 2)[0].dtype == torch.float64


@pytest.mark.parametrize("name", OWN)
def test_the_loop_with_its_own_backward_is_the_plain_one(name, monkeypatch):
    model, batch = own(name), data(name)
    x = batch.x.clone()
    x[1, 3:6, 1], x[2, 5:] = torch.nan, torch.nan
    eps = torch.randn(4, 8, 1 if name == "single" else 3, 2, generator=seeded(), dtype=torch.float64)
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(vrnn, "recurrence", lambda *inputs: None)
        for given in (batch, TrackBatch(x, batch.intents)):
            model.zero_grad()
            terms = model.loss(given, eps=eps)
            (terms["nll"] + 0.3 * terms["kl"]).backward()
            found.append([terms["loss"].detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert all(close(a, b, 1e-12) for a, b in zip(ours, theirs, strict=True))


def test_transforms_of_functions_take_the_plain_loop():
    model, x = own("indep"), data("indep").x
    eps = torch.randn(4, 8, 3, 2, generator=seeded(), dtype=torch.float64)
    weights = {k: v.detach() for k, v in model.named_parameters()}

    def loss(w):
        return torch.func.functional_call(model, w, (x,), {"eps": eps})["loss"]

    model.loss(x, eps=eps)["loss"].backward()
    for key, slope in torch.func.grad(loss)(weights).items():
        assert close(slope, model.get_parameter(key).grad, 1e-12), key


@pytest.mark.parametrize("name", MODELS)
def test_an_origin_far_away_costs_no_digits(name):
    """UTM: meters with six digits before the point, and steps of centimeters."""
    far = torch.tensor([448_262.0, 5_411_932.0], dtype=torch.float64)
    near, there = MODELS[name](), MODELS[name]()
    there.load_state_dict(near.state_dict())
    there.shift += far.repeat(3) if name == "vrnn_single" else far
    x = 0.01 * torch.randn(4, 6, 3, 2, dtype=torch.float64).cumsum(1)
    x = (x * 2**20).round() / 2**20  # so that the sum below is exact
    g = torch.randint(4, (4, 6) if "shared" in name else (4, 6, 3))
    batch = lambda v: (v, g) if name.startswith("macro") else v  # noqa: E731
    one, two = (m.loss(batch(v), **fixed(name)) for m, v in ((near, x), (there, x + far)))
    for key, value in one.items():
        assert close(value, two[key], 1e-6), key
    same = [m.sample(v, 3, generator=seeded())[0] for m, v in ((near, x), (there, x + far))]
    assert same[1].dtype == torch.float64
    assert (same[1] - far - same[0]).abs().max() < 1e-5


def fixed(name):
    """Options that fix a loss's draws."""
    if name == "rnn_gauss":
        return {}
    shape = (4, 2) if name == "vrae_mi" else (4, 5, 1 if name == "vrnn_single" else 3, 2)
    return {"eps": torch.randn(shape, generator=seeded())}


def test_options_are_checked_at_the_door():
    whole = np.int64(3)
    assert (
        MacroVRNN(whole, np.int64(4), z=whole, hidden=whole, rnn=whole).sample(torch.randn(2, 3, 3, 2), 1)[1].max() < 4
    )
    for wrong, said in (
        ({"scale": [1.0, 2.0, 3.0]}, "scale must be one number, or 2"),
        ({"shift": "a"}, "shift must be a number, or one for each"),
        ({"macro_rnn": 0}, "macro_rnn must be"),
        ({"neighbors": -1}, "neighbors must be"),
        ({"wiring": Wiring(encoder="q")}, "encoder of a Wiring reads some of x, y, h, g"),
        ({"wiring": Wiring(decoder="")}, "decoder of a Wiring"),
        ({"wiring": Wiring(prior="xyh")}, "prior of a Wiring reads some of y, h, g"),
    ):
        with pytest.raises(InvalidInput, match=said):
            MacroVRNN(3, 4, **wrong)
    for kind in (RNNGauss, VRAEMI):
        for wrong in ({"hidden": 0}, {"min_std": -1}, {"rnn": 0}, {"scale": [1.0] * 3}):
            with pytest.raises(InvalidInput, match=f"{next(iter(wrong))} must be"):
                kind(3, **wrong)
    with pytest.raises(InvalidInput, match="got ndarray"):
        VRNNIndep(3, **SIZES).sample(np.zeros((1, 3, 3, 2)), 1)
    single = VRNNSingle(3, shift=np.array([1.0, 2.0]), **SIZES)
    assert single.shift.tolist() == [1.0, 2.0] * 3


def test_latent_use_in_closed_form():
    model = MacroVRNN(3, 4, **SIZES).double()
    with torch.no_grad():
        for net in (model.encoder, model.prior, model.decoder):
            for p in net.parameters():
                p.zero_()
    x, g = torch.randn(4, 6, 3, 2, dtype=torch.float64), torch.randint(4, (4, 6, 3))
    x[0, 2:4, 1] = torch.nan
    assert model.latent_use((x, g)) == {"kl": 0.0, "active": 0.0, "gain": 0.0}
    with torch.no_grad():
        model.encoder.heads.bias[:, 0] = 0.5  # the mean of the first dimension; deviations are ln 2
    use = model.latent_use((x, g))
    assert use["kl"] == pytest.approx(0.5**2 / (2 * np.log(2) ** 2))
    assert (use["active"], use["gain"]) == (1.0, 0.0)
    assert model.latent_use((x, g), active=0.3)["active"] == 0
    assert model.training


@pytest.mark.parametrize("name", OWN)
def test_mixed_precision_and_frozen_parts(name):
    model = own(name).float()
    batch = TrackBatch(data(name).x.float(), data(name).intents)
    exact = model.loss(batch, generator=seeded())["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(batch, generator=seeded())["loss"]
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.05)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    model.encoder.requires_grad_(False)
    model.loss(batch, generator=seeded())["loss"].backward()
    assert model.encoder.first.weight.grad is None
    assert float(model.rnn.into[0].weight.grad.abs().sum()) > 0


def test_the_share_at_the_floor_in_closed_form():
    model = VRNNIndep(3, z=2, hidden=5, rnn=4, min_std=0.01).double()
    x = torch.randn(4, 6, 3, 2, generator=seeded(), dtype=torch.float64)
    x[1, 3:, 2] = torch.nan
    assert model.at_floor(x) == 0.0
    with torch.no_grad():
        model.decoder.heads.weight.zero_()
        model.decoder.heads.bias[0, 2] = -20.0  # the first coordinate of the first agent
        model.decoder.heads.bias[2, 2:] = -20.0  # both of the third, who has 3 of 20 steps fewer
    assert model.at_floor(x) == pytest.approx((20 + 2 * 17) / (2 * 57))
    assert VRNNIndep(3, z=2, hidden=5, rnn=4, min_std=0.0).at_floor(x) == 0.0


def gradients_of_two(rank, size):
    torch.manual_seed(0)
    model = MacroVRNN(3, 4, **SIZES).double()
    x, g, eps = torch.randn(4, 6, 3, 2).double(), torch.randint(4, (4, 6, 3)), torch.randn(4, 5, 3, 2).double()
    whole = copy.deepcopy(model)
    whole.loss((x, g), eps=eps)["loss"].backward()
    mine = slice(2 * rank, 2 * rank + 2)
    parallel = torch.nn.parallel.DistributedDataParallel(model)  # its hooks live as long as it does
    parallel((x[mine], g[mine]), eps=eps[mine])["loss"].backward()
    pairs = list(zip(model.parameters(), whole.parameters(), strict=True))
    return {
        "worst": max((a.grad - b.grad).abs().max() for a, b in pairs),
        "size": whole.encoder.heads.weight.grad.norm(),
    }


def test_two_processes_train_as_one(in_processes):
    for found in in_processes(__file__, "gradients_of_two", 2):
        assert found["worst"] < 1e-10
        assert found["size"] > 1e-3
