"""Which preset suits 600 small images? Three of AugReg's, two seeds each, trained one after the other.

Run it with ``python examples/presets_of_a_small_vit.py``; about a minute on one core.
"""

import numpy as np
from sklearn.datasets import load_digits

from mlcollage.papers.vit_training import Sweep, ViTClassifier

X, y = load_digits(return_X_y=True)
X = (X * 15.9375).astype(np.uint8).reshape(-1, 8, 8)  # RandAugment works on raw pixels


def train(config, budget, seed):
    """Accuracy on images that were not trained on."""
    model = ViTClassifier(config["aug"], dropout=config["do"], steps=budget, random_state=seed)
    model.fit(X[:600], y[:600])
    return {"final_val": model.score(X[600:1200], y[600:1200]), "train": model.train_score_}


if __name__ == "__main__":
    sweep = Sweep({"aug": ["none", "light2", "medium1"], "do": [0.0, 0.1]}, budget=300, seeds=(0, 1))
    table = sweep.run(train)
    print(table.groupby(["aug", "do"])[["final_val", "train", "seconds"]].mean().round(3))
