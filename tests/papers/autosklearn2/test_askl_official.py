"""The official files: every pipeline maps into our space, and what does not is named."""

import json

import numpy as np
import pytest

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.papers.autosklearn2 import (
    POLICIES,
    map_official_config,
    official_portfolio,
    official_selector_data,
    pipeline_space,
    read_official_portfolio,
    read_official_selector,
)
from mlcollage.papers.autosklearn2.shipped import official_folder


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_official_pipeline_is_in_the_space(policy):
    portfolio, space = official_portfolio(policy), pipeline_space()
    assert len(portfolio.configs) == len(set(portfolio.ids)) == 32
    assert all(space.check(config) == config for config in portfolio.configs)
    assert all(c == np.inf for c in portfolio.cutoffs)


def test_values_arrive_under_our_names():
    file = official_folder() / "RF_None_holdout_iterative_es_if.json"
    raw = json.loads(file.read_text())["portfolio"]
    for name, config in zip(raw, read_official_portfolio(file).configs, strict=True):
        learner = raw[name]["classifier:__choice__"]
        assert config["learner"] == learner
        for key, value in config.items():
            if key.startswith(f"{learner}:") and isinstance(value, float):
                assert raw[name][f"classifier:{key}"] == value


def test_the_selectors_data_are_as_published():
    data = official_selector_data()
    assert data.losses.shape == data.minima.shape == data.maxima.shape == (208, 8)
    assert data.policies == POLICIES
    assert [str(data.policies[k]) for k in data.order[:2]] == ["holdout, successive halving", "holdout, full budget"]
    assert data.meta_features[data.tasks.index(75098)].tolist() == [784.0, 70000.0] or data.meta_features.min() > 0


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"'classifier:svm:C', which our space does not have|'svm:C' = 1"):
        map_official_config({"classifier:svm:C": 1})
    with pytest.raises(InvalidInput, match=r"max_bins' = 64; our learners have 255 only"):
        map_official_config({"classifier:gradient_boosting:max_bins": 64})
    with pytest.raises(InvalidInput, match=r"'sgd:alpha' = 7; expected a number from 1e-07 to 0.1"):
        map_official_config({"classifier:__choice__": "sgd", "classifier:sgd:alpha": 7})
    with pytest.raises(MissingFile):
        read_official_portfolio(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InvalidInput, match="lacks 'portfolio'"):
        read_official_portfolio(tmp_path / "a.json")
    with pytest.raises(InvalidInput, match="lacks 'metafeatures'"):
        read_official_selector(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("no")
    with pytest.raises(InvalidInput, match="is not JSON"):
        read_official_selector(tmp_path / "b.json")
    extra = json.loads((official_folder() / "RF_None_holdout_iterative_es_if.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**extra, "runtimes": [1], "start_time": 3}))
    assert len(read_official_portfolio(tmp_path / "c.json").configs) == 32
