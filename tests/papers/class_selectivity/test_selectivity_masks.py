"""Padding, void and batches of many parts: what does not count changes nothing, in any instrument."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlcollage.errors import InvalidInput
from mlcollage.measure.representation import as_samples
from mlcollage.nn.init import seeded
from mlcollage.papers.class_selectivity import (
    LightningSelectivity,
    SelectivityRegularizer,
    ablate_units,
    measure_selectivity,
    representations,
    selectivity_index,
)

Y = torch.arange(24) % 3
LENGTHS = 2 + torch.arange(24) % 4  # two to five words
MASK = torch.arange(5) < LENGTHS[:, None]


class Words(nn.Module):
    """Each word by itself, then the mean over the words that count."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.relu, self.head = nn.Embedding(20, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        h = self.relu(self.up(self.embed(input_ids)))
        return self.head((h * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


@pytest.fixture
def words():
    with seeded(0):
        model = Words()
        ids = torch.randint(1, 20, (24, 5)) * MASK
    with torch.no_grad():
        model.embed.weight[0] = 100.0  # a padding word that drowns all others, if it counts
    return model, ids


def own_words(model, ids):
    """Mean responses (N, U) over the words that there are, one sentence after the other."""
    return torch.stack([model.relu(model.up(model.embed(s[:n]))).mean(0) for s, n in zip(ids, LENGTHS, strict=True)])


def index_of(rows, labels=Y):
    return selectivity_index(torch.stack([rows[labels == c].detach().double().mean(0) for c in range(3)]))


NAMES = ("input_ids", "attention_mask", "labels")


def test_padding_is_in_no_mean(words):
    model, ids = words
    rows = own_words(model, ids)
    expected = index_of(rows)
    for data, parts in [
        ((ids, MASK, Y), NAMES),
        ([(ids[:10], MASK[:10], Y[:10]), (ids[10:], MASK[10:], Y[10:])], NAMES),
        ({"input_ids": ids, "attention_mask": MASK.long(), "labels": Y}, None),
        ([({"input_ids": ids, "attention_mask": MASK}, Y)], None),
    ]:
        report = measure_selectivity(model, data, parts=parts)
        np.testing.assert_allclose(report.per_unit["si"], expected, atol=1e-6)
        torch.testing.assert_close(representations(model, data, parts=parts)["relu"], rows)
        table = ablate_units(model, data, report=report, parts=parts, fractions=(0.0, 1.0))
        logits = model(ids, MASK)
        assert table["accuracy"][0] == pytest.approx(float((logits.argmax(1) == Y).double().mean()))
    every = representations(model, (ids, MASK, Y), parts=NAMES, space="positions")["relu"]
    assert len(every) == int(LENGTHS.sum())
    counted = {"attention_mask": "attention_mask+_"}
    wrong = measure_selectivity(model, {"input_ids": ids, "attention_mask": MASK, "y": Y}, parts=counted)
    assert abs(wrong.per_unit["si"] - expected.numpy()).max() > 0.1, "padding would have mattered"


def test_the_regularizer_reads_the_mask_that_the_model_is_given(words):
    model, ids = words
    with SelectivityRegularizer(model, -1.0) as penalty:
        term = []
        for call in (lambda: model(ids, MASK), lambda: model(input_ids=ids, attention_mask=MASK.long())):
            call()
            term.append(penalty(Y))
        plain = index_of(own_words(model, ids)).mean()
        assert [float(t.detach()) for t in term] == pytest.approx([float(plain)] * 2, abs=1e-5)
        model.zero_grad()
        term[1].backward()
    found = model.up.weight.grad.clone()
    model.zero_grad()
    rows = own_words(model, ids)
    selectivity_index(torch.stack([rows[c == Y].mean(0) for c in range(3)])).mean().backward()
    torch.testing.assert_close(found, model.up.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_mask_of_samples_and_one_that_the_user_makes(words):
    model, ids = words
    keep = torch.arange(24) >= 6
    with SelectivityRegularizer(model, -1.0, mask=lambda ids, mask: mask * keep[:, None]) as penalty:
        model(ids, MASK)
        expected = index_of(own_words(model, ids)[keep], Y[keep]).mean()
        assert float(penalty(Y).detach()) == pytest.approx(float(expected), abs=1e-5)
    with_mask = {"input_ids": ids, "attention_mask": MASK, "keep": MASK * keep[:, None], "y": Y}
    report = measure_selectivity(model, with_mask, parts={"attention_mask": "attention_mask+_", "keep": "mask"})
    assert report.mean == pytest.approx(float(expected), abs=1e-6)
    assert report.counts.sum() == 18


def test_labels_of_words_leave_out_padding_and_what_is_ignored(words):
    model, ids = words
    labels = torch.randint(3, (24, 5), generator=torch.Generator().manual_seed(1))
    labels[:, 0] = -100  # as for the special words of language models
    rows = model.relu(model.up(model.embed(ids))).detach()
    kept = MASK & (labels != -100)
    expected = index_of(rows[kept], labels[kept])
    data = {"input_ids": ids, "attention_mask": MASK, "labels": labels}
    np.testing.assert_allclose(measure_selectivity(model, data).per_unit["si"], expected, atol=1e-6)
    with SelectivityRegularizer(model, -1.0, dense=True) as penalty:
        model(ids, MASK)
        assert float(penalty(labels).detach()) == pytest.approx(float(expected.mean()), abs=1e-5)


def test_void_pixels_are_no_class():
    with seeded(0):
        model, x = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU()), torch.randn(6, 1, 5, 5)
    y = torch.randint(3, (6, 5, 5), generator=torch.Generator().manual_seed(0))
    y[:, 0] = 255
    rows, kept = model(x).detach().movedim(1, -1), y != 255
    expected = index_of(rows[kept], y[kept])
    for options in ({"ignore_index": 255}, {"ignore_index": 255, "num_classes": 3}):
        np.testing.assert_allclose(measure_selectivity(model, (x, y), **options).per_unit["si"], expected, atol=1e-6)
        with SelectivityRegularizer(model, -1.0, dense=True, exclude_output=False, **options) as penalty:
            model(x)
            assert float(penalty(y).detach()) == pytest.approx(float(expected.mean()), abs=1e-5)
    with pytest.raises(InvalidInput, match=r"labels run to 2, but for one that is 255, .*: give ignore_index=255"):
        measure_selectivity(model, (x, y))
    with SelectivityRegularizer(model, -1.0, dense=True, exclude_output=False) as penalty:
        model(x)
        with pytest.raises(InvalidInput, match="one that is 255"):
            penalty(y)


def test_parts_that_nobody_would_use_are_refused(words):
    model, ids = words
    for instrument in (measure_selectivity, representations, ablate_units):
        with pytest.raises(InvalidInput, match=r"has 3 parts, .*: name them, such as parts="):
            instrument(model, [(ids, MASK, Y)])
    with pytest.raises(InvalidInput, match="does not take the batch's part 'token_type_ids'"):
        measure_selectivity(model, {"input_ids": ids, "attention_mask": MASK, "token_type_ids": ids, "y": Y})
    with pytest.raises(InvalidInput, match=r"has positions \(5,\), to which the mask's \(4,\) do not fit"):
        as_samples(torch.ones(2, 5, 3), unit_axis=2, mask=torch.ones(2, 4))


def test_lightning_passes_the_mask_on(words):
    import lightning.pytorch as lightning
    from torch.utils.data import DataLoader, TensorDataset

    model, ids = words
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model)

        def forward(self, ids, mask):
            return self.net(ids, mask)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0], batch[1]), batch[2])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = LightningSelectivity(-1.0, "net.relu", parts=("x", "mask", "y"))
    module = Module()
    log = module.log
    module.log = lambda name, value: seen.append(value)
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, DataLoader(TensorDataset(ids, MASK, Y), batch_size=24))
    assert log is not None
    assert seen == pytest.approx([float(index_of(own_words(model, ids)).mean())], abs=1e-5)
    with pytest.raises(InvalidInput, match="has 3 parts"):
        lightning.Trainer(
            max_epochs=1,
            callbacks=[LightningSelectivity(-1.0, "net.relu")],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(Module(), DataLoader(TensorDataset(ids, MASK, Y), batch_size=24))


def test_a_loss_of_another_copy_is_refused(mlp, blobs):
    x, y = blobs
    with SelectivityRegularizer(mlp, -1.0) as penalty:
        other = copy.deepcopy(mlp)  # with the hooks
        mlp(x)
        loss = F.cross_entropy(other(x), y)
        with pytest.raises(InvalidInput, match="a copy of the model ran after it"):
            penalty(y)
        mlp(x)
        with pytest.raises(InvalidInput, match="the loss does not depend on the network that the regularizer reads"):
            penalty(y, loss)
        assert float(penalty(y, F.cross_entropy(mlp(x), y)).detach()) > 0


class Translates(nn.Module):
    """Two sequences, each with padding of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.first, self.down, self.second, self.head = (
            *(layer for _ in range(2) for layer in (nn.Linear(4, 6), nn.ReLU())),
            nn.Linear(12, 3),
        )

    def forward(self, src, tgt, src_key_padding_mask=None, tgt_key_padding_mask=None):
        both = self.first(self.up(src)).mean(1), self.second(self.down(tgt)).mean(1)
        return self.head(torch.cat(both, 1))


def test_the_mask_of_one_sequence_is_not_laid_on_another():
    with seeded(0):
        model, src, tgt = Translates(), torch.randn(24, 5, 4), torch.randn(24, 5, 4)
    batch = {"src": src, "tgt": tgt, "src_key_padding_mask": ~MASK, "labels": Y}
    with pytest.raises(InvalidInput, match=r"masks of several sequences .* parts=\{'src_key_padding_mask'"):
        measure_selectivity(model, batch)
    whole = {**batch, "tgt_key_padding_mask": MASK}
    with pytest.raises(InvalidInput, match=r"2 of the batch's parts .* are its mask: .* 'name\+_'"):
        measure_selectivity(model, whole)
    with SelectivityRegularizer(model, -1.0), pytest.raises(InvalidInput, match=r"several sequences .* give mask="):
        model(src, tgt, src_key_padding_mask=~MASK)

    def own(h, mask):
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    expected = index_of(own(model.first(model.up(src)), MASK))
    parts = {
        "src_key_padding_mask": "src_key_padding_mask+mask",
        "tgt_key_padding_mask": "tgt_key_padding_mask+_",
    }
    found = measure_selectivity(model, whole, "first", parts=parts).per_unit["si"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with SelectivityRegularizer(model, -1.0, "first", mask=lambda *_, **k: MASK) as penalty:
        model(src, tgt, src_key_padding_mask=~MASK)
        assert float(penalty(Y).detach()) == pytest.approx(float(expected.mean()), abs=1e-6)
    # Without padding there is nothing that could be mistaken.
    measure_selectivity(model, {**batch, "src_key_padding_mask": torch.zeros_like(MASK)})
