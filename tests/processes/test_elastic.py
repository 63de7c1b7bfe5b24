"""A job saved on 4 processes goes on on 2 and then on 3: no sample is lost, none is seen twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jaxckpt.testing.processes import load_target, run_processes

PROGRAMS = Path(__file__).parent / "elastic_programs.py"


@pytest.mark.parametrize(("skew", "length", "epochs"), [(False, 97, 2), (True, 61, 1)], ids=["in-step", "skewed"])
def test_no_sample_is_lost_or_repeated_over_4_2_3_processes(
    tmp_path: Path, skew: bool, length: int, epochs: int
) -> None:
    seen: dict[str, Counter[int]] = {}
    hosts = [4, 2, 3]
    for place, n in enumerate(hosts):
        args = {
            "before": str(tmp_path / str(place - 1)) if place else None,
            "after": str(tmp_path / str(place)) if place < len(hosts) - 1 else None,
            "length": length,
            "epochs": epochs,
            "steps": 2,
            "skew": skew,
        }
        results: Any = run_processes(f"{PROGRAMS}:train", n, devices=1, args=args)
        for result in results:
            for name, numbers in result.items():
                seen.setdefault(name, Counter()).update(numbers)
    samples = Counter(list(range(length)) * epochs)
    documents = load_target(f"{PROGRAMS}:loaders").__globals__["DOCUMENTS"]
    tokens = Counter(token for document in documents for token in document)
    wrong = {
        name: {"lost": (expected - seen[name]).total(), "repeated": (seen[name] - expected).total()}
        for name, expected in [("plain", samples), ("dataset", samples), ("loader", samples), ("packed", tokens)]
    }
    print(wrong)
    assert all(found == {"lost": 0, "repeated": 0} for found in wrong.values()), wrong
