"""How well synthetic gradients agree with true ones."""

from __future__ import annotations

from torch import Tensor


def compare_gradients(predicted: Tensor, target: Tensor, rows: Tensor | None = None) -> dict[str, float]:
    """Cosine, relative error and agreement in sign of synthetic and true gradients, row by row."""
    p, t = predicted.double().flatten(1), target.double().flatten(1)
    if rows is not None:
        keep = rows if rows.ndim == 1 else rows.any(1)
        p, t = p[keep], t[keep]
    norms = t.norm(dim=1)
    floor = 1e-12 * max(float(norms.max()) if len(norms) else 0.0, 1e-300)
    alive = norms > floor
    a, b = p[alive], t[alive]
    if not len(b):
        unknown = dict.fromkeys(("cosine", "relative_error", "sign", "ratio"), float("nan"))
        return unknown | {"zero_rows": 1.0, "rows": float(len(t))}
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-300)
    moved = b.abs() > 1e-12 * b.abs().max()
    return {
        "cosine": float(cosine.mean()),
        "relative_error": float((a - b).square().sum() / b.square().sum()),
        "sign": float((a.sign() == b.sign())[moved].double().mean()),
        "ratio": float(a.norm() / b.norm()),
        "zero_rows": float((~alive).double().mean()),
        "rows": float(len(t)),
    }
