"""`artifacts/ckpt.json`, schema 1: a `Manifest` as bytes and back. What is read is hostile until every field was checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from typing import Any, Final, TypeVar

from ckpt.archive import strict_json
from ckpt.archive.layout import DIGEST_PREFIX, MANIFEST, UNDIGESTED, is_allowed
from ckpt.errors import ArchiveInvalid, DigestMismatch
from ckpt.model import Manifest

SCHEMA: Final = 1
CHECK: Final = "check"
"""The field with the manifest's own digest (see `digest_of`)."""
MAX_BYTES: Final = 16 << 20
MAX_NAME: Final = 255
MAX_TEXT: Final = 4096
MAX_ITEMS: Final = 200_000

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NO_CHECK: Final = DIGEST_PREFIX + "0" * 64
_OWN_CHECK: Final = re.compile(rb'("check": ?"sha256:)[0-9a-f]{64}')
_VOLUME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*\Z")
_DIGEST = re.compile(re.escape(DIGEST_PREFIX) + r"[0-9a-f]{64}\Z")
# Names become parts of paths and of commands; paths of a container may hold any byte but NUL.
_NAMES: Final = frozenset({"id", "name", "engine", "container_id", "networks", "foreign"})
_PATHS: Final = frozenset({"host_mounts", "external", "volumes", "mounts"})

T = TypeVar("T")


def dumps(manifest: Manifest) -> bytes:
    """The manifest as JSON with `"schema": 1`.

    Raises:
        ArchiveInvalid: it holds what `loads` would refuse.
    """
    # A process names itself (prctl), with any byte it likes.
    clean = tuple(dataclasses.replace(p, comm=_CONTROL.sub("?", p.comm)) for p in manifest.processes)
    plain = dataclasses.asdict(dataclasses.replace(manifest, processes=clean))
    data = json.dumps({"schema": SCHEMA, CHECK: _NO_CHECK, **plain}, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    data = data.replace(_NO_CHECK.encode(), digest_of(data).encode(), 1)
    loads(data)
    return data


def loads(data: bytes) -> Manifest:
    """Read a manifest; fields that this version does not know are ignored.

    Raises:
        ArchiveInvalid: not JSON, another schema, a field missing, of the wrong type or with a value that is not acceptable.
    """
    plain = json_object(data, MANIFEST)
    schema = plain.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise ArchiveInvalid(f"{MANIFEST} has schema {str(schema)[:20]!r}, this version reads schema {SCHEMA}", hint="use a newer ckpt")
    manifest = _convert(Manifest, plain, "")
    if not manifest.id or not manifest.name or not manifest.engine or manifest.generation < 0:
        raise ArchiveInvalid(f"{MANIFEST} has an empty id, name or engine, or a negative generation")
    for volume, _ in manifest.volumes:
        if not is_volume_name(volume):
            raise ArchiveInvalid(f"{MANIFEST} has {volume[:64]!r} as the name of a volume")
    for member, digest in manifest.digests.items():
        if not is_allowed(member) or member.endswith("/") or member in UNDIGESTED:
            raise ArchiveInvalid(f"{MANIFEST} has a digest for {member[:64]!r}, which is no member of a checkpoint")
        if not _DIGEST.match(digest):
            raise ArchiveInvalid(f"{MANIFEST} has a digest for {member!r} that is not sha256")
    _compare_check(data, plain)
    return manifest


def digest_of(data: bytes) -> str:
    """"sha256:HEX" of a manifest's bytes, with the one that is in its field `check` taken as zeros."""
    return DIGEST_PREFIX + hashlib.sha256(_OWN_CHECK.sub(b"\\g<1>" + b"0" * 64, data, count=1)).hexdigest()


def _compare_check(data: bytes, plain: dict[str, Any]) -> None:
    """The manifest has the digests of all other members, and its own: nothing else covers it in an archive that is not compressed."""
    check = plain.get(CHECK)
    if check is None:
        if any(isinstance(value, str) and value.startswith(DIGEST_PREFIX) for value in plain.values()):
            raise ArchiveInvalid(f"{MANIFEST} is damaged: it has a digest in an unknown field")
        return
    if not isinstance(check, str) or check != digest_of(data):
        raise DigestMismatch(f"{MANIFEST} was changed or damaged: its digest is not the one that it names")


def is_volume_name(name: str) -> bool:
    """Podman's rule for names of volumes, with a length that a file name can have."""
    return len(name) <= MAX_NAME - 4 and bool(_VOLUME.match(name))


def json_object(data: bytes, member: str) -> dict[str, Any]:
    """Parse a JSON object that came from outside.

    Raises:
        ArchiveInvalid: too large, not JSON or not an object; the message names `member`.
    """
    if len(data) > MAX_BYTES:
        raise ArchiveInvalid(f"{member} is larger than {MAX_BYTES >> 20} MiB")
    plain = strict_json.parse(data, member)
    if not isinstance(plain, dict):
        raise ArchiveInvalid(f"{member} is not a JSON object")
    return plain


def _convert(cls: type[T], plain: Any, where: str) -> T:
    if not isinstance(plain, dict):
        raise ArchiveInvalid(f"{MANIFEST}: {where or 'it'} is not an object")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        path = f"{where}.{item.name}" if where else item.name
        if item.name in plain:
            values[item.name] = _value(hints[item.name], plain[item.name], path)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ArchiveInvalid(f"{MANIFEST}: {path} is missing")
    return cls(**values)


def _value(kind: Any, plain: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if plain is None else _value(next(a for a in args if a is not type(None)), plain, path)
    if dataclasses.is_dataclass(kind):
        return _convert(typing.cast(type, kind), plain, path)
    if origin is tuple:
        many = len(args) == 2 and args[1] is Ellipsis
        if not isinstance(plain, list) or len(plain) > MAX_ITEMS or (not many and len(plain) != len(args)):
            raise ArchiveInvalid(f"{MANIFEST}: {path} is not a list of the right length")
        return tuple(_value(args[0] if many else args[n], item, path) for n, item in enumerate(plain))
    if origin is dict:
        if not isinstance(plain, dict) or len(plain) > MAX_ITEMS:
            raise ArchiveInvalid(f"{MANIFEST}: {path} is not an object of an acceptable size")
        return {_text(key, path): _value(args[1], item, path) for key, item in plain.items()}
    if kind is str:
        return _text(plain, path)
    if kind is bool and isinstance(plain, bool):
        return plain
    if kind is int and isinstance(plain, int) and not isinstance(plain, bool) and abs(plain) < 1 << 63:
        return plain
    if kind is float and isinstance(plain, (int, float)) and not isinstance(plain, bool) and abs(plain) < 1e18 and math.isfinite(plain):
        return float(plain)
    raise ArchiveInvalid(f"{MANIFEST}: {path} is not {getattr(kind, '__name__', kind)}")


def _text(plain: Any, path: str) -> str:
    if not isinstance(plain, str):
        raise ArchiveInvalid(f"{MANIFEST}: {path} is not text")
    head = path.partition(".")[0]
    if len(plain) > (MAX_NAME if path in _NAMES else MAX_TEXT):
        raise ArchiveInvalid(f"{MANIFEST}: {path} is too long")
    if "\0" in plain or (head not in _PATHS and _CONTROL.search(plain)):
        raise ArchiveInvalid(f"{MANIFEST}: {path} holds control characters")
    if path in _NAMES and ("/" in plain or plain in (".", "..")):
        raise ArchiveInvalid(f"{MANIFEST}: {path} is {plain[:64]!r}, which cannot be a name")
    return plain
