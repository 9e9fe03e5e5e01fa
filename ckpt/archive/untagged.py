"""A container image's archive on its way into an engine, without the names that it brings along: no tag of this host moves.

`podman load` gives a container image the names that its archive says, also when they mean another one here. Names are in `index.json` of an OCI
archive (image-spec, annotations.md: org.opencontainers.image.ref.name), in `manifest.json` (RepoTags) and `repositories` of docker's.
"""

from __future__ import annotations

import json
import tarfile
from typing import BinaryIO, Final

from ckpt.archive.tarstream import pax_records
from ckpt.errors import ArchiveInvalid

_BLOCK: Final = 512
_MAX_NAMES_BYTES: Final = 16 << 20
_MAX_EXTENDED: Final = 64 << 10
_INDEX, _MANIFEST, _REPOSITORIES = "index.json", "manifest.json", "repositories"
_REF: Final = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
_PLAIN: Final = (tarfile.REGTYPE, tarfile.AREGTYPE)
_KNOWN: Final = (*_PLAIN, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)


class Untagged:
    """Write the archive's tar into it, in pieces of any size; `out` gets it without names.

    Raises:
        ArchiveInvalid: it is no tar that an engine writes.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._head = bytearray()
        self._left = 0
        """Of the current member, its padding included."""
        self._kept: bytearray | None = None
        self._name = ""
        self._size = 0
        self._pax: dict[str, str] = {}
        self._ended = False

    def write(self, data: bytes | memoryview, /) -> int:
        """All of the data; what it completes goes on."""
        view = memoryview(data).cast("B")
        total = len(view)
        while view:
            if self._ended:
                self._out.write(view)
                break
            if self._left:
                count = min(self._left, len(view))
                if self._kept is None:
                    self._out.write(view[:count])
                else:
                    self._kept += view[:count]
                self._left -= count
                view = view[count:]
                if not self._left and self._kept is not None:
                    self._finish()
                continue
            count = min(_BLOCK - len(self._head), len(view))
            self._head += view[:count]
            view = view[count:]
            if len(self._head) == _BLOCK:
                block, self._head = bytes(self._head), bytearray()
                self._begin(block)
        return total

    def flush(self) -> None:
        """What `out` was given is on its way."""
        self._out.flush()

    def close(self) -> None:
        """The archive is complete, if it ended where a tar can."""
        if self._left or self._head:
            raise ArchiveInvalid("the container image is truncated")
        self._out.flush()

    def _begin(self, block: bytes) -> None:
        if not any(block):
            self._ended = True  # padding only from here on
            self._out.write(block)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise ArchiveInvalid(f"the container image is no tar: {error}") from None
        size = info.size
        if info.type == tarfile.XHDTYPE:
            if not 0 <= size <= _MAX_EXTENDED:
                raise ArchiveInvalid("the container image has an extended header that is too large")
            self._name, self._kept = "", bytearray(block)
        elif info.type in _KNOWN:
            if "size" in self._pax:
                size = int(self._pax["size"]) if self._pax["size"].isdecimal() and len(self._pax["size"]) < 19 else -1
            if size < 0:
                raise ArchiveInvalid("the container image has a member without a valid size")
            size = 0 if info.type not in _PLAIN else size
            clean = "/".join(part for part in info.name.split("/") if part not in ("", "."))
            special = clean in (_INDEX, _MANIFEST, _REPOSITORIES)
            if special and (info.type not in _PLAIN or self._pax or size > _MAX_NAMES_BYTES):
                raise ArchiveInvalid(f"the container image has {clean} as something else than a small file")
            self._name, self._kept, self._pax = clean, bytearray(block) if special else None, {}
            if not special:
                self._out.write(block)
        else:
            raise ArchiveInvalid(f"the container image has {info.name[:64]!r} as a kind of member that no engine writes")
        self._size = size
        self._left = -(-size // _BLOCK) * _BLOCK
        if not self._left and self._kept is not None:
            self._finish()

    def _finish(self) -> None:
        assert self._kept is not None
        block, content = bytes(self._kept[:_BLOCK]), bytes(self._kept[_BLOCK : _BLOCK + self._size])
        whole, self._kept = bytes(self._kept), None
        if not self._name:
            self._pax = pax_records(content)
            if not self._pax.keys() <= {"size", "mtime", "atime", "ctime"}:
                raise ArchiveInvalid("the container image has an extended header that no engine writes")
            self._out.write(whole)
            return
        made = _without_names(self._name, content)
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        info.size = len(made)
        self._out.write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape") + made + bytes(-len(made) % _BLOCK))


def _without_names(name: str, content: bytes) -> bytes:
    try:
        plain = json.loads(content)
        if name == _INDEX:
            for item in plain["manifests"]:
                kept = {key: value for key, value in (item.pop("annotations", None) or {}).items() if key not in _REF}
                if kept:
                    item["annotations"] = kept
        elif name == _MANIFEST:
            if not isinstance(plain, list):
                raise ValueError
            for item in plain:
                item["RepoTags"] = None
        else:
            plain = {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArchiveInvalid(f"the container image's {name} is not what it should be") from None
    return json.dumps(plain).encode()
