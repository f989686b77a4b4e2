"""A ResNet in plain PyTorch, trained in three processes that do not wait for each other.

Run it with ``python examples/resnet_in_three_processes.py``; it prints what each process did, and the accuracy.
"""

from functools import partial

import torch
from fashion_resnet import FashionResNet
from torch import nn

from mlcollage.data import fashion_mnist
from mlcollage.papers.synthetic_gradients import Context, StageParts, run_pipeline, split_blocks, synthesizer_for

CUTS = ["stem", "stages.1"]  # three parts: the stem, two stages, the rest
BATCH, BATCHES = 64, 150


def images(part, count):
    """The first images and labels of a part, standardized."""
    x_train, y_train, x_test, y_test = fashion_mnist.load(limit=count)
    x, y = (x_train, y_train) if part == "train" else (x_test, y_test)
    return (torch.from_numpy(x).reshape(-1, 1, 28, 28) - 0.286) / 0.353, torch.from_numpy(y)


def blocks():
    """The network as a chain of three; the same in every process."""
    torch.manual_seed(0)
    return split_blocks(FashionResNet(), CUTS, example=torch.zeros(2, 1, 28, 28))


def build(rank):
    """What one process computes with."""
    h, chain = torch.zeros(2, 1, 28, 28), blocks()
    for block in chain[: rank + 1]:
        h = block.eval()(h)
    block = chain[rank].train()
    adam = partial(torch.optim.Adam, lr=2e-3)
    if rank == len(CUTS):
        return StageParts(block, adam(block.parameters()))
    synthesizer = synthesizer_for(h, context_dim=10)  # it sees the label
    return StageParts(block, adam(block.parameters()), synthesizer, adam(synthesizer.parameters()))


def batches():
    """Pairs of images and labels, read by the first process."""
    x, y = images("train", BATCH * BATCHES)
    return zip(x.split(BATCH), y.split(BATCH), strict=True)


if __name__ == "__main__":
    timeline = run_pipeline(
        build, batches, stages=len(CUTS) + 1, loss_fn=nn.CrossEntropyLoss(), context=Context("labels", 10)
    )
    for row in timeline.summary():
        print(row)
    print(
        f"{timeline.steps_per_second:.1f} steps/s; loss {timeline.losses[0]:.2f} to {timeline.losses[-10:].mean():.2f}"
    )

    chain = blocks()  # the plain network again, with the weights that the processes learned
    for rank, block in enumerate(chain):
        state = timeline.states[rank]
        block.load_state_dict(
            {k.removeprefix("block."): torch.tensor(v) for k, v in state.items() if "block." in k[:6]}
        )
    h, y = images("test", 2000)
    with torch.no_grad():
        for block in chain:
            h = block.eval()(h)
    print(f"test accuracy {float((h.argmax(1) == y).float().mean()):.3f}")
