"""find_symmetries on networks as users write them, and on input it cannot use."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.neural_mechanics.find import TracingFailed, find_symmetries

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class BasicBlock(nn.Module):
    """As in every tutorial."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, width=4, classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = BasicBlock(width, width, 1)
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def exact(laws):
    return [law for law in laws if law.broken_by is None]


def test_a_plain_resnet():
    torch.manual_seed(0)
    model = ResNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    laws = find_symmetries(model, IMAGES, F.cross_entropy)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert laws.unhandled == ()
    assert max(law.residual for law in exact(laws)) <= 1e-12
    assert max(law.certificate["action"] for law in exact(laws)) <= 1e-12
    scales = laws.of_kind("scale")
    assert len(scales) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert scales.n_laws == sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    assert all(law.broken_by.startswith("eps of ") and law.residual < 1e-2 for law in scales)
    stream = laws["rescale:bn1->layer1.conv1"]  # everything that meets in the first stage's residual stream
    assert {(t.parameter, t.sign) for t in stream.terms} == {
        *(("bn1.weight", 1), ("bn1.bias", 1), ("layer1.bn2.weight", 1), ("layer1.bn2.bias", 1)),
        *(("layer1.conv1.weight", -1), ("layer2.0.conv1.weight", -1), ("layer2.0.shortcut.0.weight", -1)),
    }
    assert laws["translation:fc"].n_laws == 9
    frame = laws.to_frame()
    assert (frame.loc[frame.p_value.notna(), "p_value"] < 0.05).all()


def test_a_vgg_with_a_dropout_classifier_and_without_batch_norm():
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 5)),
    )
    laws = find_symmetries(model, IMAGES, nn.CrossEntropyLoss())
    assert {law.name: law.n_laws for law in laws} == {
        "translation:11": 9, "rescale:0->3": 4, "rescale:3->8": 6, "rescale:8->11": 8,
    }  # fmt: skip
    assert max(law.residual for law in laws) <= 1e-12


def test_all_laws_of_a_small_network_are_found():
    """Completeness: the rank of the space of generators that annihilate all gradients, by brute force."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    laws = find_symmetries(model, torch.randn(8, 3, dtype=torch.float64))
    rows = []
    for k in range(60):
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        grads = torch.autograd.grad((model(x) * torch.randn(8, 2)).sum(), list(model.parameters()))
        rows.append(torch.cat([(g * p).flatten() for g, p in zip(grads, model.parameters(), strict=True)]).detach())
    table = torch.stack(rows)
    rank = int((torch.linalg.svdvals(table) > 1e-9 * torch.linalg.svdvals(table)[0]).sum())
    assert laws.n_laws == table.shape[1] - rank == 4


def test_the_two_methods_agree_where_both_see():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.LeakyReLU(0.2), nn.Linear(5, 3))
    by_graph, by_numbers = (find_symmetries(model, X, F.cross_entropy, method=m) for m in ("both", "numerical"))
    for law in by_graph.of_kind("rescale"):
        assert {(t.parameter, t.sign) for t in law.terms} == {(t.parameter, t.sign) for t in by_numbers[law.name].terms}
    assert by_graph.n_laws == by_numbers.n_laws == 7 + 5 + 6


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        if h.sum() > 0:
            h = 2 * h
        return self.b(h)


def test_control_flow_on_data_falls_back_to_numbers_and_is_named():
    torch.manual_seed(4)
    laws = find_symmetries(Branching(), X)
    assert laws["rescale:a->b"].n_laws == 5
    assert laws["rescale:a->b"].certificate["found_by"] == "numbers"
    assert "could not be traced" in laws.unhandled[0]
    assert "test_nm_find" in laws.unhandled[0]
    with pytest.raises(TracingFailed):
        find_symmetries(Branching(), X, method="structural")


def test_numbers_find_what_an_operator_without_a_rule_hides():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.c(torch.special.erfcx(self.b(torch.hypot(F.relu(self.a(x)), torch.zeros(5, dtype=x.dtype)))))

    torch.manual_seed(5)
    laws = find_symmetries(Odd(), X)
    assert any("hypot" in note for note in laws.unhandled)
    assert laws["rescale:a->b"].certificate["found_by"] == "numbers"


def test_a_bare_norm_module_has_its_answer():
    assert len(find_symmetries(nn.BatchNorm2d(3), IMAGES)) == 0
    assert len(find_symmetries(nn.LayerNorm(4), X)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_s_type_is_its_own(dtype):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    law = find_symmetries(model, X.to(dtype))["rescale:0->2"]
    assert law.residual < 1e-12
    assert model[0].weight.dtype == dtype


def test_code_that_fixes_a_type_is_probed_in_it():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
            self.table = torch.eye(4)

        def forward(self, x):
            return self.b(F.relu(self.a(x @ self.table)))

    torch.manual_seed(7)
    law = find_symmetries(Fixed(), X)["rescale:a->b"]
    assert law.certificate["dtype"] == "float32"
    assert law.residual < 1e-5


def test_keyword_inputs_and_targets_of_any_shape():
    class Segment(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

        def forward(self, image, scale=1.0):
            return self.b(F.relu(self.a(image))) * scale

    torch.manual_seed(8)
    laws = find_symmetries(Segment(), {"image": IMAGES}, nn.CrossEntropyLoss())
    assert {law.name: law.n_laws for law in laws} == {"translation:b": 5, "rescale:a->b": 4}


def test_same_seed_same_numbers():
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    first, second = (find_symmetries(model, X, F.cross_entropy, seed=3).to_frame() for _ in range(2))
    assert first.equals(second)


def sparse_model():
    model = nn.Linear(4, 2)
    model.weight = nn.Parameter(torch.eye(2, 4).to_sparse())
    return model


def frozen_model():
    return nn.Linear(4, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_symmetries(lambda x: x, X), "must be a torch.nn.Module"),
        (lambda: find_symmetries(nn.Linear(4, 2), "x"), "example_inputs must be"),
        (lambda: find_symmetries(nn.LazyLinear(2), X), "lazy"),
        (lambda: find_symmetries(nn.Linear(4, 2, dtype=torch.complex64), X), "complex"),
        (lambda: find_symmetries(sparse_model(), X), "sparse"),
        (lambda: find_symmetries(frozen_model(), X), "no trainable parameters"),
        (lambda: find_symmetries(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), X[:1]), "at least 2 examples"),
        (lambda: find_symmetries(nn.Linear(4, 2), X, tol=0.0), "tol"),
        (lambda: find_symmetries(nn.Linear(4, 2), X, batches=0), "batches"),
        (lambda: find_symmetries(nn.Linear(4, 2), X, 3), "loss_fn"),
        (lambda: find_symmetries(nn.Linear(4, 2), X[:, :3]), "does not run"),
        (lambda: find_symmetries(nn.Linear(4, 2), X, lambda z, y: z.sum(1), targets=X), "one number"),
        (lambda: find_symmetries(nn.Linear(4, 2), X, lambda z, y: (z * math.inf).sum(), targets=X), "not finite"),
        (lambda: find_symmetries(nn.Linear(4, 2), X, lambda z, y: z[y, y, y].sum()), "targets"),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()


def test_an_unknown_method_is_named():
    with pytest.raises(UnknownName, match="sideways"):
        find_symmetries(nn.Linear(4, 2), X, method="sideways")


def test_hugging_face_models_need_no_adapter():
    import transformers

    torch.manual_seed(10)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    tokens = torch.randint(30, (2, 7))
    laws = find_symmetries(
        transformers.LlamaForCausalLM(config),
        {"input_ids": tokens, "use_cache": False},
        lambda out, y: F.cross_entropy(out.logits.flatten(0, 1), y.flatten()),
        targets=tokens,
    )
    assert laws.unhandled == ()
    layer = "model.layers.0.self_attn"
    assert laws[f"rescale:{layer}.q_proj->{layer}.k_proj"].n_laws == 4
    assert laws[f"matrix:{layer}.v_proj->{layer}.o_proj"].n_laws == 20
    assert max(law.residual for law in exact(laws)) <= 1e-12


def test_empty_inputs_are_refused():
    with pytest.raises(InvalidInput, match=r"example_inputs are empty, \(0, 4\)"):
        find_symmetries(nn.Linear(4, 2), torch.ones(0, 4))
