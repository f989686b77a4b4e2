"""The thirty-three reference posteriors of posteriordb: densities, and a run of each from Stan's default starts.

``mlcollage bench reference_posteriors`` prints, for each, whether means of all parameters and of their squares agree
with the reference draws, |ours - reference| < 4 sqrt(sd^2 / ESS + sd^2 / draws), the largest R-hat, CPU seconds of one
thread, and effective draws per CPU second. Data and moments are in ``benchmarks/posteriordb``, whose README.md has the
models and the rule, and LICENSE the source. Densities are for positions (chains, dim) in float64: parameters that are
constrained are sampled on the log, logit, ordered or simplex scale with the Jacobian.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from mlcollage.infer import Unhealthy, ess, hmc, nuts, rhat

DATA = Path(__file__).with_name("posteriordb")
Row = dict[str, Any]
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """A posterior: its density over unconstrained positions, the map to named parameters, and the moments to meet."""

    name: str
    dim: int
    log_prob: Callable[[Tensor], Any]
    constrain: Callable[[Tensor], Named]  # (..., dim) to (...) each
    moments: dict[str, dict[str, float]]

    def starts(self, chains: int, seed: int) -> Tensor:
        """Uniform in (-2, 2), and again where the density is not finite, as Stan does."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.empty(chains, self.dim, dtype=torch.float64)
        bad = torch.ones(chains, dtype=torch.bool)
        for _ in range(100):
            x[bad] = 4 * torch.rand(int(bad.sum()), self.dim, dtype=torch.float64, generator=generator) - 2
            leaf = x.clone().requires_grad_()
            found = self.log_prob(leaf)
            value, gradient = found if isinstance(found, tuple) else (found, torch.autograd.grad(found.sum(), leaf)[0])
            bad = ~(value.isfinite() & gradient.isfinite().all(1))
            if not bool(bad.any()):
                return x
        raise RuntimeError(f"{self.name}: no finite start in 100 tries")

    def misses(self, draws: Tensor) -> tuple[float, float, float]:
        """Largest distance of a mean in standard errors (4 is the limit), largest R-hat, least ESS of a mean."""
        worst, high, least = 0.0, 0.0, math.inf
        for name, x in self.constrain(draws).items():
            m, x = self.moments[name], x.numpy()
            high = max(high, float(rhat(x)))
            for values, mean, sd in ((x, m["mean"], m["sd"]), (x**2, m["mean_sq"], m["sd_sq"])):
                n = float(ess(values, "mean"))
                least = min(least, n)
                worst = max(worst, abs(values.mean() - mean) / (sd * math.sqrt(1 / n + 1 / m["draws"])))
        return worst, high, least


def names() -> list[str]:
    """All posteriors."""
    return sorted(file.stem for file in DATA.glob("*.json"))


def load(name: str) -> Reference:
    """A posterior by the name of its file."""
    file = json.loads((DATA / f"{name}.json").read_text("utf-8"))
    data = {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in file["data"].items()}
    make = _MODELS.get(name) or (_nes if name.startswith("nes") else _regressions)
    return Reference(name, *make(name, data), file["reference"])


Model = tuple[int, Callable[[Tensor], Any], Callable[[Tensor], Named]]


def _named(scalars: Named | None = None, **vectors: Tensor) -> Named:
    """Parameters by Stan's names: elements of vectors are numbered."""
    found = dict(scalars or {})
    for name, vector in vectors.items():
        found |= {f"{name}[{i + 1}]": vector[..., i] for i in range(vector.shape[-1])}
    return found


# --- linear regressions -----------------------------------------------------------------------------------------------


def _linear(
    y: Tensor,
    columns: Sequence[Tensor],
    *,
    cauchy: float | None = None,
    prior_sd: float | None = None,
    sigma_sd: float | None = None,
) -> tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """y ~ N(X beta, sigma) over (beta, log sigma): value and gradient, from the QR decomposition of X."""
    x, n = torch.stack([torch.as_tensor(c, dtype=torch.float64).expand(len(y)) for c in columns], 1), len(y)
    q, r = torch.linalg.qr(x)
    best = torch.linalg.solve_triangular(r, (q.T @ y)[:, None], upper=True)[:, 0]
    rest = (y - x @ best).square().sum()  # of squares, around the least-squares fit
    k = x.shape[1]

    def log_prob(at: Tensor) -> tuple[Tensor, Tensor]:
        beta, log_sigma = at[:, :k], at[:, k]
        precision = torch.exp(-2 * log_sigma)
        away = (beta - best) @ r.T
        squares = (rest + away.square().sum(1)) * precision
        value = (1 - n) * log_sigma - 0.5 * squares
        gradient = torch.cat([-(away @ r) * precision[:, None], (1 - n + squares)[:, None]], 1)
        if cauchy is not None:
            ratio = (log_sigma.exp() / cauchy).square()
            value = value - torch.log1p(ratio)
            gradient[:, k] -= 2 * ratio / (1 + ratio)
        if prior_sd is not None:
            value = value - 0.5 * (beta / prior_sd).square().sum(1)
            gradient[:, :k] -= beta / prior_sd**2
        if sigma_sd is not None:
            ratio = (log_sigma.exp() / sigma_sd).square()
            value = value - 0.5 * ratio
            gradient[:, k] -= ratio
        return value, gradient

    return k + 1, log_prob


def _coefficients(at: Tensor) -> Named:
    return _named({"sigma": at[..., -1].exp()}, beta=at[..., :-1])


def _regressions(name: str, d: dict[str, Any]) -> Model:
    group, model = name.split("-")
    one = torch.ones(())
    if group.startswith("kidiq"):
        return *_kidiq(model, d, one), _coefficients
    if group == "earnings":
        return *_earnings(model, d, one), _coefficients
    log = {k: v.log() for k, v in d.items() if isinstance(v, Tensor) and k != "group"}
    volume = log["diam1"] + log["diam2"] + log["canopy_height"]
    area, shape = log["diam1"] + log["diam2"], log["diam1"] - log["diam2"]
    total, density, kind = log["total_height"], log["density"], d["group"]
    columns = {
        "logmesquite": [log["diam1"], log["diam2"], log["canopy_height"], total, density, kind],
        "logmesquite_logvolume": [volume],
        "logmesquite_logva": [volume, area, kind],
        "logmesquite_logvas": [volume, area, shape, total, density, kind],
        "logmesquite_logvash": [volume, area, shape, total, kind],
    }[model]
    return *_linear(log["weight"], [one, *columns]), _coefficients


def _kidiq(model: str, d: dict[str, Any], one: Tensor) -> Any:
    hs, iq, y = d["mom_hs"], d["mom_iq"], d["kid_score"]
    if model == "kidscore_mom_work":
        return _linear(y, [one, *((d["mom_work"] == level).double() for level in (2, 3, 4))])
    if model.endswith(("_c", "_c2")):
        hs, iq = (hs - hs.mean(), iq - iq.mean()) if model.endswith("_c") else (hs - 0.5, iq - 100)
        return _linear(y, [one, hs, iq, hs * iq])
    columns = {"kidscore_momhs": [hs], "kidscore_momiq": [iq], "kidscore_interaction": [hs, iq, hs * iq]}[model]
    return _linear(y, [one, *columns], cauchy=2.5)


def _earnings(model: str, d: dict[str, Any], one: Tensor) -> Any:
    earn, height, male = d["earn"], d["height"], d["male"]
    if model == "earn_height":
        return _linear(earn, [one, height])
    z = (height - height.mean()) / height.std()
    columns = {
        "log10earn_height": [height],
        "logearn_height": [height],
        "logearn_height_male": [height, male],
        "logearn_logheight_male": [height.log(), male],
        "logearn_interaction_z": [z, male, z * male],
    }[model]
    return _linear(earn.log10() if "10" in model else earn.log(), [one, *columns])


def _nes(name: str, d: dict[str, Any]) -> Model:
    ages = [(d["age_discrete"] == level).double() for level in (2, 3, 4)]
    columns = [torch.ones(()), d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"]]
    return *_linear(d["partyid7"], columns), _coefficients


def _blr(name: str, d: dict[str, Any]) -> Model:
    return *_linear(d["y"], list(d["X"].T), prior_sd=10.0, sigma_sd=10.0), _coefficients


def _ar(name: str, d: dict[str, Any]) -> Model:
    y, k = d["y"], d["K"]
    lags = [y[k - i : len(y) - i] for i in range(1, k + 1)]
    model = _linear(y[k:], [torch.ones(()), *lags], cauchy=2.5, prior_sd=10.0)
    return *model, lambda at: _coefficients(at[..., 1:]) | {"alpha": at[..., 0]}


# --- time series ------------------------------------------------------------------------------------------------------


def _recursion(c: Tensor, factor: Tensor) -> Tensor:
    """x_t = c_t + factor x_{t-1}, (chains, T), by doubling: (1 - a L)^-1 = prod_j (1 + (a L)^(2^j))."""
    shift, power = 1, factor[:, None]
    while shift < c.shape[1]:
        c = c + power * pad(c[:, :-shift], (shift, 0))
        shift, power = 2 * shift, power.square()
    return c


def _arma(name: str, d: dict[str, Any]) -> Model:
    y, n = d["y"], len(d["y"])

    def log_prob(at: Tensor) -> Tensor:
        mu, phi, theta, log_sigma = at.unbind(1)
        first = (y[0] - mu - phi * mu)[:, None]
        error = _recursion(torch.cat([first, y[1:] - mu[:, None] - phi[:, None] * y[:-1]], 1), -theta)
        prior = -0.5 * ((mu / 10).square() + (phi / 2).square() + (theta / 2).square())
        sigma = log_sigma.exp()
        prior = prior - torch.log1p((sigma / 2.5).square()) + log_sigma
        return prior - n * log_sigma - 0.5 * (error / sigma[:, None]).square().sum(1)

    return (
        4,
        log_prob,
        lambda at: dict(zip(("mu", "phi", "theta", "sigma"), (*at[..., :3].unbind(-1), at[..., 3].exp()), strict=True)),
    )


def _garch(name: str, d: dict[str, Any]) -> Model:
    y, first = d["y"], d["sigma1"] ** 2

    def log_prob(at: Tensor) -> Tensor:
        mu, a0, u, v = at.unbind(1)
        a1, share = torch.sigmoid(u), torch.sigmoid(v)
        b1 = (1 - a1) * share
        off = (y - mu[:, None]).square()
        given = a0.exp()[:, None] + a1[:, None] * off[:, :-1]
        variance = _recursion(torch.cat([torch.full_like(given[:, :1], first), given], 1), b1)
        # log a0; logit a1; b1 is a share, on the logit scale, of 1 - a1
        jacobian = a0 + logsigmoid(u) + 2 * logsigmoid(-u) + logsigmoid(v) + logsigmoid(-v)
        return jacobian - 0.5 * (off / variance + variance.log()).sum(1)

    def constrain(at: Tensor) -> Named:
        a1 = torch.sigmoid(at[..., 2])
        b1 = (1 - a1) * torch.sigmoid(at[..., 3])
        return {"mu": at[..., 0], "alpha0": at[..., 1].exp(), "alpha1": a1, "beta1": b1}

    return 4, log_prob, constrain


_LEAST = 1e-300  # of a probability beside 1, so that logarithms have a gradient


def _forward(emission: Tensor, log_theta: Tensor) -> Tensor:
    """Log-likelihood of a hidden Markov chain, (chains,), by a tree of products of its matrices.

    ``emission`` (chains, T, states), ``log_theta`` (chains, from, to); both states enter with weight 1.
    """
    # M_t[j, k] = theta[j, k] p(y_t | k), each scaled to a largest element of 1, with the logs of the scales summed
    m = log_theta[:, None] + emission[:, 1:, None, :]
    total, m = _scaled(m, emission.new_zeros(len(emission)))
    while m.shape[1] > 1:
        last = m[:, m.shape[1] // 2 * 2 :]
        a, b = m[:, 0 : m.shape[1] // 2 * 2 : 2], m[:, 1::2]
        product = (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
        total, product = _scaled(product.clamp(min=_LEAST).log(), total)
        m = torch.cat([product, last], 1)
    begin = emission[:, 0]
    return total + torch.logsumexp(begin[:, :, None] + m[:, 0].clamp(min=_LEAST).log(), dim=(1, 2))


def _scaled(log_m: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    top = log_m.detach().amax(dim=(2, 3), keepdim=True)  # any constant does
    return total + top.sum(dim=(1, 2, 3)), (log_m - top).exp()


def _rows(at: Tensor) -> tuple[Tensor, Tensor]:
    """Log of two simplex rows (..., 2, 2) on the logit scale, and the Jacobian's logarithm."""
    one, other = logsigmoid(at), logsigmoid(-at)
    return torch.stack([one, other], -1), (one + other).sum(-1)


def _ordered(at: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    """Two increasing numbers and the Jacobian's logarithm."""
    if positive:
        return at.exp().cumsum(-1), at.sum(-1)
    return torch.stack([at[..., 0], at[..., 0] + at[..., 1].exp()], -1), at[..., 1]


def _gaussian(y: Tensor, mean: Tensor, sd: float) -> Tensor:
    return -0.5 * ((y[:, None] - mean[:, None, :]) / sd).square() - math.log(sd)


def _hmm(name: str, d: dict[str, Any]) -> Model:
    def log_prob(at: Tensor) -> Tensor:
        log_theta, jacobian = _rows(at[:, :2])
        mu, more = _ordered(at[:, 2:], positive=True)
        prior = -0.5 * ((mu[:, 0] - 3).square() + (mu[:, 1] - 10).square())
        return jacobian + more + prior + _forward(_gaussian(d["y"], mu, 1.0), log_theta)

    def constrain(at: Tensor) -> Named:
        theta = _rows(at[..., :2])[0].exp()
        return _named(theta1=theta[..., 0, :], theta2=theta[..., 1, :], mu=_ordered(at[..., 2:], True)[0])

    return 4, log_prob, constrain


def _drive(name: str, d: dict[str, Any]) -> Model:
    u, v, alpha, exponential = d["u"], d["v"], d["alpha"], name.endswith("0")

    def log_prob(at: Tensor) -> Tensor:
        log_theta, jacobian = _rows(at[:, :2])
        phi, more = _ordered(at[:, 2:4], exponential)
        rate, again = _ordered(at[:, 4:], exponential)
        prior = ((alpha - 1) * log_theta).sum((1, 2))
        for x in (phi, rate):
            prior = prior - 0.5 * (x[:, 0].square() + (x[:, 1] - 3).square())
        if exponential:
            emission = sum(x.log()[:, None] - x[:, None] * y[:, None] for x, y in ((phi, u), (rate, v)))
        else:
            emission = _gaussian(u, phi, d["tau"]) + _gaussian(v, rate, d["rho"])
        return jacobian + more + again + prior + _forward(emission, log_theta)

    def constrain(at: Tensor) -> Named:
        theta = _rows(at[..., :2])[0].exp()
        phi, rate = (_ordered(at[..., k : k + 2], exponential)[0] for k in (2, 4))
        return _named(theta1=theta[..., 0, :], theta2=theta[..., 1, :], phi=phi, **{"lambda": rate})

    return 6, log_prob, constrain


# --- others -----------------------------------------------------------------------------------------------------------


def _schools(name: str, d: dict[str, Any]) -> Model:
    y, s = d["y"], d["sigma"]

    def log_prob(at: Tensor) -> tuple[Tensor, Tensor]:
        z, mu, log_tau = at[:, :8], at[:, 8:9], at[:, 9:]
        tau = log_tau.exp()
        off, ratio = (y - mu - tau * z) / s, (tau / 5).square()
        value = (-0.5 * (mu / 5).square() - torch.log1p(ratio) + log_tau)[:, 0]
        pull = off / s
        by_tau = 1 - 2 * ratio / (1 + ratio) + tau * (pull * z).sum(1, keepdim=True)
        gradient = torch.cat([tau * pull - z, pull.sum(1, keepdim=True) - mu / 25, by_tau], 1)
        return value - 0.5 * (z.square() + off.square()).sum(1), gradient

    def constrain(at: Tensor) -> Named:
        mu, tau = at[..., 8], at[..., 9].exp()
        return _named({"mu": mu, "tau": tau}, theta=mu[..., None] + tau[..., None] * at[..., :8])

    return 10, log_prob, constrain


def _gp(name: str, d: dict[str, Any]) -> Model:
    x, k = d["x"], d["k"]
    square, jitter = (x[:, None] - x).square(), 1e-10 * torch.eye(len(x), dtype=torch.float64)

    def values(at: Tensor) -> Tensor:
        rho, alpha = at[..., 0].exp()[..., None, None], at[..., 1].exp()[..., None, None]
        root, failed = torch.linalg.cholesky_ex(alpha.square() * torch.exp(-0.5 * square / rho.square()) + jitter)
        # a matrix that is singular in float64 gives no density, as in Stan
        root = torch.where((failed == 0)[..., None, None], root, torch.nan)
        return (root @ at[..., 2:, None])[..., 0]

    def log_prob(at: Tensor) -> Tensor:
        log_rho, log_alpha, f = at[:, 0], at[:, 1], values(at)
        prior = 25 * log_rho - 4 * log_rho.exp() - 0.5 * (log_alpha.exp() / 2).square() + log_alpha
        return prior - 0.5 * at[:, 2:].square().sum(1) + (k * f - f.exp()).sum(1)

    def constrain(at: Tensor) -> Named:
        return _named({"rho": at[..., 0].exp(), "alpha": at[..., 1].exp()}, f=values(at))

    return 2 + len(x), log_prob, constrain


def lotka_volterra(log_z: np.ndarray, theta: np.ndarray, years: int, steps: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Log populations after each year, (years, 2, chains), and their derivatives, (years, 2, 6, chains).

    By the classical Runge-Kutta method for the logarithms, u' = theta_1 - theta_2 e^v and v' = -theta_3 + theta_4 e^u,
    and for their sensitivities to the four rates and the two starts; four steps a year are right to 1e-4. Start and
    rates are (2, chains) and (4, chains).
    """
    chains, h = theta.shape[1], 1 / steps
    w = np.zeros((2, 7, chains))  # column 0 the logarithms, columns 1 to 6 their derivatives
    w[:, 0] = log_z
    w[0, 5] = w[1, 6] = 1
    rate = np.stack([-theta[1], theta[3]])  # what e^v does to u, and e^u to v
    base = np.stack([theta[0], -theta[2]])

    def slope(w: np.ndarray) -> np.ndarray:
        e = np.exp(w[::-1, 0])
        pull = rate * e
        out = pull[:, None] * w[::-1]
        out[:, 0] = base + pull
        out[0, 1] += 1
        out[0, 2] -= e[0]
        out[1, 3] -= 1
        out[1, 4] += e[1]
        return out

    found = np.empty((years, 2, 7, chains))
    for year in range(years):
        for _ in range(steps):
            a = slope(w)
            b = slope(w + (0.5 * h) * a)
            c = slope(w + (0.5 * h) * b)
            e = slope(w + h * c)
            w = w + (h / 6) * (a + 2 * (b + c) + e)
        found[year] = w
    return found[:, :, 0], found[:, :, 1:]


def _hares(name: str, d: dict[str, Any]) -> Model:
    y = d["y"].log().numpy()  # (years, 2)
    y0 = d["y_init"].log().numpy()

    @np.errstate(all="ignore")  # far from the bulk populations leave the range of numbers: those steps are rejected
    def log_prob(at: Tensor) -> tuple[Tensor, Tensor]:
        x = at.detach().numpy().T  # log of four rates, two starts, two sigmas
        theta, log_z, log_sigma = np.exp(x[:4]), x[4:6], x[6:]
        log_w, by = lotka_volterra(log_z, theta, len(y))
        precision = np.exp(-2 * log_sigma)
        off = np.concatenate([(y0[:, None] - log_z)[None], y[:, :, None] - log_w])  # (1 + years, 2, chains)
        squares = (off**2).sum(0) * precision
        mean, sd = np.array([1, 0.05, 1, 0.05])[:, None], np.array([0.5, 0.05, 0.5, 0.05])[:, None]
        away = (theta - mean) / sd
        start = log_z - math.log(10)
        value = (-0.5 * away**2 + x[:4]).sum(0) - 0.5 * (start**2).sum(0) - 0.5 * ((log_sigma + 1) ** 2).sum(0)
        value = value - (len(off) * log_sigma + 0.5 * squares).sum(0)
        value[np.abs(log_w).max((0, 1)) > 100] = -math.inf  # the steps were too long there: Stan's solver gives up too
        gradient = np.empty_like(x)
        pull = np.einsum("ysc,yskc->kc", off[1:] * precision, by)
        gradient[:4] = (pull[:4] - away / sd) * theta + 1
        gradient[4:6] = pull[4:] + off[0] * precision - start
        gradient[6:] = squares - len(off) - (log_sigma + 1)
        return torch.from_numpy(value), torch.from_numpy(gradient.T.copy())

    def constrain(at: Tensor) -> Named:
        x = at.exp()
        return _named(theta=x[..., :4], z_init=x[..., 4:6], sigma=x[..., 6:])

    return 8, log_prob, constrain


_MODELS: dict[str, Callable[[str, dict[str, Any]], Model]] = {
    "sblrc-blr": _blr,
    "arK-arK": _ar,
    "arma-arma11": _arma,
    "garch-garch11": _garch,
    "hmm_example-hmm_example": _hmm,
    "bball_drive_event_0-hmm_drive_0": _drive,
    "bball_drive_event_1-hmm_drive_1": _drive,
    "eight_schools-eight_schools_noncentered": _schools,
    "gp_pois_regr-gp_pois_regr": _gp,
    "hudson_lynx_hare-lotka_volterra": _hares,
}


# --- runs -------------------------------------------------------------------------------------------------------------


CHAINS = 16
# the length scale has a steep tail, which steps of the default acceptance rarely enter
_SETTINGS: dict[str, dict[str, Any]] = {
    "gp_pois_regr-gp_pois_regr": {"warmup": 1000, "draws": 2000, "target_accept": 0.95}
}


def settings(name: str) -> dict[str, Any]:
    """What a run is asked for; everything else is the sampler's default."""
    return {"warmup": 500, "draws": 1000, **_SETTINGS.get(name, {})}


def run(name: str, *, sampler: Any = hmc, seed: int = 0) -> tuple[float, float, float, float]:
    """(largest z, largest R-hat, least ESS, CPU seconds) of a run from Stan's starts."""
    model = load(name)
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unhealthy)  # the table says it
        x = sampler.sample(model.log_prob, model.starts(CHAINS, seed), generator=seed, **settings(name)).draws
    seconds = time.process_time() - begin
    return *model.misses(x), seconds


def bench(quick: bool = True, only: Sequence[str] = ()) -> list[Row]:
    """Rows of name, what, value, unit and ratio: HMC on all posteriors (or ``only`` these), and NUTS if not quick."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        for name in only or names():
            for sampler, label in ((hmc, "infer.hmc"), (nuts, "infer.nuts"))[: 1 if quick else 2]:
                z, high, n, seconds = run(name, sampler=sampler)
                verdict = "passes" if z < 4 and high < 1.01 else "FAILS"
                who = f"{label}: {verdict}, worst z {z:.2f}, R-hat {high:.4f}, {seconds:.1f} CPU-s"
                asked = settings(name)
                what = f"{name}, {CHAINS} chains x ({asked['warmup']:,} + {asked['draws']:,})"
                if "target_accept" in asked:
                    what += f", target_accept={asked['target_accept']}"
                rows.append({"name": who, "what": what, "value": n / seconds, "unit": "ESS/CPU-s", "ratio": None})
    finally:
        torch.set_num_threads(before)
    return rows


if __name__ == "__main__":
    import sys

    from mlcollage.lab.bench import to_markdown

    print(to_markdown(bench(only=sys.argv[1:])))
