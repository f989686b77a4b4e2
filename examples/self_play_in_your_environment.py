"""Self-play in a Gymnasium environment of one's own, and the cloning term in a PPO of one's own.

Run it with ``python examples/self_play_in_your_environment.py``; it takes about a minute, and writes ``episode.html``.
"""

import argparse

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from mlcollage.papers.asymmetric_self_play import (
    ASPConfig,
    AsymmetricSelfPlay,
    GymnasiumWorld,
    abc_loss,
    certify,
    episode_page,
    ppo_loss,
)


class Tray(gymnasium.Env):
    """A marble on a tray that is tilted: it rolls, and has a velocity. Nobody says where it should go."""

    observation_space = spaces.Box(-2.0, 2.0, (4,))
    action_space = spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        """Put the marble down somewhere, at rest."""
        super().reset(seed=seed)
        self.state = np.concatenate((self.np_random.uniform(-0.4, 0.4, 2), np.zeros(2)))
        return self.state.copy(), {}

    def step(self, action):
        """Tilt; the marble is slowed down by friction, and stops at the rim."""
        velocity = 0.8 * self.state[2:] + 0.05 * np.asarray(action)
        place = np.clip(self.state[:2] + velocity, -0.6, 0.6)
        self.state = np.concatenate((place, velocity))
        return self.state.copy(), 0.0, False, False, {}

    def get_state(self):
        """Everything that matters: place and velocity."""
        return self.state

    def set_state(self, state):
        """Go back to a state."""
        self.state = np.array(state)


def places(observation):
    """What goals are about: where the marble is, (1, 2)."""
    return observation[None, :2]


def corners(world):
    """Hold-out goals: the marble in a corner of the tray."""

    def goals(n, generator):
        state = world.initial(n, generator)
        signs = 2.0 * torch.randint(2, (n, 1, 2), generator=generator) - 1
        return state, 0.45 * signs.to(state)

    return goals


def one_step_of_your_own_ppo(policy, optimizer, batch, demos, beta=0.5):
    """A loop of one's own needs two lines: log-probabilities of demonstrations, and the term."""
    logits = policy(batch["x"]).log_softmax(-1)
    logp = logits.gather(1, batch["action"][:, None]).squeeze(1)
    loss = ppo_loss(logp, batch["logp"], batch["advantage"]).total
    cloned = policy(demos["x"]).log_softmax(-1).gather(1, demos["action"][:, None]).squeeze(1)
    loss = loss + beta * abc_loss(cloned, demos["logp"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def main(steps: int, page: str) -> None:
    """Train on the tray, judge Bob by corners, write the page."""
    world = GymnasiumWorld(Tray, places, threshold=0.15, bins=3)
    print(certify(world, games=8))
    config = ASPConfig(envs=32, alice_steps=10, bob_steps=15, store_invalid=True)
    game = AsymmetricSelfPlay(world, config, seeds=(0,))
    holdouts = {"corners": corners(world)}
    print("before:", game.evaluate(holdouts, n=64)["rate"].iloc[0])
    game.fit(steps)
    print("after:", game.evaluate(holdouts, n=64)["rate"].iloc[0], "of goals in the corners")
    print("look at", episode_page(game, page))
    policy = torch.nn.Linear(4, 3)
    batch = {
        "x": torch.randn(8, 4),
        "action": torch.arange(8) % 3,
        "logp": torch.zeros(8) - 1.1,
        "advantage": torch.ones(8),
    }
    demos = {name: batch[name] for name in ("x", "action", "logp")}
    print("loss:", one_step_of_your_own_ppo(policy, torch.optim.Adam(policy.parameters()), batch, demos))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--page", default="episode.html")
    given = parser.parse_args()
    main(given.steps, given.page)
