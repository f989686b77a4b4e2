"""Genomes: forms, files, populations; the shipped ones teach."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine

from mlcollage.errors import InvalidInput, MissingFile, UnknownName
from mlcollage.papers.bidirectional_update_rules import BlurClassifier, Genome, shipped_genomes
from mlcollage.papers.bidirectional_update_rules.recipes import RECIPES


@pytest.mark.parametrize(
    "settings", [{}, {"k": 4, "symmetric": False, "norm": "none"}, {"layers": 2, "oja": "weights"}]
)
def test_vector_and_file_give_back_every_number(tmp_path, settings):
    genome = Genome.random(seed=1, population=3, **settings)
    again = genome.from_vector(genome.to_vector())
    read = Genome.load(genome.save(tmp_path / "g.safetensors"))
    assert read.settings == genome.settings
    for name, value in genome.numbers.items():
        assert torch.equal(again.numbers[name], value)
        assert torch.equal(read.numbers[name], value)
    assert torch.equal(genome[1].to_vector(), genome.to_vector()[1])


def test_shared_and_transposed_tensors_are_saved(tmp_path):
    numbers = dict(Genome.random(seed=2).numbers)
    numbers["mu"] = numbers["nu"].T
    numbers["hebb_pre"] = numbers["nu"]
    genome = Genome(Genome.random(seed=2).settings, numbers)
    genome.card = {"horizon": 3}
    read = Genome.load(genome.save(tmp_path / "g.safetensors"))
    assert torch.equal(read.numbers["mu"], numbers["nu"].T)
    assert read.card == {"horizon": 3}


def test_stacking_and_members():
    members = [Genome.random(seed=i) for i in range(3)]
    stacked = Genome.stack(members)
    assert stacked.population == len(stacked) == 3
    assert [torch.equal(a.to_vector(), b.to_vector()) for a, b in zip(stacked, members, strict=True)] == [True] * 3
    with pytest.raises(InvalidInput, match="share their settings"):
        Genome.stack([members[0], Genome.random(seed=0, k=3)])
    with pytest.raises(InvalidInput, match="no population"):
        members[0][0]


def test_draws_depend_on_the_seed_alone_and_touch_no_global_state():
    before = torch.get_rng_state()
    assert torch.equal(Genome.random(seed=3).to_vector(), Genome.random(seed=3).to_vector())
    assert not torch.equal(Genome.random(seed=3).to_vector(), Genome.random(seed=4).to_vector())
    assert torch.equal(before, torch.get_rng_state())


def test_other_settings_keep_what_they_share():
    genome = Genome.random(seed=5)
    other = genome.with_settings(oja="weights", norm="none")
    assert torch.equal(other.numbers["nu"], genome.numbers["nu"])
    assert float(other.numbers["oja"]) == 1.0
    assert "gain_forward" not in other.numbers


def test_what_is_no_genome_is_refused(tmp_path):
    with pytest.raises(UnknownName, match="digits-2s"):
        Genome.load("digits-3s")
    with pytest.raises(MissingFile):
        Genome.load(tmp_path / "none.safetensors")
    path = Genome.random(seed=0).save(tmp_path / "g.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(InvalidInput, match="damaged"):
        Genome.load(path)
    genome = Genome.random(seed=0)
    with pytest.raises(InvalidInput, match="shape"):
        Genome(genome.settings, {**genome.numbers, "nu": torch.eye(3)})
    with pytest.raises(InvalidInput, match="missing"):
        Genome(genome.settings, {"nu": torch.eye(2)})
    with pytest.raises(InvalidInput, match="29 numbers"):
        genome.from_vector(torch.zeros(3))


@pytest.mark.parametrize("name", shipped_genomes())
def test_a_shipped_genome_has_a_card_and_a_recipe_and_teaches(name):
    genome = Genome.load(name)
    assert genome.card["name"] == name
    assert {"tasks", "validation", "accuracy", "horizon", "batch_size", "recipe"} <= set(genome.card)
    assert genome.settings.k == RECIPES[name].settings["k"]
    X, y = load_digits(return_X_y=True)
    model = BlurClassifier(name, max_steps=20, random_state=0).fit(X[:1000], y[:1000])
    assert model.score(X[1000:], y[1000:]) > 0.8
    X, y = load_wine(return_X_y=True)
    assert BlurClassifier(name, max_steps=10, random_state=0).fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.8


def test_the_recipes_command_writes_a_genome(tmp_path, monkeypatch, capsys):
    from mlcollage.papers.bidirectional_update_rules import recipes

    kinds = (recipes.Kind(hidden=(5,)), recipes.Kind(2, 4))
    short = recipes.Recipe(settings={"k": 2}, kinds=kinds, members=2, updates=2, horizons=(1, 2), curriculum=())
    monkeypatch.setitem(recipes.RECIPES, "short", short)
    threads = torch.get_num_threads()
    try:
        recipes.main(["short", "--out", str(tmp_path / "g.safetensors")])
    finally:
        torch.set_num_threads(threads)
    assert "validation accuracy" in capsys.readouterr().out
    card = Genome.load(tmp_path / "g.safetensors").card
    assert card["horizon"] == 2
    assert all(0 <= v <= 1 and np.isfinite(v) for v in card["accuracy"].values())
