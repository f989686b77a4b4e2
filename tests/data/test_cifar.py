"""CIFAR: the binary version is read exactly, what is pickled is refused, other copies are taken for what they are."""

import pickle

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Pillow

from mlcollage.data import cifar
from mlcollage.data.catalog import catalog
from mlcollage.data.loading import load_workload
from mlcollage.data.workload import arrays
from mlcollage.errors import InvalidInput, MissingFile, UnknownName

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (120, 3, 32, 32), dtype=np.uint8)


def write(folder, name="cifar10"):
    """Twenty images a file, in the real format; returns the labels, one column or two."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = cifar.SETS[name]
    labels = np.stack([RNG.integers(0, kind.classes[label], 120) for label in kind.labels], axis=1).astype(np.uint8)
    labels[-1] = [kind.classes[label] - 1 for label in kind.labels]
    files = (*kind.train, kind.test)
    for i, file in enumerate(files):
        rows = slice(20 * i, 20 * i + 20)
        record = np.concatenate([labels[rows], PIXELS[rows].reshape(20, -1)], axis=1)
        (folder / file).write_bytes(record.tobytes())
    for label, file in kind.names.items():
        names = cifar.CIFAR10_CLASSES if label == "label" else [f"{label}{i}" for i in range(kind.classes[label])]
        (folder / file).write_text("\n".join(names) + "\n\n")
    return labels[: 20 * len(files)].astype(np.int64)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLCOLLAGE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pixels_and_labels_are_those_of_the_files(tmp_path):
    labels = write(tmp_path)
    x, y, xt, yt = cifar.load(tmp_path)
    np.testing.assert_array_equal(x, PIXELS[:100])
    np.testing.assert_array_equal(xt, PIXELS[100:])
    assert (y.tolist(), yt.tolist()) == (labels[:100, 0].tolist(), labels[100:, 0].tolist())
    assert (x.dtype, y.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize(("kind", "column"), [("coarse", 0), ("fine", 1)])
def test_cifar100_has_two_labels_an_image(tmp_path, kind, column):
    labels = write(tmp_path / "cifar-100-binary", "cifar100")
    x, y, xt, yt = cifar.load(tmp_path, "cifar100", labels=kind)  # the folder it lies in does as well
    np.testing.assert_array_equal(np.concatenate([x, xt]), PIXELS[:40])
    assert np.concatenate([y, yt]).tolist() == labels[:, column].tolist()
    workload = load_workload(f"cifar100:{tmp_path}?labels={kind}")
    assert workload.num_classes == (20, 100)[column]
    assert workload.train.classes[3] == f"{kind}3"


def test_a_workload_of_it_has_floats_names_and_a_fingerprint(tmp_path):
    labels = write(tmp_path)
    workload = load_workload(f"cifar10:{tmp_path}")
    X, y = arrays(workload.test)
    np.testing.assert_allclose(X, PIXELS[100:] / 255, rtol=1e-6)
    assert y.tolist() == labels[100:, 0].tolist()
    assert workload.describe()["shape"] == [3, 32, 32]
    assert (workload.name, workload.num_classes, workload.train.classes) == ("cifar10", 10, cifar.CIFAR10_CLASSES)
    small = load_workload(f"cifar10:{tmp_path}?n=30&test=7")
    assert (len(small.train), len(small.test), small.name) == (30, 7, "cifar10?n=30&test=7")
    assert small.fingerprint != workload.fingerprint
    (tmp_path / "batches.meta.txt").unlink()
    assert load_workload(f"cifar10:{tmp_path}").train.classes == cifar.CIFAR10_CLASSES


@pytest.mark.parametrize("place", ["named", "named/cifar-10-batches-bin", "data/cifar-10-batches-bin",
                                   "home/data/cifar-10-batches-bin"])  # fmt: skip
def test_the_usual_folders_are_looked_into(nowhere, monkeypatch, place):
    assert cifar.find() is None
    rows = {row["name"]: row for row in catalog()}
    assert not rows["cifar10"]["available"]
    with pytest.raises(MissingFile, match=r"not on this machine; download its binary version .*kriz/cifar.html"):
        load_workload("cifar10")
    monkeypatch.setenv("MLCOLLAGE_DATA", str(nowhere / "named"))
    write(nowhere / place)
    assert cifar.find().resolve() == (nowhere / place).resolve()
    assert {row["name"]: row for row in catalog()}["cifar10"]["available"]
    assert len(load_workload("cifar10?n=10").train) == 10


def test_the_pickled_version_is_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    for name, folder, files in (
        ("cifar10", "cifar-10-batches-py", ("data_batch_1", "batches.meta", "test_batch")),
        ("cifar100", "cifar-100-python", ("train", "test", "meta")),
    ):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_bytes(pickle.dumps(Bomb()))
        for place in (tmp_path, tmp_path / folder):
            with pytest.raises(InvalidInput, match=r"Python version of cifar.* pickled.* binary version from https"):
                cifar.load(place, name)
            with pytest.raises(InvalidInput, match="pickled"):
                load_workload(f"{name}:{place}")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes((tmp_path / "test_batch.bin").read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="61,459 bytes, which is no whole number of cifar10 records of 3,073"):
        cifar.load(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0b" * 3073)
    with pytest.raises(InvalidInput, match="holds the label 11, but cifar10 has 10 classes"):
        cifar.load(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(MissingFile, match=r"has no file test_batch.bin"):
        cifar.load(tmp_path)
    with pytest.raises(MissingFile, match="there is no folder"):
        load_workload("cifar10:no/such/folder")
    with pytest.raises(MissingFile, match="there is no file"):
        cifar.read_bin(tmp_path / "x.bin")
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"")
    with pytest.raises(InvalidInput, match="unpack the archive"):
        load_workload(f"cifar10:{tmp_path / 'cifar-10-binary.tar.gz'}")
    with pytest.raises(UnknownName, match=r"CIFAR set must be .* not 'cifar20'"):
        cifar.load(tmp_path, "cifar20")
    with pytest.raises(UnknownName, match="labels must be one of 'label', not 'coarse'"):
        cifar.load(tmp_path, labels="coarse")
    with pytest.raises(InvalidInput, match="no option 'labels'"):
        load_workload(f"cifar10:{tmp_path}?labels=fine")
    with pytest.raises(InvalidInput, match="n must be a whole number"):
        load_workload(f"cifar10:{tmp_path}?n=0")


def test_images_arrays_and_saved_sets_are_taken_if_they_are_cifar(tmp_path):
    folder = tmp_path / "photos"
    for part, start in (("train", 0), ("test", 10)):
        for i, name in enumerate(cifar.CIFAR10_CLASSES):
            (folder / part / name).mkdir(parents=True)
            Pillow.fromarray(PIXELS[start + i].transpose(1, 2, 0)).save(folder / part / name / "1.png")
    np.savez(tmp_path / "a.npz", X=PIXELS[:20], y=np.arange(20) % 10, X_test=PIXELS[20:30], y_test=np.arange(10))
    rows = [
        Dataset.from_dict(
            {"img": [Pillow.fromarray(x.transpose(1, 2, 0)) for x in part], "label": np.arange(len(part)) % 10},
            features=Features({"img": Image(), "label": ClassLabel(names=list(cifar.CIFAR10_CLASSES))}),
        )
        for part in (PIXELS[:20], PIXELS[20:30])
    ]
    DatasetDict({"train": rows[0], "test": rows[1]}).save_to_disk(tmp_path / "saved")
    for place, sizes in (("photos", (10, 10)), ("a.npz", (20, 10)), ("saved", (20, 10))):
        workload = load_workload(f"cifar10:{tmp_path / place}")
        assert (len(workload.train), len(workload.test)) == sizes
        X, y = arrays(workload.train)
        np.testing.assert_allclose(X[:10], PIXELS[:10] / 255, atol=1e-6)
        assert y[:10].tolist() == list(range(10))
        small = load_workload(f"cifar10:{tmp_path / place}?n=4&test=3")
        assert (arrays(small.train)[0].shape, len(small.test)) == ((4, 3, 32, 32), 3)
        assert len(small.train.classes) == 10
        assert small.fingerprint != workload.fingerprint
        with pytest.raises(InvalidInput, match="has 10 classes and images"):
            load_workload(f"cifar100:{tmp_path / 'a.npz'}")
    np.savez(tmp_path / "gray.npz", X=PIXELS[:50, :1], y=np.arange(50) % 10)
    with pytest.raises(InvalidInput, match="leave out the prefix"):
        load_workload(f"cifar10:{tmp_path / 'gray.npz'}")
    with pytest.raises(MissingFile, match=r"there is no file none\.npz"):
        load_workload("cifar10:none.npz")


def test_normalizing_is_the_paper_s():
    x = cifar.normalize(PIXELS[:4])
    for channel, mean in enumerate((0.49, 0.48, 0.44)):
        np.testing.assert_allclose(x[:, channel], (PIXELS[:4, channel] / 255 - mean) / 0.2, atol=1e-6)
    assert x.dtype == np.float32
    np.testing.assert_allclose(cifar.normalize((PIXELS[:4] / 255).astype(np.float32)), x, atol=1e-6)
    with pytest.raises(InvalidInput, match=r"\(n, 3, h, w\)"):
        cifar.normalize(PIXELS[:, :1])
