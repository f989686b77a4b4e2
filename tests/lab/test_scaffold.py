"""`mlcollage new` makes a package that works from the first minute."""

import subprocess
import sys

import pytest

from mlcollage.errors import InvalidInput
from mlcollage.lab.scaffold import create


def test_the_new_package_runs_judges_draws_and_passes_its_own_tests(tmp_path):
    folder = create("my_paper", tmp_path)
    assert folder == tmp_path / "my-paper"
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*install, str(folder)], check=True, capture_output=True)
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for words in (["run", "my_paper"], ["slide", "my_paper", "--format", "svg"], ["show", "my_paper"]):
        done = subprocess.run(
            [sys.executable, "-m", "mlcollage.cli", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "slides" / "my_paper-quick.svg").stat().st_size > 10_000
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(folder / "tests")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tests.returncode == 0, tests.stdout


@pytest.mark.parametrize("slug", ["My-Paper", "class", "1st", "", "a b"])
def test_names_that_cannot_be_used(slug, tmp_path):
    with pytest.raises(InvalidInput, match="lower-case letters"):
        create(slug, tmp_path)


def test_taken_names_and_folders(tmp_path):
    with pytest.raises(InvalidInput, match="already"):
        create("deep_bootstrap", tmp_path)
    (tmp_path / "my-paper").mkdir()
    with pytest.raises(InvalidInput, match="exists already"):
        create("my_paper", tmp_path)
