"""PPO made of our losses alone solves CartPole-v1, with episodes that end and episodes that a time limit cuts."""

import gymnasium
import numpy as np
import torch
from torch import nn

from mlcollage.nn.init import seeded
from mlcollage.papers.asymmetric_self_play import action_logp, gae, ppo_loss, sample_actions, standardize_advantages

ENVS, STEPS, UPDATES = 16, 128, 40


def network(outputs):
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def rollout(envs, seen, policy, value, draw):
    """Rows (T, N) with the flags of the action just taken, and values of true last observations."""
    rows = {name: [] for name in ("x", "action", "logp", "reward", "ended", "cut", "value", "final")}
    for _ in range(STEPS):
        x = torch.as_tensor(seen, dtype=torch.float32)
        choice, logp = sample_actions(policy(x), (2,), torch.rand(ENVS, 2, generator=draw))
        seen, reward, ended, cut, info = envs.step(choice[:, 0].numpy())
        last = np.array(seen)
        for i in np.flatnonzero(ended | cut):
            last[i] = info["final_obs"][i]
        found = (x, choice, logp, torch.as_tensor(reward, dtype=torch.float32), torch.as_tensor(ended))
        more = (torch.as_tensor(cut), value(x)[:, 0], value(torch.as_tensor(last))[:, 0])
        for name, row in zip(rows, (*found, *more), strict=True):
            rows[name].append(row)
    return seen, {name: torch.stack(part) for name, part in rows.items()}


def test_cartpole_is_solved():
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.make_vec(
        "CartPole-v1", ENVS, vectorization_mode="sync", vector_kwargs={"autoreset_mode": same_step}
    )
    with seeded(0):
        policy, value = network(2), network(1)
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=3e-3)
    draw, (seen, _) = torch.Generator().manual_seed(0), envs.reset(seed=0)
    for update in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - update / UPDATES)
        with torch.no_grad():
            seen, d = rollout(envs, seen, policy, value, draw)
            following = value(torch.as_tensor(seen))[:, 0]
            advantages, returns = gae(
                d["reward"],
                d["value"],
                d["ended"],
                truncated=d["cut"],
                final_values=d["final"],
                next_value=following,
                gamma=0.99,
            )
        flat = {name: part.flatten(0, 1) for name, part in {**d, "a": advantages, "r": returns}.items()}
        for _ in range(6):
            for rows in torch.randperm(ENVS * STEPS, generator=draw).split(512):
                logp, entropy = action_logp(policy(flat["x"][rows]), flat["action"][rows], (2,))
                terms = ppo_loss(
                    logp,
                    flat["logp"][rows],
                    standardize_advantages(flat["a"][rows]),
                    values=value(flat["x"][rows])[:, 0],
                    returns=flat["r"][rows],
                    entropy=entropy,
                    value_weight=0.5,
                )
                optimizer.zero_grad()
                terms.total.backward()
                nn.utils.clip_grad_norm_([*policy.parameters(), *value.parameters()], 0.5)
                optimizer.step()
    lengths = []
    for seed in range(10):
        env = gymnasium.make("CartPole-v1")
        seen, _ = env.reset(seed=1000 + seed)
        over, length = False, 0
        while not over:
            with torch.no_grad():
                seen, _, ended, cut, _ = env.step(int(policy(torch.as_tensor(seen)).argmax()))
            over, length = ended or cut, length + 1
        lengths.append(length)
    assert np.mean(lengths) >= 475  # what the environment calls solved
