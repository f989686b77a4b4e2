"""Point clouds as workloads: what is taken from files and arrays, and what is refused in a sentence."""

import struct
import warnings

import h5py
import numpy as np
import pytest

from mlcollage.data import (
    PointClouds,
    load_meshes,
    load_modelnet40_h5,
    load_shapenet_h5,
    load_workload,
    procedural_shapes,
)
from mlcollage.data.kinds import as_workload
from mlcollage.data.point_clouds import check_cloud, normalize, subset
from mlcollage.errors import InvalidInput, MissingDependency, MissingFile

RNG = np.random.default_rng(0)
# Two triangles of area 1 and 99, far apart: vertices are no sample of them.
CORNERS = np.array([[0, 0, 0], [2, 0, 0], [0, 1, 0], [50, 0, 0], [61, 0, 0], [50, 18, 0]], dtype=float)


def clouds(n=20, points=40, dim=3):
    return np.random.default_rng(1).normal(size=(n, points, dim))


def obj(path, corners=CORNERS, scale=1.0):
    lines = [f"v {x} {y} {z}" for x, y, z in scale * corners] + ["f 1 2 3", "f 4 5 6"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_a_workload_says_of_itself():
    labels = np.arange(20) % 2
    made = PointClouds(clouds(), clouds(4), labels, labels[:4], classes=("cat", "dog"), name="pets")
    made.check("pets")
    facts = made.describe()
    assert (facts["train"], facts["test"], facts["dimension"], facts["points"]) == (20, 4, 3, "40")
    assert facts["classes"] == ["cat", "dog"]
    ragged = [clouds(1, n)[0] for n in (30, 50)]
    assert PointClouds(ragged, ragged).describe()["points"] == "30 to 50"


def test_a_users_dictionary_is_point_clouds():
    made = as_workload({"clouds": clouds(), "test_clouds": clouds(3)}, "mine")
    assert isinstance(made, PointClouds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clouds": []}, "clouds is empty"),
        ({"clouds": 3}, "sequence of clouds"),
        ({"test_clouds": clouds(2, 10)}, "at least 16"),
        ({"clouds": clouds(2, 40, 2)}, "2 and 3 coordinates"),
        ({"clouds": clouds(2).transpose(0, 2, 1)}, "coordinates first"),
        ({"clouds": clouds(2, 40, 6)}, r"cloud\[:, :3\]"),
        ({"clouds": RNG.normal(size=(2, 8, 8, 3))}, "flattened"),
        ({"clouds": clouds(2).astype(str)}, "numbers"),
        ({"labels": np.zeros(20, int)}, "both labels"),
        ({"labels": np.zeros(19, int), "test_labels": np.zeros(4, int)}, "20 whole numbers"),
        ({"labels": np.zeros(20), "test_labels": np.zeros(4, int)}, "whole numbers"),
        ({"labels": np.full(20, 5), "test_labels": np.zeros(4, int), "classes": ("a",)}, "names for 1"),
        ({"parts": np.zeros((20, 40), int)}, "both parts"),
        ({"parts": np.zeros((20, 39), int), "test_parts": np.zeros((4, 40), int)}, "40 whole numbers"),
    ],
)
def test_what_is_refused(change, words):
    given = {"clouds": clouds(), "test_clouds": clouds(4), **change}
    with pytest.raises(InvalidInput, match=words):
        PointClouds(**given).check("mine")


def test_fake_returns_are_refused_and_counted():
    bad = np.concatenate([RNG.normal(size=(1000, 3)) + 5, np.zeros((200, 3))])
    with pytest.raises(InvalidInput, match=r"200 times.*nothing seen"):
        check_cloud(bad, "scan")
    bad[3, 0] = np.nan
    with pytest.raises(InvalidInput, match="1 points with NaN"):
        check_cloud(bad, "scan")
    with pytest.raises(InvalidInput, match="one place"):
        check_cloud(np.ones((50, 3)), "scan")
    check_cloud(np.repeat(RNG.normal(size=(60, 3)), 2, 0), "twice")


def test_one_scale_and_no_lost_digits():
    box = RNG.uniform(size=(200, 3)) * [2, 1, 0.5]
    scaled = normalize(box + np.array([4.5e5, 5.5e6, 100]))
    extent = np.ptp(scaled, axis=0)
    np.testing.assert_allclose(extent / extent[0], np.ptp(box, axis=0) / np.ptp(box[:, 0]), rtol=1e-4)
    assert np.linalg.norm(scaled, axis=1).max() == pytest.approx(1)


def test_a_subset_repeats_nothing_until_it_must():
    rows = np.arange(30)[:, None]
    assert len(np.unique(subset(rows, 30, np.random.default_rng(0)))) == 30
    counts = np.bincount(subset(rows, 70, np.random.default_rng(0))[:, 0])
    assert counts.min() == 2
    assert counts.max() == 3


@pytest.mark.parametrize("suffix", ["obj", "off", "ply", "stl"])
def test_points_are_drawn_by_area(tmp_path, suffix):
    path = tmp_path / f"two.{suffix}"
    if suffix == "obj":
        obj(path)
    else:
        import trimesh

        trimesh.Trimesh(CORNERS, [[0, 1, 2], [3, 4, 5]], process=False).export(path)
    points = load_meshes([path], 2000)[0]
    assert (points[:, 0] < 10).mean() == pytest.approx(0.01, abs=0.002)
    assert np.array_equal(points, load_meshes([path], 2000)[0])
    assert not np.array_equal(points, load_meshes([path], 2000, seed=1)[0])


def test_off_files_whose_header_has_the_counts(tmp_path):
    path = tmp_path / "a.off"
    path.write_text("OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    assert load_meshes([path], 20).shape == (1, 20, 3)
    path.write_text("OFF\n")
    with pytest.raises(InvalidInput, match=r"a\.off"):
        load_meshes([path], 20)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_binary_ply_of_triangles_and_squares(tmp_path, order, ending):
    """Two unit squares in the planes z = 0 and z = 5, one of them as two triangles; face scalars before the list."""
    name = {"<": "little", ">": "big"}[order]
    head = [
        "ply", f"format binary_{name}_endian 1.0", "element vertex 8", "property float x", "property double y",
        "property float z", "property uchar red", "element face 3", "property short flags",
        "property list uchar int vertex_indices", "end_header", "",
    ]  # fmt: skip
    corners = [(x, y, z) for z in (0, 5) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
    body = b"".join(struct.pack(order + "fdfB", *c, 7) for c in corners)
    for face in ((0, 1, 2, 3), (4, 5, 6), (4, 6, 7)):
        body += struct.pack(order + f"hB{len(face)}i", -1, len(face), *face)
    path = tmp_path / "mixed.ply"
    path.write_bytes(ending.join(line.encode() for line in head) + body)
    points = load_meshes([path], 4000)[0]
    assert set(np.unique(points[:, 2])) == {0.0, 5.0}
    assert abs((points[:, 2] == 0).mean() - 0.5) < 0.03  # equal areas
    for z in (0, 5):
        own = points[points[:, 2] == z]
        np.testing.assert_allclose(own[:, :2].mean(0), 0.5, atol=0.03)
        np.testing.assert_allclose(own[:, :2].var(0), 1 / 12, atol=0.01)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidInput, match="damaged"):
        load_meshes([path], 10)


def test_float32_far_from_the_origin_is_warned_of_once():
    rng = np.random.default_rng(0)
    near = [rng.normal(size=(50, 3)) for _ in range(3)]
    far = [np.add(c, [4.5e5, 5.5e6, 100]).astype(np.float32) for c in near]
    with pytest.warns(UserWarning, match="3 of 3 clouds") as seen:
        PointClouds(far, near, name="map").describe()
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PointClouds([np.add(c, [4.5e5, 5.5e6, 100]) for c in near], near, name="map").describe()


def test_ply_columns_by_name_and_without_faces(tmp_path):
    path = tmp_path / "scan.ply"
    points = RNG.normal(size=(50, 3))
    header = "ply\nformat binary_big_endian 1.0\nelement vertex 50\nproperty uchar red\nproperty double x\n"
    header += "property double y\nproperty double z\nend_header\n"
    path.write_bytes(header.encode() + b"".join(struct.pack(">Bddd", 7, *p) for p in points))
    found = load_meshes([path], 50)[0]
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(points, axis=0), rtol=1e-12)


def test_triangles_without_area_are_left_out(tmp_path):
    flat = np.zeros((6, 3))
    flat[3:] = CORNERS[3:]
    assert load_meshes([obj(tmp_path / "a.obj", flat)], 50)[0][:, 0].min() >= 50
    with pytest.raises(InvalidInput, match="none with an area"):
        load_meshes([obj(tmp_path / "b.obj", np.zeros((6, 3)))], 50)


def test_text_and_arrays(tmp_path):
    (tmp_path / "a.xyz").write_text("# comment\n0 0 0\n\n1,2,3\n")
    assert sorted(load_meshes([tmp_path / "a.xyz"], 2)[0][:, 2].tolist()) == [0, 3]
    (tmp_path / "b.xyz").write_text("0 0 0\n1 2 x\n")
    with pytest.raises(InvalidInput, match=r"b\.xyz, line 2"):
        load_meshes([tmp_path / "b.xyz"], 2)
    (tmp_path / "c.xyz").write_text("0 0 0 9\n1 2 3 9\n")
    with pytest.raises(InvalidInput, match="further columns"):
        load_meshes([tmp_path / "c.xyz"], 2)
    np.savez(tmp_path / "d.npz", points=np.eye(3))
    assert load_meshes([tmp_path / "d.npz"], 3).shape == (1, 3, 3)
    np.save(tmp_path / "e.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidInput, match="plain array"):
        load_meshes([tmp_path / "e.npy"], 3)
    with pytest.raises(MissingFile):
        load_meshes([tmp_path / "none.obj"])


def folder_of_meshes(root, split=False):
    for k, name in enumerate(("boat", "cup")):
        for part, count in (("train", 4), ("test", 2)) if split else (("", 6),):
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(count):
                obj(place / f"{i}.obj", CORNERS + RNG.normal(size=(6, 3)) * [1, 1, 3], scale=1000.0 * (k + 1))
    return root


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_of_meshes_by_name(tmp_path, split):
    folder = folder_of_meshes(tmp_path / "things", split)
    made = load_workload(f"points:{folder}?n=64")
    assert isinstance(made, PointClouds)
    assert made.classes == ("boat", "cup")
    assert (len(made.clouds), len(made.test_clouds)) == ((8, 4) if split else (10, 2))
    assert made.name == "points:things?n=64" + ("" if split else " (80/20 split)")
    assert {c.shape for c in made.clouds} == {(64, 3)}
    assert max(np.linalg.norm(c, axis=1).max() for c in made.clouds) == pytest.approx(1)
    flat = load_workload(f"points:{folder}?n=64&axes=xz")
    assert flat.dim == 2
    raw = load_workload(f"points:{folder}?n=64&normalize=none")
    assert max(np.abs(c).max() for c in raw.clouds) > 1000
    obj(next(folder.rglob("0.obj")), CORNERS + 1)
    assert load_workload(f"points:{folder}?n=64").fingerprint != made.fingerprint


def test_arrays_by_name(tmp_path):
    shapes = procedural_shapes(("plane", "mug"), 10, 40)
    np.savez(tmp_path / "s.npz", points=shapes.points, labels=shapes.labels, parts=shapes.parts)
    made = load_workload(f"points:{tmp_path / 's.npz'}?test=30")
    assert (len(made.clouds), len(made.test_clouds)) == (7, 3)
    assert made.name.endswith("(70/30 split)")
    assert len(made.parts[0]) == 40


@pytest.mark.parametrize(
    ("options", "words"),
    [("?m=3", "no option 'm'"), ("?n=0", "n must be"), ("?axes=zz", "axes"), ("?normalize=box", "normalize")],
)
def test_options_that_are_refused(tmp_path, options, words):
    with pytest.raises(InvalidInput, match=words):
        load_workload(f"points:{folder_of_meshes(tmp_path / 'f')}{options}")


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(MissingFile):
        load_workload(f"points:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="no files"):
        load_workload(f"points:{tmp_path / 'empty'}")
    mixed = folder_of_meshes(tmp_path / "mixed")
    obj(mixed / "own.obj")
    with pytest.raises(InvalidInput, match="of its own and in folders"):
        load_workload(f"points:{mixed}")


def shapenet(root):
    for name, size in (("plane", 12), ("chair", 3)):
        with h5py.File(root / f"{name}.h5", "w") as file:
            for i in range(size):
                file[f"pcd/point/{i}"] = np.sort(RNG.normal(size=(60, 3)).astype(np.float32) + 100 * i, axis=0)
    for split in ("train", "valid"):
        (root / f"{split}_cat.txt").write_text("plane.h5\nchair.h5\n")
    return root


def test_shapenet_in_hdf5(tmp_path):
    found = load_shapenet_h5(shapenet(tmp_path), n_points=20)
    assert found.points.shape == (15, 20, 3)
    assert found.classes == ("plane", "chair")
    # In the order of numbers, not of words: item 10 comes after 9.
    np.testing.assert_allclose(found.points[:12].mean((1, 2)), 100 * np.arange(12), atol=2)
    assert found.labels.tolist() == [0] * 12 + [1] * 3
    # A random subset, not the first rows of a file that is in scan order.
    with h5py.File(tmp_path / "plane.h5") as file:
        first = file["pcd/point/0"][:20]
    assert found.points[0, :, 0].max() > first[:, 0].max()
    again = load_shapenet_h5(tmp_path, n_points=20)
    assert np.array_equal(found.points, again.points)
    assert len(load_shapenet_h5(tmp_path, categories=["chair"], n_points=20).points) == 3
    with pytest.raises(InvalidInput, match="60 points"):
        load_shapenet_h5(tmp_path, n_points=100)
    with pytest.raises(InvalidInput, match="no category"):
        load_shapenet_h5(tmp_path, categories=["sofa"])
    with h5py.File(tmp_path / "plane.h5", "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(InvalidInput, match="pcd/point"):
        load_shapenet_h5(tmp_path, n_points=20)


def test_modelnet_in_hdf5(tmp_path):
    for split, size in (("train", 5), ("test", 4)):
        with h5py.File(tmp_path / f"ply_data_{split}0.h5", "w") as file:
            file["data"] = RNG.normal(size=(size, 32, 3)).astype(np.float32)
            file["label"] = (np.arange(size) % 3).astype(np.uint8)[:, None]
    found = load_modelnet40_h5(tmp_path, n_points=20)
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    made = load_workload(f"points:{tmp_path}?n=20")
    assert (len(made.clouds), len(made.test_clouds), made.classes) == (5, 4, ("0", "1", "2"))
    with pytest.raises(InvalidInput, match="32 points"):
        load_modelnet40_h5(tmp_path)
    with pytest.raises(MissingFile):
        load_modelnet40_h5(tmp_path, "valid")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trimesh", None)
    with pytest.raises(MissingDependency, match=r"mlcollage\[points\]"):
        load_meshes([obj(tmp_path / "a.obj")])
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(MissingDependency, match=r"mlcollage\[points\]"):
        load_shapenet_h5(shapenet_listing(tmp_path))


def shapenet_listing(root):
    (root / "train_cat.txt").write_text("plane.h5\n")
    return root


PLY = "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
PLY += "element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n2 0 0\n2 1 0\n0 1 0\n"
SQUARE = "v 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0\n"


def test_remarks_at_the_end_of_lines_of_obj(tmp_path):
    (tmp_path / "a.obj").write_text("# one\n" + SQUARE + "f -4 -3 -2 -1 # a quad\n")
    found = load_meshes([tmp_path / "a.obj"], 4000)[0]
    assert np.allclose(found.mean(0), [1, 0.5, 0], atol=0.03)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("cut.ply", PLY.rpartition("2 1 0")[0], "cut off"),
        ("range.ply", PLY + "3 0 1 9\n", "vertex 9"),
        ("negative.ply", PLY + "3 0 1 -1\n", "vertex -1"),
        ("strips.ply", PLY.replace("element face", "element tristrips") + "4 0 1 3 2\n", "strips"),
        ("names.ply", PLY.replace("float y", "float why") + "3 0 1 2\n", "without x, y and z"),
        ("none.ply", "", "no PLY file"),
        ("zero.obj", SQUARE + "f 0 1 2\n", "line 5: a face has the vertex 0"),
        ("flat.obj", "v 0 0\nv 1 0\nv 1 1\nf 1 2 3\n", "2 coordinates"),
    ],
)
def test_files_that_are_damaged(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInput, match=words):
        load_meshes([tmp_path / name], 5)


def test_settings_and_arrays_that_no_cloud_is_drawn_from(tmp_path):
    (tmp_path / "bom.xyz").write_bytes(b"\xef\xbb\xbf0 0 0\n1 1 1\n")
    assert load_meshes([tmp_path / "bom.xyz"], 2).shape == (1, 2, 3)
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "complex.npy", np.ones((20, 3)) * 1j)
    np.save(tmp_path / "flat.npy", np.ones((20, 2)))
    for paths, settings, words in (
        ("bom.xyz", {}, "list of files"),
        ([tmp_path / "empty.npy"], {}, "no plain array"),
        ([tmp_path / "complex.npy"], {}, "type complex128"),
        ([tmp_path / "bom.xyz", tmp_path / "flat.npy"], {}, "load them apart"),
        ([tmp_path / "bom.xyz"], {"n_points": 0}, "n_points"),
        ([tmp_path / "bom.xyz"], {"n_points": 2, "seed": -1}, "seed"),
    ):
        with pytest.raises(InvalidInput, match=words):
            load_meshes(paths, **settings)


def test_small_scans_are_gone_through_in_rounds(tmp_path):
    for i in range(10):
        np.savetxt(tmp_path / f"{i}.xyz", clouds(10)[i])
    (tmp_path / "._0.xyz").write_bytes(b"\0what a file system leaves")
    made = load_workload(f"points:{tmp_path}?n=1000")  # each of 40 points 25 times
    assert made.describe()["train"] == 8
    assert {len(np.unique(c, axis=0)) for c in made.clouds} == {40}


def test_options_of_arrays_are_read(tmp_path):
    points, parts = clouds(20, 100), np.tile(np.arange(100), (20, 1))
    np.savez(tmp_path / "a.npz", points=points, labels=np.arange(20) % 2, parts=parts)
    made = load_workload(f"points:{tmp_path / 'a.npz'}?n=32&limit=5&normalize=none")
    assert len(made.clouds) + len(made.test_clouds) == 10
    for cloud, part, label in zip(made.clouds, made.parts, made.labels, strict=True):
        assert cloud.shape == (32, 3)
        source = [i for i in range(20) if np.allclose(points[i][part], cloud)]  # points keep their parts
        assert [i % 2 for i in source] == [label]
    with pytest.raises(InvalidInput, match="option seed"):
        load_workload(f"points:{tmp_path / 'a.npz'}?seed=-1")
    np.savez(tmp_path / "b.npz", points=points, labels=np.arange(5))
    with pytest.raises(InvalidInput, match="expected 20 items"):
        load_workload(f"points:{tmp_path / 'b.npz'}")


def test_the_lists_of_shapenet_may_have_orders_of_their_own(tmp_path):
    for k, name in enumerate(("aa", "bb")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for i in range(3):
                file[f"pcd/point/{i}"] = clouds(3, 64)[i] * [1 + 9 * k, 1, 1]
    (tmp_path / "train_cat.txt").write_text("aa\nbb\n")
    (tmp_path / "valid_cat.txt").write_text("bb\n")
    made = load_workload(f"points:{tmp_path}?n=32")
    assert made.classes == ("aa", "bb")
    assert made.test_labels.tolist() == [1, 1, 1]
    (tmp_path / "train_cat.txt").write_text("aa\n")
    with pytest.raises(InvalidInput, match="'bb'"):
        load_workload(f"points:{tmp_path}?n=32")


def test_masks_and_lists_that_are_no_clouds():
    good = clouds(3)
    for wrong, words in (
        ([np.ma.array(good[0], mask=good[0] > 1)], "masked entries"),
        ([[[1, 2], [3]]], "must be numbers"),
        (good * 1e160, "larger unit"),
    ):
        with pytest.raises(InvalidInput, match=words):
            PointClouds(wrong, good).check("here")
    assert float(np.linalg.norm(normalize(good[0] * 1e-200), axis=1).max()) == pytest.approx(1)
