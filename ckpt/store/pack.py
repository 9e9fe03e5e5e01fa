"""A pack: the chunks that one checkpoint brought into the store, and where they are.

    header   4096 bytes: magic, flags, id of the tags, salt, zeros
    chunks   each begins at a multiple of 4096: zstd, or raw where that is not longer; sealed when the pack is keyed
    table    32 bytes a chunk (`TABLE`), then 16 bytes a page: its tag
    footer   96 bytes (`_FOOTER`), the last of the file: where the table is, and SHA-256 of table and header, and of the tags

All numbers little endian. Chunk n holds the pages n * 128 and following of the pack. A chunk's check (XXH3, 128 bits) is over its bytes as they
lie in the file, so a pack can be checked without its key. It finds damage, not malice: who can write a pack can write its table. Against him
there are the SHA-256 of whole members in the manifest, its signature, and the cipher. A dead chunk (see collect) is a hole.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckpt.errors import DigestMismatch, KeyProblem
from ckpt.store import durable
from ckpt.store.cipher import SALT_BYTES, PackCipher
from ckpt.store.pages import CHUNK_BYTES, CHUNK_PAGES, PAGE_BYTES, TAG_BYTES, Pages, Words

SUFFIX: Final = ".pack"
RAW: Final = 0
ZSTD: Final = 1
LEVEL: Final = -1
"""Of zstd: a third faster than level 1, for a tenth more bytes (measured on heaps); packs are written while a container is frozen."""
TABLE: Final = np.dtype([("offset", "<u8"), ("stored", "<u4"), ("pages", "<u2"), ("kind", "<u2"), ("check", "u1", (16,))])

_MAGIC: Final = b"ckptpak1"
_END: Final = b"ckptend1"
_HEADER: Final = struct.Struct(f"<8sI4x16s{SALT_BYTES}s")
_FOOTER: Final = struct.Struct("<8sQII4x4x32s32s")
_KEYED: Final = 1
_WRITE_BACK_BYTES: Final = 16 << 20
_MAX_CHUNKS: Final = 1 << 28

_local = threading.local()


def align(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


class PackWriter:
    """Writes a pack: chunks are compressed, sealed and written by a pool of threads, in any order."""

    def __init__(self, path: Path, tags_id: bytes, key: bytes | None, threads: int) -> None:
        self.path = path
        self._salt = os.urandom(SALT_BYTES)
        self._cipher = PackCipher(key, self._salt) if key else None
        self._header = _HEADER.pack(_MAGIC, _KEYED if key else 0, tags_id, self._salt).ljust(PAGE_BYTES, b"\0")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._pool = ThreadPoolExecutor(threads, "ckpt-pack")
        self._room = threading.Semaphore(2 * threads + 2)
        self._lock = threading.Lock()
        self._done = threading.Condition(self._lock)
        self._end = PAGE_BYTES
        self._told = 0
        self._pending = 0
        self._free: list[Pages] = []
        self._rows: dict[int, tuple[int, int, int, int, bytes]] = {}
        self._tags: list[bytes] = []
        self.error: BaseException | None = None
        os.pwrite(self._fd, self._header, 0)

    def buffer(self) -> Pages:
        """An array for the pages of one chunk; `put` takes it back."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return np.empty((CHUNK_PAGES, PAGE_BYTES), np.uint8)

    @property
    def count(self) -> int:
        """Chunks so far: the number of the next one."""
        return len(self._tags)

    def put(self, pages: Pages, count: int, tags: bytes) -> None:
        """The first `count` pages of a `buffer` become the next chunk. Waits while too many are under way."""
        if self.error:
            raise self.error
        number = len(self._tags)
        self._tags.append(tags)
        self._room.acquire()
        with self._lock:
            self._pending += 1
        self._pool.submit(self._write, number, pages, count)

    def wait(self) -> None:
        """Until every chunk is in the file. Raises what went wrong."""
        with self._done:
            while self._pending:
                self._done.wait()
        if self.error:
            raise self.error

    def reader(self, label: str, key: bytes | None) -> PackReader:
        """Read what was put so far (after `wait`)."""
        return PackReader(os.dup(self._fd), label, self._table(), PackCipher(key, self._salt) if key else None)

    def finish(self) -> None:
        """Write table and footer and bring all to the disk."""
        self.wait()
        table, tags = self._table().tobytes(), b"".join(self._tags)
        index = align(self._end)
        about = _FOOTER.pack(
            _END, index, len(self._tags), len(tags) // TAG_BYTES, hashlib.sha256(self._header + table).digest(), hashlib.sha256(tags).digest()
        )
        _pwrite(self._fd, table + tags + about, index)
        os.fsync(self._fd)

    def close(self) -> None:
        """Let go of threads and file; what is under way is waited for."""
        self._pool.shutdown(wait=True, cancel_futures=False)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _table(self) -> npt.NDArray[Any]:
        table = np.zeros(len(self._tags), TABLE)
        for number, (offset, stored, pages, kind, check) in sorted(self._rows.items()):
            table[number] = (offset, stored, pages, kind, np.frombuffer(check, np.uint8))
        return table

    def _write(self, number: int, pages: Pages, count: int) -> None:
        try:
            if self.error is None:
                plain = pages.data.cast("B")[: count * PAGE_BYTES]
                packed = _compressor().compress(plain)
                kind, data = (ZSTD, packed) if len(packed) < len(plain) * 31 // 32 else (RAW, plain)
                if self._cipher:
                    data = self._cipher.seal(number, count, kind, data)
                check = _check(data)
                with self._lock:
                    offset = self._end
                    self._end += align(len(data))
                    self._rows[number] = (offset, len(data), count, kind, check)
                _pwrite(self._fd, data, offset)
                self._write_back(offset + len(data))
        except BaseException as error:
            self.error = self.error or error
        finally:
            self._room.release()
            with self._done:
                self._free.append(pages)
                self._pending -= 1
                self._done.notify_all()


    def _write_back(self, end: int) -> None:
        """Let the disk begin with what is there, so that the fsync at the end is short."""
        with self._lock:
            begin = self._told
            if end - begin < _WRITE_BACK_BYTES:
                return
            self._told = end
        durable.begin_writing(self._fd, begin, end - begin)


class PackReader:
    """Reads the chunks of a pack, each verified. May be used by many threads."""

    def __init__(self, fd: int, label: str, table: npt.NDArray[Any], cipher: PackCipher | None) -> None:
        self._fd = fd
        self._label = label
        self.table = table
        self._cipher = cipher

    @classmethod
    def open(cls, path: Path, key: bytes | None) -> PackReader:
        """Open a finished pack.

        Raises:
            DigestMismatch: it is damaged.
            KeyProblem: it is keyed and there is no key.
            FileNotFoundError: it is gone.
        """
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            about = _Layout(fd, path.stem)
            if about.keyed and key is None:
                raise KeyProblem(f"pack {path.stem} of the store is encrypted and there is no key for it")
            return cls(fd, path.stem, about.table(), PackCipher(key, about.salt) if about.keyed and key else None)
        except BaseException:
            os.close(fd)
            raise

    def chunk(self, number: int) -> memoryview:
        """The pages of a chunk.

        Raises:
            DigestMismatch: it is not there, or it was changed.
        """
        if not 0 <= number < len(self.table):
            raise DigestMismatch(f"there is no chunk {number} in pack {self._label}")
        row = self.table[number]
        stored, pages, kind = int(row["stored"]), int(row["pages"]), int(row["kind"])
        data = _pread(self._fd, stored, int(row["offset"]))
        if _check(data) != row["check"].tobytes():
            raise DigestMismatch(f"chunk {number} of pack {self._label} is not what was written")
        if self._cipher:
            data = self._cipher.open(number, pages, kind, data)
        size = pages * PAGE_BYTES
        plain = unpack(data, size) if kind == ZSTD else data
        if len(plain) != size:
            raise DigestMismatch(f"chunk {number} of pack {self._label} has the wrong length")
        return memoryview(plain)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_tags(path: Path) -> tuple[bytes, npt.NDArray[Any], Words]:
    """Of a pack: the id of its tags, the table of its chunks, the tags of its pages in their order.

    Raises:
        DigestMismatch: it is damaged.
        FileNotFoundError: it is gone.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = _Layout(fd, path.stem)
        return about.tags_id, about.table(), about.tags()
    finally:
        os.close(fd)


def count_pages(path: Path) -> int:
    """How many pages a pack brought. Raises as `read_tags`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return int(_Layout(fd, path.stem).pages)
    finally:
        os.close(fd)


def read_table(path: Path) -> npt.NDArray[Any]:
    """The table of a pack's chunks. Raises as `read_tags`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _Layout(fd, path.stem).table()
    finally:
        os.close(fd)


class _Layout:
    """Header and footer of an open pack, and what they point to."""

    def __init__(self, fd: int, label: str) -> None:
        self._fd, self._label = fd, label
        size = os.fstat(fd).st_size
        if size < PAGE_BYTES + _FOOTER.size:
            raise DigestMismatch(f"pack {label} is cut off")
        self._header = _pread(fd, PAGE_BYTES, 0)
        magic, flags, self.tags_id, self.salt = _HEADER.unpack_from(self._header)
        end, self._index, self._chunks, self.pages, self._table_digest, self._tags_digest = _FOOTER.unpack(
            _pread(fd, _FOOTER.size, size - _FOOTER.size)
        )
        self.keyed = bool(flags & _KEYED)
        whole = self._index + self._chunks * TABLE.itemsize + self.pages * TAG_BYTES + _FOOTER.size
        if magic != _MAGIC or end != _END or self._chunks > _MAX_CHUNKS or whole != size:
            raise DigestMismatch(f"pack {label} is damaged: it has no valid beginning or end")

    def table(self) -> npt.NDArray[Any]:
        data = _pread(self._fd, self._chunks * TABLE.itemsize, self._index)
        if hashlib.sha256(self._header + data).digest() != self._table_digest:
            raise DigestMismatch(f"pack {self._label} is damaged: its table is not what was written")
        table = np.frombuffer(data, TABLE)
        if ((table["pages"] > CHUNK_PAGES) | (table["stored"] > CHUNK_BYTES + PAGE_BYTES)).any():
            raise DigestMismatch(f"pack {self._label} is damaged: its table has impossible chunks")
        return table

    def tags(self) -> Words:
        data = _pread(self._fd, self.pages * TAG_BYTES, self._index + self._chunks * TABLE.itemsize)
        if hashlib.sha256(data).digest() != self._tags_digest:
            raise DigestMismatch(f"pack {self._label} is damaged: its tags are not what was written")
        return np.frombuffer(data, "<u8").reshape(-1, 2)


def _check(data: bytes | memoryview) -> bytes:
    import xxhash

    return xxhash.xxh3_128_digest(data)


def _compressor() -> Any:
    import zstandard

    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
    return _local.compressor


def unpack(data: bytes | memoryview, size: int) -> bytes:
    """Decompress `size` bytes, no more.

    Raises:
        DigestMismatch: it is no zstd frame of that size.
    """
    import zstandard

    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(data) != size:
            raise DigestMismatch("a compressed part has the wrong length")
        return bytes(_local.decompressor.decompress(data, max_output_size=size))
    except zstandard.ZstdError as error:
        raise DigestMismatch(f"a compressed part is damaged: {error}") from None


def _pread(fd: int, count: int, offset: int) -> bytes:
    data = os.pread(fd, count, offset)
    while len(data) < count:
        more = os.pread(fd, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _pwrite(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
