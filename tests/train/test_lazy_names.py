"""Public names of instruments, networks and training come from their packages, and only then are loaded."""

import subprocess
import sys

import pytest

ORDERS = {
    "package, then module": "from mlcollage.measure import cca; from mlcollage.measure.cca import cca as same",
    "module, then package": "from mlcollage.measure.cca import cca as same; from mlcollage.measure import cca",
    "module itself": "import mlcollage.measure.cca; from mlcollage.measure.cca import cca as same; "
    "from mlcollage.measure import cca",
}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_a_function_that_is_called_like_its_module_is_found_in_every_order(order):
    run(f"{ORDERS[order]}\nassert cca is same and callable(cca)")


def test_packages_load_without_torch():
    run(
        "import sys, mlcollage.measure, mlcollage.nn, mlcollage.train\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert {'cca', 'fisher_trace', 'LayerTap'} <= set(dir(mlcollage.measure))\n"
        "assert {'MLP', 'ViT', 'unwrap'} <= set(dir(mlcollage.nn))\n"
        "assert {'Replicas', 'SAM', 'steps'} <= set(dir(mlcollage.train))\n"
        "assert 'torch' not in sys.modules"
    )


def test_an_unknown_name_is_refused():
    with pytest.raises(ImportError, match="cannot import name 'no_such_thing'"):
        from mlcollage.nn import no_such_thing  # noqa: F401
