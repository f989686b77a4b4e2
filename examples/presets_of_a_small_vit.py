"""Which preset suits 600 small images? Three of AugReg's, with and without dropout, two seeds each.

Run it with ``python examples/presets_of_a_small_vit.py``; about a minute on one core.
"""

import numpy as np
from sklearn.datasets import load_digits

from mlcollage.papers.vit_training import Sweep, ViTClassifier

X, y = load_digits(return_X_y=True)
X = (X * 15.9375).astype(np.uint8).reshape(-1, 8, 8)  # RandAugment works on raw pixels


def train(config, budget, seed):
    """Accuracy on images that were not trained on, and on those that were."""
    model = ViTClassifier(config["aug"], dropout=config["do"], steps=budget, random_state=seed)
    model.fit(X[:600], y[:600])
    return {"final_val": model.score(X[600:1200], y[600:1200]), "train": model.train_score_}


def compare(presets, dropout=(0.0, 0.1), steps=300, seeds=(0, 1)):
    """A row for each preset, dropout and seed."""
    return Sweep({"aug": presets, "do": dropout}, budget=steps, seeds=seeds).run(train)


if __name__ == "__main__":
    table = compare(["none", "light2", "medium1"])
    print(table.groupby(["aug", "do"])[["final_val", "train", "seconds"]].mean().round(3))
    best = table.groupby(["aug", "do"])["final_val"].mean().idxmax()
    print(f"best on new images: {best[0]}, dropout {best[1]:g}")
