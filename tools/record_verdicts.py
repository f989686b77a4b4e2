"""Record what studies measured and how their claims were judged, for ``tests/lab/test_recorded_verdicts.py``.

Usage: ``python tools/record_verdicts.py results gated_linear_networks deep_bootstrap`` after ``mlcollage digest --store
results``. Whoever changes a claim or a rule so that a verdict changes runs it, and says why in the commit.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from mlcollage.errors import MLCollageError
from mlcollage.lab import BoundStudy, Store
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import judge

TO = Path(__file__).resolve().parents[1] / "tests" / "lab" / "recorded"
LEFT_OUT = ["study", "experiment", "scale", "workload", "run"]  # columns that say where a number comes from
KEPT = ("status", "estimate", "interval", "p_value", "p_holm", "seeds", "test_used", "seeds_needed", "reason")


def _found(study: BoundStudy, table: pd.DataFrame) -> dict[str, dict[str, Any]] | None:
    try:
        verdicts = judge(study.claims, Evidence(study.slug, study.scale, "default", table))
    except MLCollageError:  # something that a claim needs is not there
        return None
    return {name: {key: verdict.to_dict()[key] for key in KEPT} for name, verdict in verdicts.items()}


def record(store: Store, slug: str) -> None:
    """Write ``recorded/<slug>.parquet``, one row per number that claims read, and ``recorded/<slug>.json``."""
    study = BoundStudy(slug, "quick")
    evidence = study.evidence(store)
    if evidence.failures or evidence.missing:
        sys.exit(f"{slug}: runs failed or are missing; measure them first.")
    found = _found(study, evidence.table)
    table = evidence.table.drop(columns=LEFT_OUT)
    # every metric that the verdicts depend on
    read = [m for m in table["metric"].unique() if _found(study, table[table["metric"] != m]) != found]
    table[table["metric"].isin(read)].dropna(axis="columns", how="all").to_parquet(
        TO / f"{slug}.parquet", index=False, compression="zstd"
    )
    (TO / f"{slug}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        record(Store(Path(sys.argv[1])), name)
