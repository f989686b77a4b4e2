"""Public names of statistics and inference come from their packages, and load no more than they need."""

import subprocess
import sys

import mlcollage.infer
import mlcollage.stats


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_statistics_load_without_torch_and_matplotlib():
    run(
        "import sys\n"
        "from mlcollage.stats import bootstrap_ci, holm, PartialPooling, ConfidenceSequence, SuccessiveHalving\n"
        "assert callable(bootstrap_ci)\n"
        "assert not {'torch', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "from mlcollage.stats import AverageEffect, double_descent, psis_loo, forest\n"
        "assert 'torch' not in sys.modules"
    )


def test_packages_of_names_load_nothing_before_a_name_is_used():
    run(
        "import sys, mlcollage.infer, mlcollage.stats\n"
        "assert {'hmc', 'SGLD', 'sbc', 'rhat'} <= set(dir(mlcollage.infer))\n"
        "assert {'bootstrap_ci', 'iqm', 'lineup'} <= set(dir(mlcollage.stats))\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )


def test_every_name_is_there():
    for package in (mlcollage.infer, mlcollage.stats):
        for name in package.__all__:
            assert getattr(package, name) is not None
