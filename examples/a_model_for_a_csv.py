"""From a CSV file with categories and gaps to a saved model, in a minute: churn of customers.

Run it with ``python examples/a_model_for_a_csv.py [file.csv] [target] [seconds]``; without a file it writes one first.
"""

import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from mlcollage.papers.autosklearn2 import AutoClassifier


def write_customers(path: Path, rows: int = 1500) -> None:
    """A table as it comes out of a database: numbers with gaps, words, dates, an id."""
    rng = np.random.default_rng(0)
    months, fee = rng.integers(1, 60, rows), rng.lognormal(3, 0.5, rows).round(2)
    plan = rng.choice(["basic", "plus", "family"], rows)
    leaves = rng.random(rows) < 1 / (1 + np.exp(0.08 * months - 0.03 * fee - 0.8 * (plan == "basic")))
    table = pd.DataFrame(
        {
            "customer": [f"C{i:05d}" for i in range(rows)],
            "plan": plan,
            "city": rng.choice(["Bern", "Oslo", "Rome", ""], rows),
            "since": pd.Timestamp("2025-01-01") - pd.to_timedelta(months * 30, unit="D"),
            "fee": np.where(rng.random(rows) < 0.1, np.nan, fee),
            "calls": rng.poisson(2 + leaves),
            "left": np.where(leaves, "yes", "no"),
        }
    )
    table.to_csv(path, index=False)


def main() -> None:
    """Read, fit, judge, save."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("customers.csv")
    target = sys.argv[2] if len(sys.argv) > 2 else "left"
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 60.0
    if not path.exists():
        write_customers(path)
    table = pd.read_csv(path)
    for column in table.columns.intersection(["since"]):
        table[column] = pd.to_datetime(table[column])
    X, X_test, y, y_test = train_test_split(
        table.drop(columns=target), table[target], test_size=0.25, random_state=0, stratify=table[target]
    )
    model = AutoClassifier(seconds, progress=sys.stdout.isatty(), random_state=0).fit(X, y)
    print(model.report())
    print(f"balanced accuracy of the model on new rows: {1 - balanced_error(model, X_test, y_test):.3f}")
    joblib.dump(model, path.with_suffix(".joblib"))
    print(f"saved as {path.with_suffix('.joblib')}")


def balanced_error(model: AutoClassifier, X: pd.DataFrame, y: pd.Series) -> float:
    """One minus the mean recall over classes."""
    predicted = model.predict(X)
    return float(1 - np.mean([(predicted[y == c] == c).mean() for c in model.classes_]))


if __name__ == "__main__":
    main()
