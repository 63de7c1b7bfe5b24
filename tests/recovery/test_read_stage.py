"""Stages that a layout does not have are refused before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.recovery.layout import StageLayout
from jaxckpt.recovery.read import read_stage

if TYPE_CHECKING:
    from pathlib import Path

LAYOUT = StageLayout(stages=4)


@pytest.mark.parametrize("lost", [7, 4, -1, (1, 4), ()])
def test_a_stage_that_does_not_exist_is_refused(lost: int | tuple[int, ...], tmp_path: Path) -> None:
    state = {"stages": jnp.arange(4.0)}
    jc.save(tmp_path / "a", state)
    told = str((lost,) if isinstance(lost, int) else lost)
    with pytest.raises(InvalidArgumentError) as error:
        read_stage(tmp_path / "a", LAYOUT, lost, state)
    assert f"lost={told}: the layout has stages=4, so they are 0 to 3" in str(error.value)


def test_stages_given_twice_or_out_of_order_are_read(tmp_path: Path) -> None:
    state = {"stages": jnp.arange(4.0)}
    jc.save(tmp_path / "a", state)
    np.testing.assert_array_equal(read_stage(tmp_path / "a", LAYOUT, [3, 1, 3], state)["stages"], [0, 1, 0, 3])
