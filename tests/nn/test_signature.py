"""Signatures tell layers apart, and stay when a network is trained, put in another mode or moved to another module."""

import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.nn.signature import other_layer, signature


def made(act="relu", p=0.1):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.drop = nn.Linear(2, 2), nn.Dropout(p)

        if act == "relu":

            def forward(self, x):
                return F.relu(self.drop(self.fc(x)))

        else:

            def forward(self, x):
                return torch.tanh(self.drop(self.fc(x)))

    return Net()


def test_functions_in_forward_count():
    assert other_layer(signature(made()), signature(made())) is None
    told = other_layer(signature(made()), signature(made("tanh")))
    assert told.startswith("it is Net() with ")
    assert "relu" in told
    assert "tanh" in told


def test_training_changes_nothing():
    before, net = signature(made()), made(p=0.5).eval()
    net(torch.ones(1, 2)).sum().backward()
    assert signature(net) == before


def test_a_layer_that_only_one_has_is_named():
    long, short = nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.Sequential(nn.Linear(1, 1))
    assert other_layer(signature(long), signature(short)) == "layer 1 is ReLU() there and missing here"
