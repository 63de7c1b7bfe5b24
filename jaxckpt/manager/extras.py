"""What belongs to a step besides its tree: data iterators, generators of random numbers, notes.

Every process keeps its own: ``<step>/extras/process_<k>.json``, a crc32c over JSON in which bytes, arrays, tuples and
PRNG keys are marked objects. Orbax, which takes each folder of a step for an item, is told that this one is JSON and
finds ``extras/metadata``. The state is taken when the step is captured, and written before the process reports that
it has written: a step that is listed has all of them. On another number of processes an object gets the states of all
(``set_states``), as ByteCheckpoint (NSDI 2025, section 3.3) merges and splits those of data loaders.
"""

import base64
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import google_crc32c
import jax
import numpy as np

from jaxckpt.core.errors import CorruptionError, InvalidArgumentError, MismatchError, NotFoundError
from jaxckpt.core.text import counted, nearest
from jaxckpt.storage.store import AbstractStore

FOLDER = "extras"
_ABOUT = "extras/metadata"  # what Orbax shows of them: names and the number of processes
_MARK = "jaxckpt"  # the member that tells a marked object from a dict of the caller's
_METHODS = (("get_state", "set_state"), ("state_dict", "load_state_dict"), ("getstate", "setstate"))


def take(extras: Mapping[str, Any], rank: int, size: int) -> bytes:
    """The file of this process: the state of each extra now, so that the caller may go on with it.

    An extra is an object with ``get_state`` and ``set_state`` (or ``state_dict`` and ``load_state_dict``, ``getstate``
    and ``setstate``), a ``numpy.random.Generator``, or a value: JSON, bytes, small arrays, PRNG keys, and lists, tuples
    and dicts of them.

    Raises:
        InvalidArgumentError: a state holds something that cannot be stored; names the extra and the place.

    Example:
        >>> untake(take({"notes": {"lr": 0.1}}, 0, 1), "here")["extras"]
        {'notes': {'lr': 0.1}}
    """
    states = {}
    for name, extra in extras.items():
        if not isinstance(name, str):
            raise InvalidArgumentError(f"extras={{{name!r}: ...}}: the name of an extra is text.")
        read = _methods(extra)
        states[name] = _encode(extra if read is None else read[0](), name)
    payload = _text({"process": rank, "processes": size, "extras": states})
    return f'{{"crc32c":{google_crc32c.value(payload.encode())},"payload":{payload}}}'.encode()


def untake(data: bytes, where: str) -> dict[str, Any]:
    """``{"process": k, "processes": n, "extras": {name: state}}`` of a file; CorruptionError where it is damaged."""
    try:
        record = json.loads(data)
        payload, told = record["payload"], record["crc32c"]
        found = google_crc32c.value(_text(payload).encode())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptionError(
            f"{where} is no file of extras any more ({type(error).__name__}: {error}). Next step: resume from another "
            "step, or restore the tree alone."
        ) from error
    if found != told:
        raise CorruptionError(
            f"{where} is damaged: its crc32c is {found}, and {told} was stored. Next step: resume from another step, "
            "or restore the tree alone."
        )
    return payload | {"extras": {name: _decode(state) for name, state in payload["extras"].items()}}


def attached(step: AbstractStore, extras: Mapping[str, Any] | None, rank: int, size: int) -> Callable[[], None] | None:
    """What makes the extras, as they are now, durable in the folder of their step; None without extras.

    Several processes go on where the state of one cannot be stored: they all hear of it when that one is to write.
    """
    if not extras:
        return None
    try:
        data = take(extras, rank, size)
    except Exception as error:
        if size == 1:
            raise
        return partial(_refuse, error)
    about = {"processes": size, "extras": list(extras)} if rank == 0 else None
    return partial(_write, step, rank, data, about)


def _write(step: AbstractStore, rank: int, data: bytes, about: dict[str, Any] | None) -> None:
    files = {f"{FOLDER}/process_{rank}.json": data}
    if about is not None:
        files[_ABOUT] = _text(about).encode()
    step.write_all(files)
    step.sync()


def _refuse(error: Exception) -> None:
    raise error


def restore_extras(step: AbstractStore, extras: Mapping[str, Any] | None, rank: int, size: int) -> dict[str, Any]:
    """Give objects their states back, and return the states by name.

    Args:
        step: the folder of the step.
        extras: name -> the object to fill, or any other value (None) to only have the state returned. None: all states.
        rank: this process.
        size: how many there are now; another number than when the step was saved is what ``set_states`` is for.

    Raises:
        NotFoundError: the step has no extras, or none of that name; nothing was filled.
        MismatchError: saved by another number of processes, whose states differ, and the object has no ``set_states``.
        CorruptionError: a file is damaged.
    """
    files = _Files(step, rank, size)
    names = list(files.own) if extras is None else list(extras)
    missing = [name for name in names if name not in files.own]
    if missing:
        raise NotFoundError(_not_there(step.url, missing, list(files.own)))
    wanted = {name: None if extras is None else extras[name] for name in names}
    # All that can be found wrong before an object is touched.
    states = {name: files.state_for(name, extra) for name, extra in wanted.items()}
    for name, extra in wanted.items():
        _fill(name, extra, states[name], files)
    return states


def _not_there(url: str, missing: list[str], there: list[str]) -> str:
    told = []
    for name in missing:
        near = nearest(name, [one for one in there if one not in missing], cutoff=0.6)  # short names differ by much
        told.append(f"{name!r}" + (f" (the step has {near!r})" if near else ""))
    noun = "extra" if len(missing) == 1 else "extras"
    return (
        f"{url} has no {noun} {', '.join(told)}; it was saved with {', '.join(map(repr, there)) or 'none'}. "
        "Nothing was filled. Next step: pass extras= by these names."
    )


class _Files:
    """The files of a step, as far as they are needed: with as many processes as before only this one's."""

    def __init__(self, step: AbstractStore, rank: int, size: int) -> None:
        self._step, self.size = step, size
        try:
            first = self._read(0)
        except NotFoundError:
            raise NotFoundError(
                f"{step.url} was saved without extras ({FOLDER}/process_0.json is not there). Restore or "
                "resume this step without extras=, and pass extras= to save from then on."
            ) from None
        self.saved: int = first["processes"]
        self._read_already = {0: first}
        self.same = self.saved == size
        self.own: dict[str, Any] = self._of(rank if self.same else 0)

    def all_of(self, name: str) -> list[Any]:
        """The states of all processes that saved, by rank; of those that had such an extra."""
        found = [self._of(rank) for rank in range(self.saved)]
        return [one[name] for one in found if name in one]

    def state_for(self, name: str, extra: Any) -> Any:
        """The state of this process; on another number of processes the one that all had."""
        if self.same or hasattr(extra, "set_states"):
            return self.own[name]
        states = self.all_of(name)
        if len({_text(_encode(state, name)) for state in states}) > 1:
            what = f"a {type(extra).__name__} has no set_states" if _methods(extra) else "it is a value of each process"
            raise MismatchError(
                f"The extra {name!r} of {self._step.url} was saved by {counted(self.saved, 'process', 'processes')} "
                f"and is restored by {self.size}. Their states differ, and {what}. Next step: restore on "
                f"{counted(self.saved, 'process', 'processes')}, or pass "
                "an object with set_states(states of all), as the iterators of jaxckpt.integrations.data."
            )
        return states[0]

    def _of(self, rank: int) -> dict[str, Any]:
        if rank not in self._read_already:
            try:
                self._read_already[rank] = self._read(rank)
            except NotFoundError as error:
                raise CorruptionError(
                    f"{self._step.url}{FOLDER}/process_{rank}.json is not there, and "
                    f"{counted(self.saved, 'process', 'processes')} saved this step. Next step: resume from another "
                    "step, or restore the tree alone."
                ) from error
        return self._read_already[rank]["extras"]

    def _read(self, rank: int) -> dict[str, Any]:
        name = f"{FOLDER}/process_{rank}.json"
        return untake(self._step.read(name), f"{self._step.url}{name}")


def _fill(name: str, extra: Any, state: Any, files: _Files) -> None:
    methods = _methods(extra)
    if methods is None and not hasattr(extra, "set_states"):
        return
    if files.same and methods is not None:
        try:
            methods[1](state)
        except MismatchError:  # the same number of processes, and another batch size or order of hosts
            if not hasattr(extra, "set_states"):
                raise
        else:
            return
    if hasattr(extra, "set_states"):
        extra.set_states(files.all_of(name))
    elif methods is not None:
        methods[1](state)


def _methods(extra: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How to get and to set the state of an object; None for a plain value."""
    if isinstance(extra, type):
        return None
    if isinstance(extra, np.random.Generator):
        bits = extra.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    for read, fill in _METHODS:
        if callable(getattr(extra, read, None)) and callable(getattr(extra, fill, None)):
            return getattr(extra, read), getattr(extra, fill)
    return None


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _encode(value: Any, place: str) -> Any:
    """JSON in which whatever JSON lacks is a marked object."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and not isinstance(value, np.generic):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return {_MARK: "bytes", "data": _base64(bytes(value))}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and _MARK not in value:
            return {key: _encode(one, f"{place}.{key}") for key, one in value.items()}
        pairs = [[_encode(key, place), _encode(one, f"{place}.{key}")] for key, one in value.items()]
        return {_MARK: "dict", "items": pairs}
    if isinstance(value, list | tuple):
        items = [_encode(one, f"{place}[{i}]") for i, one in enumerate(value)]
        return items if isinstance(value, list) else {_MARK: "tuple", "items": items}
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(value))
        return {_MARK: "key", "impl": implementation, "data": _encode(_host(jax.random.key_data(value), place), place)}
    if isinstance(value, jax.Array):
        return _array("jax", _host(value, place))
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return _array("scalar" if isinstance(value, np.generic) else "numpy", np.asarray(value))
    raise InvalidArgumentError(
        f"The extra {place} is a {type(value).__name__}, which is neither JSON, bytes, an array nor an object with "
        "get_state and set_state. Next step: store what it is made of, or put it into the tree."
    )


def _host(value: jax.Array, place: str) -> np.ndarray:
    if not value.is_fully_addressable:
        raise InvalidArgumentError(
            f"The extra {place} is an array {value.shape} of several processes. Put it into the tree: extras are each "
            "process's own."
        )
    return np.asarray(value)


def _array(kind: str, value: np.ndarray) -> dict[str, Any]:
    data = _base64(np.ascontiguousarray(value).tobytes())
    return {_MARK: kind, "dtype": value.dtype.name, "shape": list(value.shape), "data": data}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(one) for one in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {key: _decode(one) for key, one in value.items()}
    if kind == "bytes":
        return base64.b64decode(value["data"])
    if kind == "tuple":
        return tuple(_decode(one) for one in value["items"])
    if kind == "dict":
        return {_decode(key): _decode(one) for key, one in value["items"]}
    if kind == "key":
        return jax.random.wrap_key_data(jax.numpy.asarray(_decode(value["data"])), impl=value["impl"])
    data = np.frombuffer(base64.b64decode(value["data"]), jax.numpy.dtype(value["dtype"])).reshape(value["shape"])
    if kind == "jax":
        return jax.numpy.asarray(data)
    return data[()] if kind == "scalar" else data.copy()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
