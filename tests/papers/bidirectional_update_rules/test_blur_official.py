"""The update rule gives the official code's numbers, branch by branch and over whole steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mlcollage.papers.bidirectional_update_rules import (
    Genome,
    GenomeSettings,
    Weights,
    functional_forward,
    functional_step,
    rule,
)
from mlcollage.papers.bidirectional_update_rules._activations import ACTIVATIONS
from mlcollage.papers.bidirectional_update_rules._layers import from_sizes

FOLDER = Path(__file__).parent / "official"
OURS = {
    "nu": "nu", "mu": "mu", "hebb_pre": "heb_pre", "hebb_post": "heb_post", "keep": "keep", "update": "update",
    "synapse_keep": "syn_keep", "synapse_update": "syn_update", "forward_hebb_pre": "fheb_pre",
    "forward_hebb_post": "fheb_post", "forward_synapse_keep": "fsyn_keep", "forward_synapse_update": "fsyn_update",
}  # fmt: skip
RELU_TANH = {"activation": "relu_tanh", "backward_activation": "relu_tanh", "top_activation": "tanh"}
ASYM, TIED = {"symmetric": False}, {"symmetric": False, "tied": True}
# variant: its file, settings, and the constants that the official code takes as options
VARIANTS = {
    "additive_asym": ("a", ASYM | RELU_TANH, {}),
    "additive_asym_single": ("a", ASYM | RELU_TANH | {"multistate": False}, {}),
    "additive_asym_tanh": ("a", ASYM, {}),
    "additive_sym": ("a", RELU_TANH, {}),
    "additive_sym_single": ("a", RELU_TANH | {"multistate": False}, {}),
    "forward_update": ("a", ASYM | {"forward_update": True}, {}),
    "mult2_asym": ("a", ASYM | {"backward": "multiplicative_second"}, {}),
    "mult2_sym": ("a", {"backward": "multiplicative_second"}, {}),
    "mult_asym": ("a", ASYM | {"backward": "multiplicative"}, {}),
    "mult_sym": ("a", {"backward": "multiplicative"}, {}),
    "use_forward_activations": ("a", ASYM | {"hebb_pre_states": "forward"}, {}),
    "keep_neurons": ("b", ASYM, {}),
    "normalize_in_use": ("b", ASYM | {"synapse_norm": "in_use"}, {}),
    "normalize_stored": ("b", ASYM | {"synapse_norm": "stored"}, {"synapse_gain": 1.7}),
    "oja_act_mult_sym": ("b", TIED | {"oja": "activations"}, {"oja": 0.5 * 1.3}),
    "oja_weights_asym": ("b", ASYM | {"oja": "weights"}, {"oja": 0.5}),
    "oja_weights_sym": ("b", TIED | {"oja": "weights"}, {"oja": 0.5}),
    "per_layer_genome": ("b", ASYM | {"layers": 3}, {}),
    "saturation_alphatanh": ("b", ASYM | {"saturation": "tanh"}, {"saturation": 0.8}),
    "saturation_exp": ("b", ASYM | {"saturation": "exp"}, {"saturation": -0.7}),
    "supervised_every2": ("b", ASYM, {}),
}


@pytest.fixture(scope="module")
def files():
    names = ("parts", "inner_steps_a", "inner_steps_b", "backprop")
    return {name: dict(np.load(FOLDER / f"{name}.npz", allow_pickle=False)) for name in names}


def double(values):
    return torch.tensor(np.asarray(values, np.float64))


def synapses(values):
    """(S, 1, n + 1, m, k) as (S, k, n + 1, m)."""
    return double(values)[:, 0].permute(0, 3, 1, 2)


def states(values):
    """(S, 1, B, n, k) as (S, k, B, n)."""
    return double(values)[:, 0].permute(0, 3, 1, 2)


def case(files, variant):
    """Path, start weights and genome of a variant."""
    part, settings, constants = VARIANTS[variant]
    file = files[f"inner_steps_{part}"]
    s = GenomeSettings(
        **{"k": 3, "norm": "none", "reduction": "sum", "initial_scale": "plain", "step_scale": "plain", **settings}
    )
    numbers = {}
    for name, shape in s.shapes().items():
        found = file.get(f"{variant}/genome_{OURS.get(name, name)}")
        if found is None:
            numbers[name] = torch.full((2, *shape), constants.get(name, 1.0), dtype=torch.float64)
        elif s.layers:
            numbers[name] = double(found).transpose(0, 1).contiguous()
        else:
            numbers[name] = double(found).expand(2, *shape) if np.ndim(found) == 0 else double(found)
    path = from_sizes(file["sizes"].tolist(), ACTIVATIONS[s.activation], ACTIVATIONS[s.top_activation])
    forward = [synapses(file[f"wf{i}"])[:, : s.channels] for i in range(3)]
    backward = []
    if not s.symmetric:
        own = [synapses(file[f"wb{i}"])[:, : s.channels, :, :-1] for i in range(3)]
        backward = [w[:, :, :-1].transpose(2, 3) for w in forward] if s.tied else own
    return path, Weights(tuple(forward), tuple(backward)), Genome(s, numbers), file


def given(logits, y):
    return y


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_steps(files, variant):
    path, w, genome, file = case(files, variant)
    s, kept = genome.settings, None
    for t in range(1 if variant == "oja_weights_asym" else 2):  # later the official sum covers unused blocks there
        y = None if variant == "supervised_every2" and t == 1 else double(file["y"][t])[:, 0]
        step = functional_step(path, w, genome, double(file["x"][t])[:, 0], y, feedback=given, states=kept)
        w, kept = step.weights, step.states if variant == "keep_neurons" else None
        for i in range(2):
            expected = states(file[f"{variant}/t{t}_bwd_l{i + 1}"])
            torch.testing.assert_close(step.states[i], expected, rtol=1e-12, atol=1e-12)
        for i in range(3):
            expected = synapses(file[f"{variant}/t{t}_wf{i}"])[:, : s.channels]
            torch.testing.assert_close(w.forward[i], expected, rtol=1e-12, atol=1e-12)
            if not s.symmetric and i:  # the first layer's carry no feedback
                expected = synapses(file[f"{variant}/t{t}_wb{i}"])[:, : s.channels, :, :-1]
                torch.testing.assert_close(w.backward[i], expected, rtol=1e-12, atol=1e-12)
    if variant != "oja_weights_asym":
        top, _ = functional_forward(path, w, genome, double(file["x"][2])[:, 0], states=kept)
        torch.testing.assert_close(top, states(file[f"{variant}/final_top"])[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["additive_asym_tanh", "mult2_sym", "oja_act_mult_sym"])
@pytest.mark.parametrize("loss", ["l2", "ce"])
def test_meta_gradients(files, variant, loss):
    path, w, genome, file = case(files, variant)
    numbers = {n: v.clone().requires_grad_() for n, v in genome.numbers.items()}
    genome = Genome(genome.settings, numbers)
    for t in range(2):
        x, y = (double(file[name][t])[:, 0] for name in "xy")
        w = functional_step(path, w, genome, x, y, feedback=given).weights
    top, _ = functional_forward(path, w, genome, double(file["x"][2])[:, 0])
    y = double(file["y"][2])[:, 0]
    if loss == "l2":
        value = (top - y).square().flatten(1).mean(1)
    else:
        value = F.cross_entropy(top.flatten(0, 1), y.argmax(-1).flatten(), reduction="none").reshape(2, -1).mean(1)
    torch.testing.assert_close(value.detach(), double(file[f"{variant}/meta_{loss}"]), rtol=1e-12, atol=1e-12)
    value.sum().backward()
    for ours, theirs in OURS.items():
        expected = file.get(f"{variant}/meta_{loss}_grad_{theirs}")
        if expected is None or ours not in numbers:
            continue
        found = numbers[ours].grad
        if np.ndim(expected) == 0:  # one number for both species there
            found = found.sum()
        torch.testing.assert_close(found, double(expected), rtol=1e-11, atol=1e-12, msg=ours)


def test_the_backprop_genome_on_the_official_numbers(files):
    file = files["backprop"]
    genome = Genome.backprop(
        learning_rate=float(file["lr"]), activation="sigmoid", top_activation="sigmoid", reduction="sum",
        dtype=torch.float64,
    )  # fmt: skip
    path = from_sizes(file["sizes"].tolist(), ACTIVATIONS["sigmoid"], ACTIVATIONS["sigmoid"])
    w = Weights(tuple(double(file[f"w{i}_start"])[None, None] for i in range(3)))
    for t in range(10):
        x, y = double(file["x"][t])[None], double(file["y"][t])[None]
        w = functional_step(path, w, genome, x, y, feedback=lambda h, y: h - y).weights
        for i in range(3):
            torch.testing.assert_close(w.forward[i][0, 0], double(file[f"w{i}"][t]), rtol=1e-12, atol=1e-12)


class TestParts:
    """Single functions; species and replicas are one population of four."""

    @pytest.fixture
    def read(self, files):
        parts = files["parts"]
        return lambda name: double(parts[name]).flatten(0, 1).permute(0, 3, 1, 2)

    @pytest.fixture
    def per_member(self, files):
        return lambda name: double(files["parts"][name]).repeat_interleave(2, 0)

    def near(self, a, b):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("kind", "gain"), [("plain", None), ("norm", 1.0), ("norm_rescale1p7", 1.7)])
    def test_messages(self, read, per_member, kind, gain):
        numbers = {"nu": per_member("nu"), "mu": per_member("mu")}
        up, down = read("w_fwd"), read("w_bwd")[..., :-1]
        if gain is not None:
            gains = torch.full((4,), gain, dtype=torch.float64)
            up, down = (rule.normalized(w, gains) for w in (up, down))
        self.near(rule.forward_message(read("pre"), up, numbers), read(f"syn_{kind}_fwd"))
        self.near(rule.backward_message(read("post"), down, numbers), read(f"syn_{kind}_bwd"))

    def test_a_dead_column_stays_finite(self, read):
        ones = torch.ones(4, dtype=torch.float64)
        self.near(rule.normalized(read("norm_dead_in"), ones), read("norm_dead_out"))

    def test_hebbian_products(self, read, per_member):
        parts = read("pre"), read("post"), per_member("heb_pre"), per_member("heb_post")
        up, down = rule.hebbian(*parts, channels=3), rule.hebbian_back(*parts, channels=3)
        self.near(up, read("heb_inout0_states0_fwd"))
        self.near(down, read("heb_inout0_states0_bwd")[..., :-1])
        self.near(up.transpose(2, 3), read("heb_inout1_states0_bwd"))
        self.near(rule.hebbian(*parts, channels=1).expand(-1, 3, -1, -1), read("heb_inout1_states1_fwd"))

    @pytest.mark.parametrize("mode", ["additive", "multiplicative", "multiplicative_second", "none"])
    @pytest.mark.parametrize(("name", "activation"), [("id", "identity"), ("relu_tanh", "relu_tanh"), ("tanh", "tanh")])
    @pytest.mark.parametrize("gates", ["scalar", "species"])
    def test_neurons(self, read, per_member, mode, name, activation, gates):
        if gates == "scalar":
            numbers = {n: torch.full((4,), v, dtype=torch.float64) for n, v in (("keep", 0.8), ("update", -0.6))}
        else:
            numbers = {n: per_member(n) for n in ("keep", "update")}
        s = GenomeSettings(k=3, backward=mode)
        found = rule.feed_back(read("old"), read("upd"), numbers, s, ACTIVATIONS[activation])
        official = "multiplicative_second_state" if mode == "multiplicative_second" else mode
        self.near(found, read(f"neuron_{official}_{name}_{gates}"))

    @pytest.mark.parametrize("mult", [0, 1])
    @pytest.mark.parametrize("sign", ["pos", "neg"])
    @pytest.mark.parametrize("kind", ["activations", "weights"])
    def test_oja(self, read, per_member, mult, sign, kind):
        amount = 0.3 * (1.4 if mult else 1.0)
        numbers = {
            "oja": torch.full((4,), amount, dtype=torch.float64),
            "synapse_update": torch.full((4,), 0.01 if sign == "pos" else -0.01, dtype=torch.float64),
            "hebb_post": per_member("heb_post"),
        }
        s = GenomeSettings(k=3, oja=kind, reduction="sum")
        found = rule.inhibition(read("w_fwd"), read("post"), numbers, s)
        self.near(found, read(f"oja_weights{int(kind == 'weights')}_mult{mult}_{sign}_fwd"))

    @pytest.mark.parametrize(("official", "ours"), [("plain", "none"), ("alphatanh", "tanh"), ("exp", "exp"),
                                                    ("exp_tanh", "exp_tanh")])  # fmt: skip
    @pytest.mark.parametrize("gates", ["scalar", "species"])
    def test_changes_of_synapses(self, read, per_member, official, ours, gates):
        h = rule.hebbian(read("pre"), read("post"), per_member("heb_pre"), per_member("heb_post"), channels=3)
        if gates == "scalar":
            keep, update = (torch.full((4,), v, dtype=torch.float64) for v in (0.9, -0.05))
        else:
            keep, update = per_member("syn_keep"), per_member("syn_update")
        limit = {"saturation": torch.full((4,), 0.8 if ours == "tanh" else -0.7, dtype=torch.float64)}
        self.near(rule.change(read("w_fwd"), h, keep, update, limit, ours), read(f"wstate_{official}_{gates}_fwd"))
