"""A task as a user would write it, in a file of one's own."""

import torch


class Cart:
    """A cart on a line that moves by one step to the left or right, or stays."""

    bins = (3,)
    thresholds = (0.5,)

    def initial(self, n, generator):
        return torch.rand(n, 1, generator=generator) * 6 - 3

    def step(self, state, action):
        return state + action.float() - 1

    def observe(self, state):
        return state[:, :0], torch.stack((torch.ones_like(state), state / 10), -1)

    def achieved(self, state):
        return state[:, :, None]

    def distance(self, achieved, goal):
        return (achieved - goal).abs()

    def off_table(self, state):
        return state.abs() > 30

    def out_of_zone(self, state):
        return state.abs() > 20


def right(n, generator):
    state = Cart().initial(n, generator)
    return state, state[:, :, None] + 3


def mine():
    return {"world": Cart, "holdouts": {"right": right}, "alice_steps": 4, "bob_steps": 6}
