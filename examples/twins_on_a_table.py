"""Learn a representation of a table without labels, then see what ten labels of each class make of it.

The views are noise and swapped entries, the gauge says where the loss stands. Run it with
`python examples/twins_on_a_table.py`.
"""

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from mlcollage.measure import few_shot_split, knn_probe, ridge_probe
from mlcollage.papers.barlow_twins import BarlowTwinsEncoder


def main(max_iter: int = 40) -> dict[str, float]:
    """Print, and return, accuracies with ten labels of each class: of the columns, and of the representation."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=0, stratify=y)
    encoder = BarlowTwinsEncoder(n_components=64, max_iter=max_iter, random_state=0).fit(X)
    print(encoder.gauge_.last)  # where the loss stands between random views and the floor
    few, _ = few_shot_split(y, 10)
    scaler = StandardScaler().fit(X)
    inputs = {"columns": (scaler.transform(X), scaler.transform(X_test))}
    inputs["representation"] = (encoder.transform(X), encoder.transform(X_test))
    found = {}
    for name, (train, test) in inputs.items():
        found[name] = ridge_probe(train[few], y[few]).score(test, y_test)
        print(f"{name}: {found[name]:.3f} with a linear probe, {knn_probe(train, y, k=20).accuracy:.3f} by neighbors")
    return found


if __name__ == "__main__":
    main()
