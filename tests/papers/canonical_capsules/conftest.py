"""Numbers of the official code, and its weights in this package's models."""

from pathlib import Path

import numpy as np
import pytest
import torch

OFFICIAL = Path(__file__).parent / "official"


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small only wait for a second thread, for long on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def official():
    """``official("losses")``: the arrays of a file by name, as tensors where they hold numbers."""
    files = {}

    def read(name):
        if name not in files:
            with np.load(OFFICIAL / f"{name}.npz") as file:
                files[name] = {k: v if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in file.items()}
        return files[name]

    return read


def ours(name):
    """The name here of one of the official encoder's or canonicalizer's parameters or buffers."""
    if name.startswith("block0.proj."):
        rest = name.removeprefix("block0.")
    elif name.startswith("block"):
        block, layer, rest = name.split(".", 2)
        rest = f"blocks.{block.removeprefix('block')}.{layer.removeprefix('layer')}.{rest}"
    else:
        rest = name
    return rest.replace(".att.", ".norm.att.").removeprefix("mlp.")


def decoders(name):
    """The same for the decoder: the name here, and whether the array is stored flat."""
    if name == "grid":
        return "grid", False
    part, what = name.split(".", 1)
    if part.startswith("lin"):
        return f"{what}.{int(part[3]) - 1}", False
    return f"norm.{int(part[2]) - 1}.{what}", True


def load_encoder(module, arrays, prefix):
    """Put the official weights into an encoder or canonicalizer of float64."""
    state = {ours(k.removeprefix(prefix)): v for k, v in arrays.items() if k.startswith(prefix)}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") or name.startswith("readout") for name in missing), missing


def load_decoder(module, arrays, prefix):
    state = {}
    for k, v in arrays.items():
        if k.startswith(prefix):
            name, flat = decoders(k.removeprefix(prefix))
            state[name] = v.flatten() if flat else v.double()
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing


def gap(a, b):
    """Largest difference relative to max(1, the largest entry)."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / max(1.0, float(b.abs().max())))
