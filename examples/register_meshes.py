"""Learn a category's pose from unposed shapes, then register two scans that no start value would bring together.

Run it with `python examples/register_meshes.py`; give it a folder of OBJ, PLY, OFF or STL files to use your own.
"""

import sys
from pathlib import Path

import numpy as np

from mlcollage.data import load_meshes, procedural_shapes
from mlcollage.papers.canonical_capsules import CanonicalCapsulesEstimator, LossWeights


def main(folder: str | None = None, max_iter: int = 600) -> float:
    """Print the registrations of the last five shapes, turned by half a circle, and return their median error."""
    if folder is None:
        clouds = list(procedural_shapes("plane", 200, 64, dim=2, seed=1).points.astype(float))
    else:
        files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in (".obj", ".ply", ".off", ".stl"))
        clouds = list(load_meshes(files, 256))
    capsules = CanonicalCapsulesEstimator(
        8, hidden=0, max_iter=max_iter, learning_rate=4e-3, weights=LossWeights(equilibrium=16.0), random_state=0
    ).fit(clouds[:-5])
    errors = []
    for cloud in clouds[-5:]:
        turned = cloud.copy()
        turned[:, :2] *= -1  # half a turn, which iterative closest points alone do not undo
        found = capsules.register(cloud, turned + 0.5)
        errors.append(float(np.linalg.norm(found.apply(cloud) - turned - 0.5, axis=1).mean()))
        print(f"error {errors[-1]:.3f}, fit {found.rmse:.3f}, condition {found.condition:.2f}")
    return float(np.median(errors))


if __name__ == "__main__":
    main(*sys.argv[1:2])
