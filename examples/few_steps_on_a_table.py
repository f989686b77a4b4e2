"""Adapt to a new table in ten steps, on a machine that has no use for gradients.

A genome that was trained on handwritten digits teaches a fresh network to tell malignant from benign samples. Nothing
here needs autograd: `learn` runs under inference mode. Run it with `python examples/few_steps_on_a_table.py`.
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

from mlcollage.papers.bidirectional_update_rules import BlurNetwork


def main(steps: int = 10, batch_size: int = 64) -> list[float]:
    """Print, and return, the test accuracy after each step."""
    X, y = load_breast_cancer(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=0, stratify=y)
    center, spread = X.mean(axis=0), X.std(axis=0)
    x, x_test = (torch.from_numpy((part - center) / spread).float() for part in (X, X_test))
    y, y_test = torch.from_numpy(y), torch.from_numpy(y_test)

    network = BlurNetwork((x.shape[1], 32, 2), genome="digits-2s", seed=0)
    generator, accuracies = torch.Generator().manual_seed(0), []
    with torch.inference_mode():
        for step in range(steps):
            rows = torch.randperm(len(x), generator=generator)[:batch_size]
            network.learn(x[rows], y[rows])  # in place of loss, backward and optimizer
            network.calibrate(x)  # predictions are normalized by all training rows, not by the last batch
            right = (network(x_test).argmax(1) == y_test).float().mean()
            accuracies.append(float(right))
            print(f"step {step + 1:2d}: {accuracies[-1]:.3f}")
    return accuracies


if __name__ == "__main__":
    main()
