import copy
import pickle
import subprocess
import sys

import pytest

from mlcollage.errors import MissingDependency
from mlcollage.train.callbacks import HuggingFaceCallback, LightningCallback


class Counting(LightningCallback):
    def __init__(self, start=0):
        self.count = start

    def on_fit_start(self, trainer, pl_module):
        self.count += 1


class Watching(HuggingFaceCallback):
    def on_step_end(self, args, state, control, **kwargs):
        return control


def test_an_object_is_the_framework_s_callback_and_ours():
    from lightning.pytorch import Callback
    from transformers import TrainerCallback

    callback = Counting(start=3)
    assert isinstance(callback, Callback)
    assert isinstance(callback, Counting)
    assert callback.on_train_end(None, None) is None  # the framework's own hook, which does nothing
    assert type(callback).__name__ == "Counting"
    assert isinstance(Watching(), TrainerCallback)


def test_copies_and_pickles_keep_the_state():
    callback = Counting(start=3)
    assert copy.deepcopy(callback).count == 3
    assert pickle.loads(pickle.dumps(callback)).count == 3  # noqa: S301 (our own bytes)


def test_without_the_framework_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)

    class Missing(LightningCallback):
        pass

    with pytest.raises(MissingDependency, match=r"Missing needs lightning; run pip install 'mlcollage\[l"):
        Missing()


def test_importing_the_bases_imports_no_framework():
    code = "import sys, mlcollage.train.callbacks; print({'lightning', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
