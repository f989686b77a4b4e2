"""SMAC's search in our loop: with the packages where they are installed, and against stand-ins."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_wine

from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.papers.autosklearn2 import AutoClassifier, SmacImprovement, pipeline_space, to_configspace
from mlcollage.papers.autosklearn2.policy import Policy
from mlcollage.papers.autosklearn2.search import SearchPlan
from mlcollage.papers.autosklearn2.trials import PipelineTrial

needs_smac = pytest.mark.skipif(find_spec("smac") is None, reason="SMAC is not installed")


class _Space(list):
    """Notes what is added: hyperparameters, then conditions."""

    def __init__(self, seed=None):
        super().__init__()

    def add(self, items):
        self.append(items)


@pytest.fixture
def stand_in(monkeypatch):
    def made(kind):
        return lambda *args, **more: SimpleNamespace(kind=kind, args=args, **more)

    kinds = ("CategoricalHyperparameter", "UniformIntegerHyperparameter", "UniformFloatHyperparameter", "InCondition")
    module = SimpleNamespace(ConfigurationSpace=_Space, **{kind: made(kind) for kind in kinds})
    monkeypatch.setitem(sys.modules, "ConfigSpace", module)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_space_is_exported_with_bounds_defaults_and_conditions(stand_in, kind):
    space = pipeline_space(kind)
    found, conditions = to_configspace(space)
    assert [h.args[0] for h in found] == [p.name for p in space.parameters]
    for h, p in zip(found, space.parameters, strict=True):
        assert p.holds(h.default_value)
        if p.choices:
            assert h.args[1] == list(p.choices)
        else:
            assert h.args[1:] == (p.low, p.high)
            assert h.log == p.log
            assert ("Integer" in h.kind) == p.whole
    told = {(c.args[0].args[0], c.args[1].args[0], tuple(c.args[2])) for c in conditions}
    assert told == {(p.name, p.parent, p.when) for p in space.parameters if p.parent}


def test_what_cannot_be_used_is_refused(monkeypatch):
    with pytest.raises(InvalidInput, match="to_configspace takes a SearchSpace"):
        to_configspace({"x": 1})
    monkeypatch.setitem(sys.modules, "ConfigSpace", None)
    with pytest.raises(MissingDependency, match=r"mlcollage\[automl\]"):
        to_configspace(pipeline_space())
    monkeypatch.setattr("mlcollage.papers.autosklearn2.sklearn.has_smac", lambda: False)
    with pytest.raises(MissingDependency, match="search='smac' needs SMAC"):
        AutoClassifier(60, search="smac", max_trials=1).fit(*load_wine(return_X_y=True))
    with pytest.raises(InvalidInput, match="search"):
        AutoClassifier(60, search="grid").fit(*load_wine(return_X_y=True))


class _First:
    """Proposes the configuration that was tried first, with another seed's choice of scaling."""

    def propose(self, configs, losses, rng):
        assert len(configs) == len(losses)
        return {**configs[0], "imputation": "median"}


def test_another_surrogate_proposes_every_second_pipeline():
    space = pipeline_space().only(["sgd"])
    plan, trials = SearchPlan(space, Policy(), [space.default()], 0, _First()), []
    for i in range(8):
        (p,) = plan.next(trials)
        trials.append(PipelineTrial(i, p.config, p.origin, p.budget, loss=float(i)))
    assert [t.origin for t in trials[3:]] == ["search", "random", "search", "random", "search"]
    assert trials[3].config == {**space.default(), "imputation": "median"}


@needs_smac
def test_proposals_of_smac_are_in_the_space_and_repeat():
    space = pipeline_space()
    rng = np.random.default_rng(0)
    for found in to_configspace(space, seed=0).sample_configuration(100):
        ours = SmacImprovement(space)._ours(dict(found)) if rng.random() < 0.05 else dict(found)
        assert set(ours) == set(dict(found))
    smac = SmacImprovement(space, challengers=50, n_local=2)
    tried = [space.sample(rng) for _ in range(10)]
    proposals = [smac.propose(tried, np.arange(10.0), np.random.default_rng(1)) for _ in range(2)]
    assert proposals[0] == proposals[1] == space.check(proposals[0])
    assert proposals[0] not in tried


@needs_smac
def test_a_fit_searches_with_smac():
    X, y = load_wine(return_X_y=True)
    model = AutoClassifier(
        60, search="smac", portfolio=None, max_trials=5, include=["sgd"], isolation="none", random_state=0
    ).fit(X, y)
    assert [t.origin for t in model._trials][-2:] == ["search", "random"]
    assert model.score(X, y) > 0.5
