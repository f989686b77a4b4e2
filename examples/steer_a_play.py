"""Train on generated half-court plays, send one player to a corner, and write a page that plays both.

``python examples/steer_a_play.py`` takes a minute or two and writes ``play.html``, which a browser opens from disk.
"""

from pathlib import Path

import numpy as np
import torch

from mlcollage.papers.programmatic_trajectories import (
    GridIntent,
    HalfCourtWorld,
    MacroTrajectoryModel,
    Stationary,
    play_page,
)


def main(max_iter: int = 400, page: str | Path = "play.html") -> dict[str, float]:
    """Print, and return, how far players end from the cell they were sent to, and from it if they are left alone."""
    plays, test = HalfCourtWorld.draw(2000, seed=0), HalfCourtWorld.draw(60, seed=1)
    grid = GridIntent()
    label = Stationary(grid, fps=plays.fps)
    model = MacroTrajectoryModel(label, fps=plays.fps, hidden=32, rnn=32, z=4, max_iter=max_iter).fit(plays.x)
    print(model.label_report_)
    burn_in, corner = test.x[:, :15], int(grid(np.array([[2.0, 2.0]]))[0])
    sent = np.full((35, 5), -1)
    sent[:, 0] = corner
    found = {}
    for name, intents in (("sent", sent), ("free", None)):
        end = model.sample(burn_in, 35, intents)[0, :, -1, 0]
        found[name] = float(np.linalg.norm(end - grid.centers()[corner], axis=-1).mean())
        print(f"{name}: player 1 ends {found[name]:.1f} ft from the corner's cell")
    choices = [corner, int(grid(np.array([[44.0, 25.0]]))[0]), int(grid(np.array([[7.0, 25.0]]))[0])]
    first = torch.from_numpy(burn_in[0])
    play_page(page, model.model_, first, 35, agent=0, choices=choices, grid=grid, history=label)
    return found


if __name__ == "__main__":
    main()
