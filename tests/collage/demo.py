"""Invented content for the tests of slides and pages. None of these numbers was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlcollage.collage import theme
from mlcollage.collage.content import Card, ClaimRow, Collage, Entry, IntervalPlot, Panel, Slide
from mlcollage.collage.diagram import Diagram
from mlcollage.collage.slide import describe, render_slide, short_alternative

ARMS = theme.arm_colors(["gln8", "mlp"], muted=["peer"])


def idea(ax):
    d = Diagram(ax, 440, 440)
    cuts = d.halfspaces(80, 75, 140, 130, [[1.0, 0.5], [-0.55, 1.0]], [0.1, -0.1])
    d.circle(95, 62, 6, color=ARMS["mlp"])
    d.note(118, 52, "$z$", color=theme.INK, fontsize=16)
    d.note(88, 160, "side information $z$")
    weights = d.tensor(300, 82, np.linspace(0, 1, 20).reshape(4, 5)[:, [2, 4, 1, 0, 3]], cell=24, highlight=[3])
    d.note(300, 18, "weights, one row a region")
    d.arrow(cuts.right, (236, 118), curve=0.25)
    q = d.circle(300, 215, 25, "$q$", color=ARMS["gln8"], size=14)
    d.arrow(weights.bottom, q.top, "$w_{c(z)}$")
    for y in (185, 208, 231, 254):
        d.line(d.circle(150, y, 8, color="#9DB2C2"), q)
    d.note(70, 220, "predictions\n$p_i$ below")
    d.arrow(q, (340, 215))
    d.note(344, 215, "next layer", ha="left")
    d.field(220, 362, 440, 150)
    d.equation(220, 318, r"q = \sigma(w_{c(z)} \cdot \mathrm{logit}(p))", size=19)
    d.equation(
        220, 362, r"w_{c(z)} \leftarrow \mathrm{clip}(w_{c(z)} - \eta\,(q - x)\,\mathrm{logit}(p))", size=17, room=410
    )
    d.note(220, 408, "a convex problem in every neuron")


def lines(ax):
    x = np.arange(1, 5)
    for name, text, end in (("gln8", "GLN, 8 half-spaces", 0.94), ("mlp", "MLP (best of grid)", 0.42)):
        y = np.linspace(0.95, end, 4)
        theme.band(ax, x, y - 0.03 * x, np.minimum(y + 0.03 * x, 1), ARMS[name])
        ax.plot(x, y, "-o", color=ARMS[name])
        theme.label_line_end(ax, 4, end, text, ARMS[name])
    y = np.linspace(0.95, 0.91, 4)
    ax.plot(x, y, "--o", color=ARMS["gln8"])
    theme.label_line_end(ax, 4, 0.91, "GLN, 4", ARMS["gln8"])
    ax.set_xticks(x)
    ax.set_xlabel("tasks learned so far (permuted digits)")
    theme.tidy(ax, grid="y", ticks=4)


def dose(ax):
    rng = np.random.default_rng(0)
    m = np.array([1, 2, 4, 6, 8])
    mean = np.array([0.4, 0.52, 0.73, 0.86, 0.94])
    theme.dots_with_interval(
        ax, m, mean, mean - 0.06, mean + 0.04, ARMS["gln8"], seeds=mean[:, None] + rng.normal(0, 0.03, (5, 8))
    )
    theme.reference_line(ax, 0.42, "MLP", ARMS["mlp"])
    theme.tidy(ax, grid="y", ticks=4)
    ax.set_xticks(m)
    ax.set_xlabel("half-spaces per neuron")


def matrices(part):
    axes = part.subplots(1, 2)
    for ax, name, color in zip(axes, ("GLN", "MLP"), (ARMS["gln8"], ARMS["mlp"]), strict=True):
        m = np.full((4, 4), np.nan)
        for i in range(4):
            m[i, : i + 1] = 96 - (i - np.arange(i + 1)) * (0.7 if name == "GLN" else 18)
        theme.heatmap(ax, m, color, text="{:.0f}", limits=(20, 100), labels=("1234", "1234"))
        ax.set_title(name, color=theme.ink(color))
        ax.set_xlabel("tested on task")
    axes[0].set_ylabel("after task")


def speeds(ax):
    names = ["this library", "numpy, peer", "JAX, peer", "torch, peer"]
    colors = [ARMS["gln8"], *[ARMS["peer"]] * 3]
    theme.lollipops(ax, names, [56500, 903, 826, 128], colors, text="{:,.0f}", log=True)


IDEA = Panel(
    "The idea",
    idea,
    "A plane cut by two lines picks one row of weights, which mixes the predictions below into q.",
    "Every neuron predicts the label itself. Half-spaces of the input pick which weights it mixes with.",
)
PANELS = (
    Panel(
        "It keeps what it learned",
        lines,
        "Accuracy on task 1 falls to 0.42 for the MLP, stays at 0.94.",
        "accuracy on task 1",
    ),
    Panel(
        "More half-spaces, less forgetting", dose, "Accuracy grows from 0.4 to 0.94.", "task 1 accuracy after task 4"
    ),
    Panel("Accuracy on every task so far", matrices, "Two triangular matrices.", "percent", own_axes=True),
    Panel("Samples per second, online", speeds, "56,500 against 903, 826 and 128.", "one core, log scale"),
    Panel("Mean log-loss by depth", dose, "Falls.", "nats, five seeds"),
    Panel("Regret grows slowly", lines, "Falls.", "log regret against log steps"),
)
PLOTS = {  # estimate, interval, reference, margin
    "C1": IntervalPlot(6.1, 4.8, 7.4, 0, 0, 2),
    "C2": IntervalPlot(-0.03, -0.05, -0.01, 0, -0.01, 0),
    "C3": IntervalPlot(52, 47, 57, 0, 0, 5),
    "C5": IntervalPlot(3e-13, 3e-13, 3e-13, 1e-12, 1e-12, 1e-12),
    "C6": IntervalPlot(-0.01, -0.04, 0.02, 0, -0.02, 0),
    "C7": IntervalPlot(1.2, 1.1, 1.3, 1, 0.9, 1),
}
HEADLINES = ("C1", "C3", "C6", "C7")
TITLES = (
    ("C1", "Beats one-pass MLP", "98%", "+6.1 pts [4.8, 7.4]", "supported", ""),
    ("C2", "Learns early in the stream", "", "−0.03 [−0.05, −0.01]", "supported", ""),
    ("C3", "Resists forgetting", "almost on par", "+52 pts [47, 57]", "supported", ""),
    ("C4", "Capacity grows with size", "like a ReLU net", "", "untested", "from full scale"),
    ("C5", "Read-out is exactly linear", "exact", "max error 3e−13", "supported", ""),
    ("C6", "Depth lowers the log-loss", "", "−0.01 [−0.04, 0.02]", "inconclusive", ""),
    ("C7", "Regret grows sub-linearly", "slope 0.5", "slope 1.2 [1.1, 1.3]", "contradicted", ""),
    ("C8", "Density: 79 nats an image", "79.0 nats", "", "untested", "from full scale"),
    ("C9", "Regression is competitive", "UCI", "−0.02 [−0.09, 0.05]", "inconclusive", ""),
    ("C10", "First among nine bandits", "rank 1", "", "untested", "from full scale"),
    ("C11", "Strong on small tables, WWWW", "≥ batch SVM", "", "untested", "from paper scale"),
)


def cards(count):
    return [
        Card(*row, headline=row[0] in HEADLINES, finding=f"{row[1]}, as a sentence", plot=PLOTS.get(row[0]))
        for row in TITLES[:count]
    ]


def slide(
    panels=2,
    count=6,
    *,
    title="Gated Linear Networks",
    byline="Veness, Lattimore, Budden et al.  ·  AAAI 2021  ·  arXiv 1910.01526",
    **fields,
):
    tagline = fields.pop("tagline", "learns online, without backpropagation, without forgetting")
    main = replace(PANELS[0], claim="C3" if count >= 3 else "")
    values = {
        "slug": "demo",
        "title": title,
        "byline": byline,
        "month": "2021-05",
        "collage": Collage(tagline, IDEA, main, PANELS[1 : 1 + panels], "digits", "GLN 50-25-1"),
        "cards": cards(count),
        "foot_left": "DEMO, numbers invented  ·  digits  ·  GLN 50-25-1  ·  quick scale  ·  5 seeds",
        "foot_right": "runs 3f9a2c–77b0aa  ·  2 CPU cores  ·  2026-11-21",
        "number": 15,
    }
    return Slide(**{**values, **fields})


PAPERS = {
    "2021-03": ("synthetic_gradients", "canonical_capsules", "neural_mechanics", "programmatic_trajectories"),
    "2021-05": ("asymmetric_self_play", "deep_bootstrap", "gated_linear_networks", "bidirectional_update_rules"),
    "2021-06": ("statistical_ideas", "bnn_posteriors", "barlow_twins", "class_selectivity"),
    "2021-09": ("autosklearn2", "vit_training", "fisher_explosion", "vit_vs_cnn"),
}
IDEAS = ("causal", "bootstrap", "regularize", "multilevel", "compute", "adaptive", "robust", "explore")
USAGE = """from mlcollage.papers.demo import Classifier  # a name made up for this test

model = Classifier(layers=(50, 25, 1), half_spaces=8, learning_rate=0.003)
for x, y in stream:
    model.partial_fit(x, y)
print(model.score(X_test, y_test), "accuracy")"""
SUMMARY = (
    "DEMO. Every neuron predicts the target itself and is trained on-line as a small convex problem; what it mixes is "
    "chosen by half-spaces of the input. No gradient crosses a layer, <so> little is forgotten & the prediction is "
    "linear in the input wherever no half-space is crossed."
)


def claim_rows():
    return [
        ClaimRow(
            id=i,
            sentence=f"{title}: the demo is more accurate than its control after one pass.",
            source="Fig. 2",
            paper=paper,
            estimand="accuracy(gln) − accuracy(mlp), paired by seed",
            test="Student's t, one-sided, α = 0.05, Holm",
            smallest_effect="2 pts",
            ours=ours,
            seeds=10 if ours else 0,
            p_value="0.0004" if ours else "",
            status=status,
            reason=note and f"not tested at this scale: {note}",
            warnings=("two seeds of ten are outliers",) if i == "C2" else (),
            title=title,
            headline=i in HEADLINES,
        )
        for i, title, paper, ours, status, note in TITLES
    ]


def entries(folder, measured=("gated_linear_networks", "deep_bootstrap", "barlow_twins")):
    """All sixteen papers as the pages show them, with slides in ``folder``."""
    out = []
    for month, slugs in PAPERS.items():
        for k, slug in enumerate(slugs):
            title = "DEMO " + slug.replace("_", " ").title()
            state = "measured" if slug in measured else ("built" if k % 2 else "planned")
            fields = {}
            if state == "measured":
                one = slide(2, 11 - 5 * (measured.index(slug) % 2), title=title, slug=slug, month=month)
                fields = {
                    "slide_svg": render_slide(one, folder, ["svg", "png"])["svg"],
                    "slide_alt": short_alternative(one),
                    "description": describe(one),
                    "finding": "Resists forgetting, as a sentence",
                    "number": 15 + k,
                    "tagline": f"the idea of {slug}",
                    "picture": f"slides/{slug}.png",
                    "claims": claim_rows(),
                    "data_links": [("measurements.parquet", "measurements.parquet"), ("runs.json", "runs.json")],
                    "foot": "quick scale · digits · 10 seeds · runs 3f9a2c…",
                }
            if state != "planned":
                fields |= {"summary": SUMMARY, "usage": USAGE}
            out.append(
                Entry(
                    slug,
                    title,
                    "A. Author, B. Author, C. Author",
                    "Venue 2021",
                    month,
                    "1910.01526",
                    IDEAS[k : k + 3],
                    state,
                    **fields,
                )
            )
    return out
