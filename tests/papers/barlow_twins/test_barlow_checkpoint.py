"""Files of the official code, and files that are none; nothing in them is run."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.papers.barlow_twins import BarlowProjector, load_official_checkpoint

WRITE = """
import sys, torch
from torch import nn

def exclude_bias_and_norm(p):
    return p.ndim == 1

class Evil:
    def __reduce__(self):
        return (exec, (f"open({sys.argv[2]!r}, 'w').write('ran')",))

torch.manual_seed(0)
backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
projector = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False))
model = nn.ModuleDict({"backbone": backbone, "projector": projector, "bn": nn.BatchNorm1d(8, affine=False)})
group = {"lr": 0.2, "weight_decay_filter": exclude_bias_and_norm, "lars_adaptation_filter": exclude_bias_and_norm}
state = {"epoch": 7, "model": {"module." + k: v for k, v in model.state_dict().items()},
         "optimizer": {"state": {}, "param_groups": [group]}}
if len(sys.argv) > 3:
    state["extra"] = Evil()
torch.save(state, sys.argv[1])
"""


def written(folder, *extra):
    """A file that a script has saved, with functions of its own in it."""
    file, mark = folder / "checkpoint.pth", folder / "mark"
    subprocess.run([sys.executable, "-c", WRITE, str(file), str(mark), *extra], check=True, timeout=60)
    return file, mark


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return written(tmp_path_factory.mktemp("full"))[0]


def test_a_full_checkpoint_with_functions_in_it(full):
    with pytest.raises(Exception, match=r"weights_only|Weights only"):  # torch's safe default refuses it
        torch.load(full)
    read = load_official_checkpoint(full)
    assert read.epoch == 7
    assert read.left == ("optimizer",)
    assert sorted(read.norm) == ["num_batches_tracked", "running_mean", "running_var"]
    backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    projector = BarlowProjector(4, (8, 8))
    assert read.load_backbone(backbone) is backbone
    read.load_projector(projector)
    torch.manual_seed(0)
    assert torch.equal(backbone[0].weight, nn.Linear(3, 4).weight)
    assert torch.equal(projector[3].weight, read.projector["3.weight"])


def test_code_in_a_file_is_not_run(tmp_path):
    file, mark = written(tmp_path, "evil")
    allowed = set(torch.serialization.get_safe_globals())
    try:
        read = load_official_checkpoint(file)
    except InvalidInput:
        pass
    else:
        assert "extra" in read.left
    assert not mark.exists()
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "backbone.", "module.backbone."])
def test_a_backbone_alone_with_any_prefix(tmp_path, prefix):
    weights = {"conv1.weight": torch.ones(2, 1, 3, 3), "fc.weight": torch.ones(4, 2), "fc.bias": torch.zeros(4)}
    torch.save({prefix + k: v for k, v in weights.items()}, tmp_path / "resnet50.pth")
    read = load_official_checkpoint(tmp_path / "resnet50.pth")
    assert list(read.backbone) == ["conv1.weight"]
    assert len(read.left) == 2
    with pytest.raises(InvalidInput, match="backbone only"):
        read.load_projector(BarlowProjector(4, (8,)))


def test_a_classifier_of_the_module_may_stay(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.fc = nn.Conv2d(1, 2, 3, bias=False), nn.Linear(2, 4)

    torch.save({"conv1.weight": torch.ones(2, 1, 3, 3)}, tmp_path / "a.pth")
    net = Net()
    load_official_checkpoint(tmp_path / "a.pth").load_backbone(net)
    assert float(net.conv1.weight.detach().min()) == 1.0


def test_weights_that_do_not_fit_are_listed(full):
    with pytest.raises(InvalidInput, match=r"missing: 2\.weight, 2\.bias"):
        load_official_checkpoint(full).load_backbone(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    with pytest.raises(InvalidInput, match=r"unexpected: 1\.weight"):
        load_official_checkpoint(full).load_backbone(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(InvalidInput, match=r"0\.weight \(4, 3\), not \(4, 5\)"):
        load_official_checkpoint(full).load_backbone(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n  <html>", "web page"),
        (b"", "cut off"),
        (b"PK\x03\x04 and no more", "cut off"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, words):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InvalidInput, match=words):
        load_official_checkpoint(tmp_path / "x.pth")


def test_a_file_that_was_cut_off(full, tmp_path):
    (tmp_path / "half.pth").write_bytes(full.read_bytes()[:-200])
    with pytest.raises(InvalidInput, match="cut off"):
        load_official_checkpoint(tmp_path / "half.pth")


def test_other_contents_are_refused(tmp_path):
    torch.save(torch.ones(3), tmp_path / "t.pth")
    with pytest.raises(InvalidInput, match="holds a Tensor"):
        load_official_checkpoint(tmp_path / "t.pth")
    torch.save({"model": {"head.weight": 3}}, tmp_path / "n.pth")
    with pytest.raises(InvalidInput, match="no weights of a backbone"):
        load_official_checkpoint(tmp_path / "n.pth")
    with pytest.raises(MissingFile):
        load_official_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_anywhere_is_refused_in_a_sentence(tmp_path, zipped):
    file = tmp_path / "resnet50.pth"
    torch.save({"conv1.weight": torch.zeros(8, 8)}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    for length in range(0, len(content) - 1, 7):
        file.write_bytes(content[:length])
        with pytest.raises(InvalidInput, match="cannot be read as a checkpoint"):
            load_official_checkpoint(file)


@pytest.mark.parametrize("head", [b"\xef\xbb\xbf<html>", b"<!-- saved --><html>"])
def test_web_pages_may_begin_otherwise(tmp_path, head):
    file = tmp_path / "resnet50.pth"
    file.write_bytes(head)
    with pytest.raises(InvalidInput, match="a web page"):
        load_official_checkpoint(file)
