"""What is imported when: names without their libraries, and the loops that run where numba is not installed."""

import subprocess
import sys

import numpy as np
import pytest

from mlcollage.papers import gated_linear_networks
from mlcollage.papers.gated_linear_networks import GLNClassifier, GLNRegressor, kernels, kernels_numpy


def test_public_names_are_there_and_others_are_not():
    for name in gated_linear_networks.__all__:
        assert getattr(gated_linear_networks, name).__name__ == name
    assert set(gated_linear_networks.__all__) <= set(dir(gated_linear_networks))
    with pytest.raises(AttributeError, match="no attribute 'GLNTransformer'"):
        _ = gated_linear_networks.GLNTransformer


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, mlcollage.papers.gated_linear_networks; print({'torch', 'numba', 'sklearn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_numpy_loops_run_where_numba_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, kernels_numpy.__name__.replace("numpy", "numba"), raising=False)
    monkeypatch.delattr(gated_linear_networks, "kernels_numba", raising=False)
    assert kernels._load() is kernels_numpy


def test_fallback_gives_the_compiled_results_for_both_estimators(monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 6))
    y = X[:, 0] - X[:, 1] * X[:, 2]
    models = [
        GLNClassifier((6, 4), dtype="float64", random_state=0),
        GLNClassifier((6, 4), context_dim=12, tables="lazy", dtype="float64", random_state=0),
        GLNRegressor((6, 4), random_state=0),
    ]
    targets = [y > 0, y > 0, y]
    fast = [model.fit(X, t).progressive_predict(X, t) for model, t in zip(models, targets, strict=True)]
    monkeypatch.setattr(kernels, "_ACTIVE", kernels_numpy)
    slow = [model.fit(X, t).progressive_predict(X, t) for model, t in zip(models, targets, strict=True)]
    for one, other in zip(fast, slow, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)
