"""Copies of a network are told from it by the graph, also where they share parameters; what surrounds it is no copy."""

import copy

import torch
from torch import nn

from mlcollage.measure.other_copies import of_another_copy, running_means_of

X = torch.ones(4, 2)


def test_unused_parameters_and_strangers_of_other_shapes_do_not_make_a_copy():
    net = nn.Sequential(nn.Linear(2, 2))
    net.unused = nn.Linear(5, 5)
    body = net[0]
    assert not of_another_copy([body(X)], net.parameters())
    assert not of_another_copy([nn.Linear(2, 3)(body(X))], net.parameters())
    assert of_another_copy([nn.Linear(2, 2)(X)], net.parameters())


def test_frozen_networks_have_no_copies():
    assert not of_another_copy([nn.Linear(2, 2)(X)], [])


def test_a_copy_with_all_parameters_and_other_statistics():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = copy.deepcopy(net)
    for name, value in net.named_parameters():
        place, _, last = name.rpartition(".")
        setattr(other.get_submodule(place), last, value)
    for mode in (True, False):
        outputs = [n.train(mode)(X) for n in (net, other)]
        found = [of_another_copy([out], net.parameters(), running_means_of(net)) for out in outputs]
        assert found == [False, True]
