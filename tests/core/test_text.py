"""Words that depend on a number, and the nearest name."""

from jaxckpt.core.text import counted, nearest


def test_one_has_a_noun_and_a_verb_of_its_own() -> None:
    assert [counted(n, "leaf differs", "leaves differ") for n in (0, 1, 2)] == [
        "0 leaves differ",
        "1 leaf differs",
        "2 leaves differ",
    ]
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


def test_the_nearest_name_is_one_that_is_like_it() -> None:
    assert nearest("loader", ["lodaer", "rng"]) == "lodaer"
    assert nearest("loader", ["rng"]) is None
    assert nearest("loader", []) is None
