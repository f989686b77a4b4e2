"""Tiny ImageNet, from tiny files in the format of the real archive."""

import numpy as np
import pytest
import torch
from PIL import Image

from mlcollage.data.loading import load_workload
from mlcollage.data.tiny_imagenet import find, load
from mlcollage.data.workload import arrays
from mlcollage.errors import InvalidInput, MissingFile

IDS = ("n02124075", "n01443537", "n04067472")  # wnids.txt is not in sorted order


def picture(path, value, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (64, 64) if mode == "L" else (64, 64, 3)
    Image.fromarray(np.full(size, value, np.uint8), mode).save(path, "JPEG", quality=95)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for k, wnid in enumerate(IDS):
        for i in range(4):
            picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 60 * k + i, "L" if i == 1 else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    lines = []
    for i in range(12):
        picture(root / "val" / "images" / f"val_{i}.JPEG", 20 * i)
        lines.append(f"val_{i}.JPEG\t{IDS[i % 3]}\t0\t32\t44\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    picture(root / "test" / "images" / "test_0.JPEG", 0)
    (root / "wnids.txt").write_text("\n".join(IDS))
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn00000001\tx\n")
    return root


def test_both_parts_with_their_labels(folder):
    train, val = load(folder)
    assert train.classes == ("goldfish", "Egyptian cat", "n04067472")
    assert (len(train), len(val)) == (12, 12)
    assert train.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert val.labels[:4] == [1, 0, 2, 1]
    image, label = train[1]  # stored gray, as some of the real ones are
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.float32
    assert float(image.mean()) == pytest.approx(61 / 255, abs=0.01)
    assert int(label) == 0
    assert float(val[11][0].mean()) == pytest.approx(220 / 255, abs=0.01)


def test_it_is_a_workload(folder):
    whole = load_workload(f"tiny_imagenet:{folder}")
    assert (whole.num_classes, len(whole.train), len(whole.test)) == (3, 12, 12)
    part = load_workload(f"tiny_imagenet:{folder.parent}?per_class=2")
    assert (len(part.train), len(part.test)) == (6, 6)
    assert part.name == "tiny_imagenet?per_class=2"
    assert part.fingerprint != whole.fingerprint
    X, y = arrays(part.train)
    assert X.shape == (6, 3, 64, 64)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]


def test_it_is_found_where_the_environment_says(folder, monkeypatch):
    monkeypatch.setenv("MLCOLLAGE_DATA", str(folder.parent))
    assert find() == folder
    assert len(load()[0]) == 12
    assert load_workload("tiny_imagenet").num_classes == 3


def test_numbers_count_and_not_letters(folder):
    _, val = load(folder, per_class=4)
    assert [p.name for p in val.paths][-2:] == ["val_10.JPEG", "val_11.JPEG"]
    picture(folder / "train" / IDS[1] / "images" / f"{IDS[1]}_10.JPEG", 9)
    train, _ = load(folder, per_class=5)
    assert train.paths[4].name == f"{IDS[1]}_10.JPEG"


def test_without_the_lists_of_names(folder):
    (folder / "wnids.txt").unlink()
    (folder / "words.txt").unlink()
    train, val = load(folder)
    assert train.classes == tuple(sorted(IDS))
    assert val.labels[:4] == [1, 0, 2, 1]


def broken(folder, what):
    notes = folder / "val" / "val_annotations.txt"
    if what == "no annotations":
        notes.unlink()
    elif what == "strange class":
        notes.write_text("val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    elif what == "no tab":
        notes.write_text("val_0.JPEG n01443537\n")
    elif what == "empty":
        notes.write_text("")
    elif what == "lost image":
        (folder / "val" / "images" / "val_3.JPEG").unlink()
    elif what == "lost class":
        (folder / "wnids.txt").write_text("n01443537\nn77777777\n")
    elif what == "empty class":
        for p in (folder / "train" / IDS[0] / "images").iterdir():
            p.unlink()


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("no annotations", MissingFile, "there is no file"),
        ("strange class", InvalidInput, "n99999999"),
        ("no tab", InvalidInput, "expected file, tab, class"),
        ("empty", InvalidInput, "names no image"),
        ("lost image", MissingFile, "val_3.JPEG"),
        ("lost class", MissingFile, "n77777777"),
        ("empty class", MissingFile, "holds no images"),
    ],
)
def test_what_is_broken_is_named(folder, what, error, words):
    broken(folder, what)
    with pytest.raises(error, match=words):
        load(folder)


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(MissingFile, match="expected the folders train and val"):
        load(tmp_path)
    monkeypatch.setenv("MLCOLLAGE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MissingFile, match=r"unpack tiny-imagenet-200\.zip"):
        load()


def test_unknown_options_are_refused(folder):
    with pytest.raises(InvalidInput, match="has no option 'size'"):
        load_workload(f"tiny_imagenet:{folder}?size=32")
