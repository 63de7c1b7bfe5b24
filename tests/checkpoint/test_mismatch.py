"""Strict by default: every leaf that differs is named, nothing is loaded, and the message tells what to do."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt as jc
from tests.checkpoint.bits import assert_same_tree, raw

SAVED = {
    "w": np.ones((4, 8), np.float32),
    "jax": jnp.ones((2, 2)),
    "step": 7,
    "rate": 0.5,
    "flag": True,
    "name": "text",
    "data": b"bytes",
    "key": jax.random.key(0),
    "none": None,
    "scalar": np.float32(2),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("saved") / "c"
    jc.save(found, SAVED)
    return found


# what `like` has instead -> what the message says of it
WRONG: dict[str, tuple[str, Any, str]] = {
    "shape": ("w", np.ones((4, 9), np.float32), r'"w": checkpoint has \(4, 8\) float32, `like` wants \(4, 9\) float32'),
    "rank": ("w", np.ones((4, 8, 1), np.float32), r'"w": .*\(4, 8\).*\(4, 8, 1\)'),
    "transposed": ("w", np.ones((8, 4), np.float32), r'"w": .*\(4, 8\).*\(8, 4\)'),
    "dtype": ("w", np.ones((4, 8), np.float16), r'"w": .*float32.*wants \(4, 8\) float16 \(cast=True converts\)'),
    "signedness": ("jax", jnp.ones((2, 2), jnp.int32), r'"jax": .*float32.*int32'),
    "bfloat16": ("jax", jax.ShapeDtypeStruct((2, 2), jnp.bfloat16), r'"jax": .*float32.*bfloat16'),
    "array_for_text": ("name", np.ones(3), r'"name": checkpoint has a Python str'),
    "array_for_bytes": ("data", np.ones(5, np.uint8), r'"data": checkpoint has a Python bytes'),
    "text_for_array": ("w", "text", r'"w": checkpoint has \(4, 8\) float32, `like` wants a Python str'),
    "int_for_array": ("w", 3, r'"w": .*wants a Python int'),
    "int_for_float": ("rate", 1, r'"rate": checkpoint has a Python float, `like` wants a Python int'),
    "float_for_int": ("step", 1.0, r'"step": checkpoint has a Python int, `like` wants a Python float'),
    "int_for_bool": ("flag", 1, r'"flag": checkpoint has a Python bool, `like` wants a Python int'),
    "bytes_for_text": ("name", b"", r'"name": .*wants a Python bytes'),
    "text_for_number": ("step", "7", r'"step": .*wants a Python str'),
    "key_for_array": ("jax", jax.random.key(0), r'"jax": checkpoint has \(2, 2\) float32.*wants a PRNG key array'),
    "array_for_key": ("key", jnp.ones((2,), jnp.uint32), r'"key": checkpoint has a PRNG key array'),
    "keys_for_key": ("key", jax.random.split(jax.random.key(0)), r'"key": .*\(\) of .*wants a PRNG key array \(2,\)'),
    "vector_for_int": ("step", np.zeros(1, np.int64), r'"step": .*wants \(1,\) int64'),
    "float_array_for_int": ("step", np.zeros((), np.float32), r'"step": .*wants \(\) float32'),
    "none_for_array": ("w", None, r'1 leaf of the checkpoint is not in `like`:\n    "w"'),
    "array_for_none": ("none", np.ones(2), r'1 leaf of `like` is not in the checkpoint:\n    "none"'),
    "container_for_array": ("w", {"a": np.ones(2)}, r'"w\.a"'),
    "array_for_scalar": ("scalar", np.ones(1, np.float32), r'"scalar": .*\(\) float32.*\(1,\)'),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_kind_of_mismatch_is_named_with_both_sides(path: Path, case: str) -> None:
    name, value, message = WRONG[case]
    with pytest.raises(jc.MismatchError, match=message) as caught:
        jc.restore(path, {**SAVED, name: value})
    text = str(caught.value)
    assert str(path) in text
    assert "Nothing was restored" in text
    assert "partial=True" in text


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (7, np.int32(0)),
        (7, jnp.int32(0)),
        (np.int32(7), 0),
        (jnp.float32(0.5), 0.0),
        (0.5, jnp.float32(0)),
        (True, np.bool_(0)),
    ],
    ids=str,
)
def test_a_number_that_became_an_array_or_back_is_no_mismatch(tmp_path: Path, saved: Any, like: Any) -> None:
    jc.save(tmp_path / "c", {"n": saved})
    found = jc.restore(tmp_path / "c", {"n": like})["n"]
    assert found == saved
    assert isinstance(found, jax.Array) if isinstance(like, jax.Array) else type(found) is type(like)


@pytest.mark.parametrize(
    ("saved", "like"), [(2**40, np.int32(0)), (-1, np.uint8(0)), (0.1, np.float16(0)), (300, np.int8(0))]
)
def test_a_number_that_an_array_cannot_hold_is_a_mismatch(tmp_path: Path, saved: Any, like: Any) -> None:
    jc.save(tmp_path / "c", {"n": saved})
    with pytest.raises(jc.MismatchError, match='"n"'):
        jc.restore(tmp_path / "c", {"n": like})


def test_all_differences_are_in_one_message(path: Path) -> None:
    like = {k: v for k, v in SAVED.items() if k not in ("step", "rate")}
    like |= {"w": np.ones(3), "steps": 1, "entirely_new": 2}
    with pytest.raises(jc.MismatchError) as caught:
        jc.restore(path, like)
    text = str(caught.value)
    for part in ('"steps" (the other side has "step")', '"entirely_new"', '"rate"', '"w": checkpoint has (4, 8)'):
        assert part in text, text
    assert "2 leaves of `like` are not in the checkpoint" in text
    assert "2 leaves of the checkpoint are not in `like`" in text
    assert "1 leaf differs" in text


def test_misspelt_names_get_the_nearest_one(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"params": {"dense": {"kernel": np.ones(2), "bias": np.ones(3)}}})
    with pytest.raises(jc.MismatchError) as caught:
        jc.restore(tmp_path / "c", {"params": {"dense": {"kernle": np.ones(2), "bias": np.ones(3)}}})
    assert '"params.dense.kernle" (the other side has "params.dense.kernel")' in str(caught.value)


def test_a_long_list_is_grouped_and_short(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"opt": {f"mu{i}": np.ones(1) for i in range(500)}, "w": np.ones(2)})
    with pytest.raises(jc.MismatchError) as caught:
        jc.restore(tmp_path / "c", {"w": np.ones(2)})
    text = str(caught.value)
    assert "500 leaves of the checkpoint are not in `like`" in text
    assert '500 leaves under "opt"' in text
    assert len(text.splitlines()) < 20
    with pytest.raises(jc.MismatchError) as caught:
        jc.restore(tmp_path / "c", {"opt": {f"mu{i}": np.ones(2) for i in range(500)}, "w": np.ones(2)})
    assert "500 leaves differ in shape" in str(caught.value)
    assert "and 490 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 20


# Twelve layers into sixteen


def layer(size: int = 3) -> dict[str, Any]:
    return {"attn": {"q": np.ones((size, size)), "k": np.ones((size, size))}, "mlp": np.ones(size)}


STYLES = {
    "list": lambda n: {"layers": [layer() for _ in range(n)], "head": np.ones(2)},
    "int_keys": lambda n: {"layers": {i: layer() for i in range(n)}, "head": np.ones(2)},
    "numbered_names": lambda n: {**{f"layer_{i}": layer() for i in range(n)}, "head": np.ones(2)},
    "deep": lambda n: {"model": {"decoder": {"blocks": [layer() for _ in range(n)]}}, "opt": (1, {"mu": np.ones(2)})},
    "flat_leaves": lambda n: {"w": [np.ones(2) for _ in range(n)]},
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("saved", "wanted"), [(12, 16), (16, 12)])
def test_another_number_of_layers_fails_and_tells_both_counts(
    tmp_path: Path, style: str, saved: int, wanted: int
) -> None:
    jc.save(tmp_path / "c", STYLES[style](saved))
    with pytest.raises(jc.MismatchError) as caught:
        jc.restore(tmp_path / "c", STYLES[style](wanted))
    text = str(caught.value)
    assert f"the checkpoint has {saved} numbered parts, `like` has {wanted}" in text
    missing = f"{4 * (1 if style == 'flat_leaves' else 3)} leaves of "
    assert missing in text
    assert "partial=True" in text


@pytest.mark.parametrize("extra", [{}, {"cast": True}])
@pytest.mark.parametrize("kind", ["numpy", "jax", "abstract"])
def test_stacked_layers_of_another_number_fail_on_every_array(
    tmp_path: Path, kind: str, extra: dict[str, bool]
) -> None:
    def stacked(n: int) -> dict[str, Any]:
        return {"layers": {"q": np.ones((n, 4, 4), np.float32), "b": np.ones((n, 4), np.float32)}, "head": np.ones(2)}

    jc.save(tmp_path / "c", stacked(12))
    like = stacked(16)
    if kind == "jax":
        like["layers"] = jax.tree.map(jnp.asarray, like["layers"])
    if kind == "abstract":
        like["layers"] = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, stacked(16)["layers"]))
    with pytest.raises(jc.MismatchError) as caught:
        jc.restore(tmp_path / "c", like, **extra)
    text = str(caught.value)
    assert '"layers.q": checkpoint has (12, 4, 4) float32, `like` wants (16, 4, 4) float32' in text
    assert '"layers.b": checkpoint has (12, 4) float32, `like` wants (16, 4) float32' in text
    assert "2 leaves differ" in text
    assert "pad=True" in text


# partial=True


def test_partial_keeps_what_the_checkpoint_lacks_and_ignores_what_like_lacks(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"a": np.ones(2), "b": np.ones(3), "extra": 1, "n": 3})
    like = {"a": np.zeros(2), "b": np.full(4, 7.0), "new": {"w": np.full(2, 8.0)}, "n": 0, "text": "kept"}
    found = jc.restore(tmp_path / "c", like, partial=True)
    expected = {"a": np.ones(2), "b": np.full(4, 7.0), "new": {"w": np.full(2, 8.0)}, "n": 3, "text": "kept"}
    assert_same_tree(found, expected)


def test_partial_cannot_keep_the_values_of_abstract_leaves(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"a": np.ones(2)})
    like = {"a": np.zeros(2), "new": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(
        jc.MismatchError, match="1 leaf is to keep the value of `like`, which is abstract there, as new"
    ):
        jc.restore(tmp_path / "c", like, partial=True)


def test_partial_restores_twelve_layers_into_sixteen(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"layers": [np.full(2, i) for i in range(12)]})
    found = jc.restore(tmp_path / "c", {"layers": [np.full(2, -1) for _ in range(16)]}, partial=True)
    assert [int(a[0]) for a in found["layers"]] == [*range(12), -1, -1, -1, -1]


def test_partial_with_cast_and_pad_converts_what_it_can(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"w": np.ones((2, 2), np.float32), "name": "x"})
    found = jc.restore(
        tmp_path / "c", {"w": np.zeros((3, 2), np.float16), "name": 5}, partial=True, cast=True, pad=True
    )
    assert found["w"].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert found["name"] == 5


# Keys


def test_int_and_str_keys_are_told_apart(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {1: np.zeros(1), "1": np.ones(1)})
    found = jc.restore(tmp_path / "c", {"1": np.full(1, 5.0), 1: np.full(1, 5.0)})
    assert (found[1][0], found["1"][0]) == (0, 1)
    with pytest.raises(jc.MismatchError):
        jc.restore(tmp_path / "c", {"1": np.zeros(1), 2: np.zeros(1)})


def test_a_list_is_found_under_the_same_indices_in_a_tuple_or_dict(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", [np.zeros(1), np.ones(1)])
    for like in ((np.zeros(1), np.zeros(1)), {0: np.zeros(1), 1: np.zeros(1)}, {"0": np.zeros(1), "1": np.zeros(1)}):
        found = jc.restore(tmp_path / "c", like)
        assert type(found) is type(like)
        assert raw(jax.tree.leaves(found)[1]) == raw(np.ones(1))


def test_swapped_names_of_equal_shape_are_not_confused(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"mu": np.zeros(3), "nu": np.ones(3)})
    found = jc.restore(tmp_path / "c", {"nu": np.full(3, 9.0), "mu": np.full(3, 9.0)})
    assert (found["mu"][0], found["nu"][0]) == (0, 1)


def test_a_checkpoint_without_leaves_does_not_match_a_model(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {})
    with pytest.raises(jc.MismatchError, match="1 leaf of `like` is not in the checkpoint"):
        jc.restore(tmp_path / "c", {"w": np.ones(2)})
    jc.save(tmp_path / "d", {"w": np.ones(2)})
    with pytest.raises(jc.MismatchError, match="1 leaf of the checkpoint is not in `like`"):
        jc.restore(tmp_path / "d", {})
