"""Fashion-MNIST: IDX files are read exactly or refused, and every way of getting them ends in one line."""

import functools
import gzip
import hashlib
import http.server
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from mlcollage.data import fashion_mnist
from mlcollage.errors import InvalidInput, MissingFile

RNG = np.random.default_rng(0)
PARTS = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (50, 28, 28), dtype=np.uint8),
    "train-labels-idx1-ubyte": RNG.integers(0, 10, 50, dtype=np.uint8),
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8),
    "t10k-labels-idx1-ubyte": RNG.integers(0, 10, 20, dtype=np.uint8),
}


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder, *, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in PARTS.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without Fashion-MNIST, apt or network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MLCOLLAGE_DATA", raising=False)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: None)
    monkeypatch.setattr(fashion_mnist, "URL", (tmp_path / "mirror").as_uri() + "/")
    monkeypatch.setattr(fashion_mnist.download, "__kwdefaults__", {"url": fashion_mnist.URL, "timeout": 5.0})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_hashes(monkeypatch):
    hashes = {name: hashlib.sha256(idx(array)).hexdigest() for name, array in PARTS.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)


@pytest.mark.parametrize("compress", [True, False])
def test_pixels_and_labels_are_those_of_the_files(tmp_path, compress):
    x, y, xt, yt = fashion_mnist.load(write(tmp_path, compress=compress))
    np.testing.assert_array_equal(x, PARTS["train-images-idx3-ubyte"].reshape(50, 784).astype(np.float32) / 255)
    np.testing.assert_array_equal(yt, PARTS["t10k-labels-idx1-ubyte"])
    assert (x.dtype, y.dtype, xt.shape) == (np.float32, np.int64, (20, 784))
    assert [len(part) for part in fashion_mnist.load(tmp_path, limit=30)] == [30, 30, 20, 20]


@pytest.mark.parametrize(
    "place",
    ["named", "named/fashion-mnist", "named/FashionMNIST/raw", "home/.cache/mlcollage/fashion-mnist",
     "home/.keras/datasets/fashion-mnist", "data/FashionMNIST/raw", "debian"],
)  # fmt: skip
def test_every_usual_folder_is_looked_into(nowhere, monkeypatch, place):
    assert fashion_mnist.find() is None
    monkeypatch.setenv("MLCOLLAGE_DATA", str(nowhere / "named"))
    write(nowhere / place)
    assert fashion_mnist.find().resolve() == (nowhere / place).resolve()
    assert fashion_mnist.prepare() == f"Fashion-MNIST: found in {fashion_mnist.find()}."
    (nowhere / place / "t10k-labels-idx1-ubyte.gz").unlink()
    assert fashion_mnist.find() is None  # three files are not four


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"PNG?", "not an IDX file"),
        (b"\0\0\x0d\1" + b"\0" * 20, "not an IDX file of bytes"),
        (b"\0\0\x08\x09", "not an IDX file"),
        (idx(PARTS["train-labels-idx1-ubyte"])[:-1], "is damaged: 50 values need 58 bytes, it has 57"),
        (idx(PARTS["train-labels-idx1-ubyte"]) + b"\0", "is damaged"),
        (b"\0\0\x08\x03\0\0\0\1", "is damaged"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "is damaged"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path, content, message):
    plain, packed = tmp_path / "file", tmp_path / "file.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed):
        with pytest.raises(InvalidInput, match=message):
            fashion_mnist.read_idx(path)


def test_a_broken_archive_is_refused(tmp_path):
    path = tmp_path / "file.gz"
    packed = gzip.compress(idx(PARTS["train-images-idx3-ubyte"]))
    for content in (b"not gzip at all", packed[:-100], packed[:200] + b"\xff" * 200 + packed[400:]):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match=r"cannot be read .*mlcollage data prepare"):
            fashion_mnist.read_idx(path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(49, np.uint8))))
    with pytest.raises(InvalidInput, match="does not hold Fashion-MNIST"):
        fashion_mnist.load(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(50, 10, np.uint8))))
    with pytest.raises(InvalidInput, match="up to 10"):
        fashion_mnist.load(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(MissingFile, match="neither train-labels-idx1-ubyte nor"):
        fashion_mnist.load(tmp_path)


def test_without_the_files_one_line_says_so(nowhere):
    with pytest.raises(MissingFile, match="mlcollage data prepare"):
        fashion_mnist.load()
    line = fashion_mnist.prepare()
    assert "\n" not in line
    assert line.startswith("Fashion-MNIST: not available (no apt-get here;")
    assert "going on with generated data" in line


def test_the_download_is_checked_and_resumed(nowhere, tiny_hashes):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012

        def log_message(self, format, *values):
            self.asked.append(self.path)

    mirror = write(nowhere / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(mirror)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        folder = fashion_mnist.download(url=url, timeout=5)
        assert folder == Path.home() / ".cache/mlcollage/fashion-mnist"
        assert fashion_mnist.find() == folder
        assert fashion_mnist.load()[0].shape == (50, 784)
        (folder / "t10k-labels-idx1-ubyte.gz").unlink()
        Quiet.asked.clear()
        fashion_mnist.download(url=url, timeout=5)
        assert Quiet.asked == ["/t10k-labels-idx1-ubyte.gz"]
        with pytest.raises(MissingFile, match=r"nothing/train-images.* cannot be fetched .*404"):
            fashion_mnist.download(nowhere / "other", url=url + "nothing/", timeout=5)
    finally:
        server.shutdown()
        server.server_close()


def test_prepare_downloads_where_nothing_else_works(nowhere, tiny_hashes):
    write(nowhere / "mirror")
    assert fashion_mnist.prepare().startswith("Fashion-MNIST: downloaded to ")
    assert fashion_mnist.find() is not None


@pytest.mark.parametrize("content", [gzip.compress(idx(PARTS["train-images-idx3-ubyte"] + 1)), b"<html>"])
def test_a_forged_file_is_not_kept(nowhere, tiny_hashes, content):
    (write(nowhere / "mirror") / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(InvalidInput, match="SHA-256 differs"):
        fashion_mnist.download(nowhere / "new")
    assert list((nowhere / "new").iterdir()) == []
    assert "not the original file" in fashion_mnist.prepare()


def test_prepare_installs_the_package_where_apt_and_root_are(nowhere, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        if "update" in command:
            return fashion_mnist.subprocess.CompletedProcess(command, 0)
        if len(calls) == 1:  # package lists are missing on a fresh machine
            return fashion_mnist.subprocess.CompletedProcess(command, 100)
        write(nowhere / "debian")
        return fashion_mnist.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(fashion_mnist.subprocess, "run", run)
    monkeypatch.setattr(fashion_mnist.os, "geteuid", lambda: 1000)
    assert "needs root" in fashion_mnist.prepare()
    assert calls == []
    monkeypatch.setattr(fashion_mnist.os, "geteuid", lambda: 0)
    assert fashion_mnist.prepare().startswith("Fashion-MNIST: installed in ")
    assert [command[-1] for command in calls] == ["dataset-fashion-mnist", "update", "dataset-fashion-mnist"]


def test_the_stated_hashes_and_shapes_are_those_of_the_real_set_where_it_is_here():
    """The catalog says where the set is; where it is, its contents have the hashes we check downloads against."""
    folder = fashion_mnist.find()
    found = {} if folder is None else {
        name: hashlib.sha256(idx(fashion_mnist.read_idx(fashion_mnist._need(folder, name)))).hexdigest()
        for name in fashion_mnist.SHA256
    }  # fmt: skip
    assert found in ({}, fashion_mnist.SHA256)
