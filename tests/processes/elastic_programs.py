"""What the processes of the elastic tests do; run by run_processes, results as JSON."""

import json
from typing import Any

import grain
import jax
import numpy as np

import jaxckpt as jc
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.coordination.session import Session, session_name
from jaxckpt.integrations.data import ElasticIterator, PackedIterator
from jaxckpt.integrations.grain import ElasticDataset, ElasticLoader

DOCUMENTS = [list(range(1000 * i, 1000 * i + i % 7)) for i in range(40)]


def loaders(length: int, epochs: int) -> dict[str, Any]:
    """One of each kind, for this process of the job."""
    shuffled = grain.samplers.IndexSampler(length, shuffle=True, seed=2, num_epochs=epochs)
    return {
        "plain": ElasticIterator(np.arange(length), batch_size=12, seed=3, epochs=epochs),
        "packed": PackedIterator(DOCUMENTS, row_length=5, seed=1),
        "dataset": ElasticDataset(
            grain.MapDataset.range(length).shuffle(seed=4).repeat(epochs), lambda d: d.to_iter_dataset().batch(3)
        ),
        "loader": ElasticLoader(
            data_source=np.arange(length), sampler=shuffled, operations=[grain.transforms.Batch(2)]
        ),
    }


def train(before: str | None, after: str | None, length: int, epochs: int, steps: int, skew: bool) -> dict[str, Any]:
    """Go on from the checkpoint ``before``, take ``steps`` batches (all, without ``after``), save to ``after``.

    With ``skew`` every process takes another number of batches.
    """
    found = loaders(length, epochs)
    if before is not None:
        states = json.loads(jc.restore(before)["states"])
        for name, iterator in found.items():
            iterator.set_states([state[name] for state in states])
    wanted = steps + (jax.process_index() if skew else 0)
    seen: dict[str, list[int]] = {name: [] for name in found}
    for name, iterator in found.items():
        for taken, batch in enumerate(iterator, start=1):
            seen[name] += [int(n) for n in np.atleast_1d(batch)]
            if after is not None and taken == wanted:
                break
    states = _gather({name: iterator.get_state() for name, iterator in found.items()})
    if after is not None:
        jc.save(after, {"states": json.dumps(states)})
    else:
        seen["packed"] += found["packed"].get_state()["tokens"]  # too few for a row
    return seen


def _gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    session = Session(current_coordinator(), session_name("states"))
    session.arrive("state", json.dumps(state).encode())
    states = [json.loads(told) for told in session.collect("state", timeout_s=60)]
    session.close()
    return states
