"""Released weights: all dialects in and out, resizing of positions, and files that are not what they seem."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.nn import build, load_augreg_npz, resize_posemb, save_augreg_npz
from mlcollage.nn.vit import ViT

ORACLES = Path(__file__).parent / "oracles" / "vit"


def small(in_shape=(3, 8, 12), classes=5, **kwargs):
    kwargs = {"patch_size": 4, "dim": 16, "depth": 2, "heads": 2, **kwargs}
    return build(lambda: ViT(in_shape, classes, **kwargs), 0).eval()


def perturbed(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


MODELS = {
    "token": {},
    "mean": {"pool": "mean", "pre_logits": 7},
    "stem": {"in_shape": (3, 32, 32), "patch_size": 1, "stem": (2, 1), "stem_width": 32, "pre_logits": 16},
}


@pytest.mark.parametrize("dialect", ["released", "flax", "big_vision"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_was_saved_comes_back(tmp_path, kind, dialect):
    model, fresh = perturbed(small(**MODELS[kind])), small(**MODELS[kind])
    report = load_augreg_npz(fresh, save_augreg_npz(model, tmp_path / "w.npz", dialect))
    assert report.loaded == len(list(model.parameters()))
    assert (report.left_out, report.kept, report.resized) == ((), (), None)
    if dialect == "big_vision" and model.token is not None:  # the class token's position is in the class token
        x = torch.randn(2, *model.in_shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(fresh(x), model(x))
        with np.load(tmp_path / "w.npz") as file:
            assert file["params/pos_embedding"].shape[1] == model.grid[0] * model.grid[1]
    else:
        assert same(model, fresh)


def test_all_dialects_of_one_file_give_one_model(tmp_path):
    sizes = {"in_shape": (3, 20, 24), "classes": 7, "dim": 24, "heads": 3, "mlp_dim": 40}
    models = [small(**sizes) for _ in range(3)]
    load_augreg_npz(models[0], ORACLES / "vit_token_released.npz")
    load_augreg_npz(models[1], ORACLES / "vit_token_flax.npz")
    with np.load(ORACLES / "vit_token_released.npz") as file:
        np.savez(tmp_path / "old.npz", **{f"opt/target/{k}": file[k] for k in file.files})
        keys = set(file.files)
    load_augreg_npz(models[2], tmp_path / "old.npz")
    assert same(models[0], models[1])
    assert same(models[0], models[2])
    with (
        np.load(save_augreg_npz(models[0], tmp_path / "back.npz")) as back,
        np.load(ORACLES / "vit_token_released.npz") as file,
    ):
        assert set(back.files) == keys
        assert all(np.array_equal(back[k], file[k]) for k in keys)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_precisions_are_read(tmp_path, dtype):
    model = small()
    path = save_augreg_npz(model, tmp_path / "w.npz")
    with np.load(path) as file:
        arrays = dict(file)
    kernel = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5] * 16).view(16, 5)
    if dtype == "bfloat16":
        bits = (kernel.numpy().view(np.uint32) >> 16).astype(np.uint16)
        arrays["head/kernel"] = bits.view(np.dtype("V2"))
    else:
        arrays["head/kernel"] = kernel.numpy().astype(dtype)
    np.savez(path, **arrays)
    load_augreg_npz(model, path)
    assert torch.equal(model.head.weight, kernel.T)


def test_positions_are_resized_as_the_official_code_does():
    with np.load(ORACLES / "posemb_resize.npz") as file:
        cases = {k[:-3]: (file[k], file[k[:-3] + "_out"]) for k in file.files if k.endswith("_in")}
    for case, (given, expected) in cases.items():
        sizes, token = case.removesuffix("_tok").removesuffix("_notok").split("to"), case.endswith("_tok")
        square = "x" not in case
        old, new = ((int(s), int(s)) if square else tuple(map(int, s.split("x"))) for s in sizes)
        value = torch.from_numpy(np.asarray(given, np.float64)).reshape(1, -1, given.shape[-1])
        expected = expected.reshape(1, -1, given.shape[-1])
        for variant in ("corners", "scipy"):
            found = resize_posemb(value, old, new, class_token=token, variant=variant).numpy()
            if case.startswith("16to30") and variant == "corners":
                wrong = ~np.isclose(found, expected, rtol=0, atol=1e-12)[0, :, 0].reshape(30, 30)
                assert wrong[:-1, :-1].sum() == 0
                assert wrong[-1].all()
                assert not expected.reshape(30, 30)[-1].any()
            else:
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=case)


def test_resizing_never_leaves_the_edge_for_any_pair_of_sizes():
    g = torch.Generator().manual_seed(0)
    for old in (1, 2, 5, 14, 16, 28, 32):
        column = torch.randn(old, 1, generator=g, dtype=torch.float64)
        for new in range(1, 65):
            found = resize_posemb(column, (old, 1), (new, 1), class_token=False)
            expected = ndimage.zoom(column.numpy(), (new / old, 1), order=1, mode="nearest")
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    half = torch.randn(1, 5, 3, generator=g).to(torch.bfloat16)
    assert resize_posemb(half, (2, 2), (3, 4)).dtype == torch.bfloat16


def test_a_grid_that_is_not_square_is_asked_for_and_never_guessed(tmp_path):
    path = save_augreg_npz(small((3, 48, 48)), tmp_path / "w.npz")  # 12 x 12
    wide_model = small((3, 36, 64))  # 9 x 16: as many tokens
    with pytest.raises(InvalidInput, match=r"9 x 16.*12 x 12.*say grid="):
        load_augreg_npz(wide_model, path)
    assert load_augreg_npz(wide_model, path, grid=(12, 12)).resized == ((12, 12), (9, 16))
    other = save_augreg_npz(small((3, 20, 24)), tmp_path / "v.npz")  # 5 x 6
    with pytest.raises(InvalidInput, match="neither a square nor"):
        load_augreg_npz(small(), other)
    report = load_augreg_npz(small(), other, grid=(5, 6))
    assert report.resized == ((5, 6), (2, 3))


def test_gray_images_get_the_response_to_three_equal_planes(tmp_path):
    rgb, gray = perturbed(small()).double(), small((1, 8, 12)).double()
    path = tmp_path / "w.npz"
    save_augreg_npz(rgb, path)
    with pytest.raises(InvalidInput, match="3 channels and the model's 1; load with channels='sum'"):
        load_augreg_npz(gray, path)
    load_augreg_npz(gray, path, channels="sum")
    x = torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gray(x), rgb(x.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-6)
    four = small((4, 8, 12))
    with pytest.warns(UserWarning, match="initialization only"):
        load_augreg_npz(four, path, channels="repeat")
    kernel = four.patches.linear.weight.view(16, 4, 4, 4)
    assert torch.equal(kernel[:, 3], kernel[:, 0])
    with pytest.raises(InvalidInput, match="makes one channel"):
        load_augreg_npz(four, path, channels="sum")


def test_heads_and_classes_must_fit(tmp_path):
    path = save_augreg_npz(small(heads=2), tmp_path / "w.npz")
    with pytest.raises(InvalidInput, match="2 heads and the model 4"):
        load_augreg_npz(small(heads=4), path)
    other = small(classes=9)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(InvalidInput, match="head='zero'"):
        load_augreg_npz(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())  # refused as a whole
    report = load_augreg_npz(other, path, head="zero")
    assert not other.head.weight.any()
    assert report.left_out == ("head/bias", "head/kernel")
    with pytest.raises(InvalidInput, match="width, MLP or depth differ"):
        load_augreg_npz(small(mlp_dim=99), path)
    with pytest.raises(InvalidInput, match="patch size or the width"):
        load_augreg_npz(small(patch_size=2), path)
    deep = small(depth=3)
    with pytest.raises(InvalidInput, match=r"lacks block3\.ln1\.weight"):
        load_augreg_npz(deep, path)
    with pytest.warns(UserWarning, match="the rest was loaded"):
        assert len(load_augreg_npz(deep, path, strict=False).kept) == 12


def test_what_has_no_place_is_named(tmp_path):
    path = save_augreg_npz(small(pre_logits=16), tmp_path / "w.npz")
    with pytest.raises(InvalidInput, match=r"pre_logits/bias.*head=.mlp."):
        load_augreg_npz(small(), path)
    with pytest.raises(InvalidInput, match="pool='token'"):
        load_augreg_npz(small(pool="mean", pre_logits=16), path)
    zero = small()
    torch.nn.init.zeros_(zero.head.weight)
    with pytest.warns(UserWarning, match="all zeros"):
        load_augreg_npz(small(), save_augreg_npz(zero, tmp_path / "z.npz"))


def spoil(kind, path):
    good = path.read_bytes()
    if kind == "flipped":
        spoiled = bytearray(good)
        spoiled[len(good) // 2] ^= 255
        path.write_bytes(bytes(spoiled))
    elif kind == "pickled":
        np.savez(path, a=np.array([{"x": 1}], dtype=object))
    elif kind == "integers":
        np.savez(path, **{"head/kernel": np.zeros((3, 2), int)})
    elif kind == "nan":
        with np.load(path) as file:
            arrays = dict(file)
        arrays["head/bias"][0] = np.nan
        np.savez(path, **arrays)
    elif kind == "twice":
        with np.load(path) as file:
            np.savez(path.with_name("t.npz"), **dict(file), **{"params/cls": file["cls"]})
        path.with_name("t.npz").replace(path)
    else:
        text = {"page": b"<!DOCTYPE html>", "lfs": b"version https://git-lfs.github.com/spec/v1\n", "empty": b""}
        path.write_bytes(good[: len(good) // 2] if kind == "half" else text[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("page", "web page"),
        ("lfs", "git lfs pull"),
        ("empty", "is empty"),
        ("half", "is damaged"),
        ("flipped", "is damaged|does not fit|NaN"),
        ("pickled", "pickled objects"),
        ("integers", "floating point"),
        ("nan", "NaN or infinite"),
        ("twice", "two arrays"),
    ],
)
def test_damaged_files_get_one_clear_sentence(tmp_path, kind, message):
    path = save_augreg_npz(small(), tmp_path / "w.npz")
    spoil(kind, path)
    with pytest.raises(InvalidInput, match=message):
        load_augreg_npz(small(), path)


def test_missing_files_other_models_and_other_shapes_are_refused(tmp_path):
    with pytest.raises(MissingFile, match="no file"):
        load_augreg_npz(small(), tmp_path / "none.npz")
    with pytest.raises(InvalidInput, match="not Linear"):
        load_augreg_npz(torch.nn.Linear(2, 2), tmp_path / "none.npz")
    with pytest.raises(InvalidInput, match="posemb has 6 tokens"):
        resize_posemb(torch.zeros(1, 6, 2), (2, 2), (3, 3))
    with pytest.raises(InvalidInput, match="posemb must be"):
        resize_posemb(torch.zeros(2, 5, 2), (2, 2), (3, 3))
    with pytest.raises(InvalidInput, match="old_grid must be"):
        resize_posemb(torch.zeros(1, 5, 2), 4, (3, 3))


def test_a_file_of_torch_is_named_and_a_missing_folder_too(tmp_path):
    torch.save(small().state_dict(), tmp_path / "weights.npz")
    with pytest.raises(InvalidInput, match="weights_only=True"):
        load_augreg_npz(small(), tmp_path / "weights.npz")
    with pytest.raises(MissingFile, match="no folder"):
        save_augreg_npz(small(), tmp_path / "none" / "w.npz")


def test_wrapped_models_are_loaded_and_saved_as_the_network_inside(tmp_path):
    model, other = perturbed(small()), small()
    path = save_augreg_npz(torch.nn.DataParallel(model), tmp_path / "w.npz")
    load_augreg_npz(torch.compile(other), path)
    assert same(model, other)
