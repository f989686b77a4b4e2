"""The claims, written before the runs."""

from __future__ import annotations

from functools import partial

from mlcollage.lab import Claim, Difference, Level, Trend

FORGET_ARMS = ("gln_m1", "gln_m2", "gln_m4", "gln_m8")  # half-spaces per neuron
_points = partial(Claim, factor=100, unit="pts", digits=1)  # accuracies, in percentage points

CLAIMS = (
    _points(
        id="C1",
        title="In one pass, a gated linear network beats an MLP",
        sentence="After a single online pass, a GLN is more accurate on test data than an MLP trained by "
        "backpropagation one sample at a time, both tuned over eight settings.",
        source="one-pass MNIST",
        paper_value="98%",
        estimand=Difference("accuracy", "gln", "mlp"),
        direction="greater",
        margin=0.02,
        headline=True,
    ),
    _points(
        id="C1b",
        title="In one pass, a gated linear network beats a linear model",
        sentence="After a single online pass, a GLN is more accurate on test data than multinomial logistic "
        "regression trained one sample at a time, both tuned over eight settings.",
        source="one-pass MNIST",
        estimand=Difference("accuracy", "gln", "linear"),
        direction="greater",
        margin=0.02,
    ),
    _points(
        id="C2",
        title="A gated linear network learns sooner than an MLP",
        sentence="Over the first fifth of the stream, a GLN predicts more of the coming samples right than an MLP; "
        "each is tuned for just that.",
        source="data efficiency",
        estimand=Difference("early_accuracy", "gln", "mlp"),
        direction="greater",
        margin=0.02,
        headline=True,
        says={
            "supported": "In one pass it learns sooner than an MLP: {effect} ahead",
            "contradicted": "In one pass it does not learn sooner than an MLP ({effect})",
            "inconclusive": "Whether it learns sooner than an MLP is open ({effect})",
        },
    ),
    _points(
        id="C3",
        title="A gated linear network forgets less than an MLP",
        sentence="After four permuted tasks, one pass each, a GLN with 8 half-spaces per neuron is more accurate over "
        "all four than an MLP that was tuned for that.",
        source="permuted MNIST figure",
        estimand=Difference("average_accuracy", "gln_m8", "mlp"),
        direction="greater",
        margin=0.10,
        headline=True,
    ),
    *(
        _points(
            id=id,
            title=f"A gated linear network forgets no more than {rival}",
            sentence="After four permuted tasks, one pass each, a GLN with 8 half-spaces per neuron is at most 2 "
            f"points less accurate over all four than an MLP with {told}; each is tuned for that. What they keep in "
            "memory differs, and is recorded.",
            source="permuted MNIST figure",
            estimand=Difference("average_accuracy", "gln_m8", arm),
            direction="at_least",
            null=-0.02,
            headline=arm == "replay",
            says={
                "supported": f"After four tasks a gated network still knows {{0}}, an MLP with {rival} {{1}}",
                "contradicted": f"An MLP with {rival} forgets less: after four tasks it knows {{1}}, the GLN {{0}}",
                "inconclusive": f"After four tasks a gated network knows {{0}}, an MLP with {rival} {{1}}: not settled",
            },
        )
        for id, arm, rival, told in (
            ("C3c", "replay", "replay", "500 stored samples that it learns from again"),
            ("C3d", "ewc", "elastic weights", "elastic weight consolidation, which is told where a task ends"),
            ("C3e", "dropout", "dropout", "dropout"),
        )
    ),
    Claim(
        id="C3b",
        title="More half-spaces per neuron mean less forgetting",
        sentence="What is left of the first task's accuracy after the fourth rises with the number of half-spaces "
        "per neuron (1, 2, 4, 8).",
        source="permuted MNIST figure",
        estimand=Trend("retention", over=FORGET_ARMS),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C4",
        title="Larger gated networks can memorize more random labels",
        sentence="The share of random labels of uniform noise that a GLN can learn rises with its number of neurons.",
        source="Fig. 2",
        estimand=Trend("memorized", over="size", arm="gln"),
        direction="greater",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C5",
        title="Predictions split exactly into feature effects",
        sentence="Where no clip is active, the output's logit equals the saliency (the product of the selected weight "
        "matrices) times the base logits, to 1e-10 in double precision, on every test sample.",
        source="interpretability",
        estimand=Level("linearity_residual", "gln"),
        direction="at_most",
        null=1e-10,
        test="exact",
        headline=True,
        kind="check",
        says={
            "supported": "Each prediction splits into feature effects, to {effect}",
            "contradicted": "Predictions do not split into feature effects (off by {effect})",
            "inconclusive": "Whether predictions split into feature effects is open ({effect})",
        },
    ),
    Claim(
        id="C6",
        title="Output neurons predict better than first-layer neurons",
        sentence="The output neurons predict the class with a smaller log-loss on test data than the neurons of the "
        "first layer do on average.",
        source="every neuron predicts",
        estimand=Difference("layer_log_loss", "gln", "gln", treatment_where={"layer": 3}, control_where={"layer": 1}),
        direction="less",
        margin=0.005,
        unit="nats",
        digits=3,
        headline=True,
    ),
    Claim(
        id="C7",
        title="A neuron's regret grows more slowly than linearly",
        sentence="The regret of a neuron with step size proportional to 1/sqrt(t), against the best fixed weights per "
        "context in hindsight, grows more slowly than t: the slope of log regret over log t is below 1.",
        source="local regret bound",
        paper_value="O(√T)",
        estimand=Level("regret_slope", "neuron"),
        direction="at_most",
        null=1.0,
    ),
    Claim(
        id="C8",
        title="Gated networks beat linear density models",
        sentence="Sixty-four chained GLNs describe binarized digits in fewer nats per image, after one pass, than "
        "logistic autoregression trained the same way.",
        source="2017 report, binarized MNIST",
        estimand=Difference("nats", "gln_density", "autoregression"),
        direction="less",
        margin=0.5,
        unit="nats",
    ),
    *(
        Claim(
            id=id,
            title=f"One online pass nearly matches {rival}",
            sentence="After one online pass, the Gaussian GLN's root mean squared error is at most 10% above that of "
            f"batch {told} (geometric mean over diabetes, friedman1 and a noisy sine).",
            source="Gaussian GLN, UCI table",
            estimand=Difference("mean_log_rmse", "gaussian_gln", arm),
            direction="at_most",
            null=0.0953,
            unit="log ratio",
            digits=3,
        )
        for id, arm, rival, told in (
            ("C9", "bayesian_ridge", "ridge regression", "Bayesian ridge regression"),
            ("C9b", "boosting", "tuned gradient boosting", "gradient boosting, both tuned over twelve settings"),
            ("C9c", "knn", "tuned nearest neighbors", "nearest neighbors, both tuned over twelve settings"),
        )
    ),
    Claim(
        id="C10",
        title="A gated linear bandit makes fewer errors than LinUCB",
        sentence="On digits as a contextual bandit, GLCB plays fewer wrong actions than LinUCB; each rule's "
        "exploration constant is chosen among four.",
        source="GLCB ranking",
        paper_value="first of 10",
        estimand=Difference("bandit_regret", "glcb", "linucb"),
        direction="less",
        margin=25,
        unit="errors",
        digits=0,
    ),
    _points(
        id="C11",
        title="One online pass comes near a tuned SVM",
        sentence="A single pass of a GLN is at most 3 points less accurate than a support vector machine tuned on all "
        "data (mean over breast cancer, digits, iris and wine).",
        source="UCI table",
        estimand=Difference("mean_table_accuracy", "gln", "svm"),
        direction="at_least",
        null=-0.03,
    ),
)
