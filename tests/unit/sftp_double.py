"""An `ssh` with an SFTP server of its own, for CKPT_SSH: `sftp_double.py DIRECTORY ssh's words…`.

DIRECTORY/root is what it serves. DIRECTORY/cuts has a line a connection: how many bytes it takes in before it dies (nothing: it lives).
DIRECTORY/mode: `silent`, `chatter`, `nosub`, `full`, `readonly`, `v3` (no extensions), `short` (reads give less than was asked).
"""

import os
import signal
import struct
import sys
from pathlib import Path

directory = Path(sys.argv[1])
root = directory / "root"
mode = (directory / "mode").read_text() if (directory / "mode").exists() else ""
taken = 0
cut = None
if (directory / "cuts").exists():
    lines = (directory / "cuts").read_text().split()
    if lines:
        cut = int(lines[0]) if lines[0] != "-" else None
        (directory / "cuts").write_text("\n".join(lines[1:]))
handles: dict[bytes, int] = {}


def count(size: int) -> None:
    with (directory / "taken").open("a") as file:
        file.write(f"{size}\n")


def ended(*_: object) -> None:
    count(taken)
    os._exit(0)


signal.signal(signal.SIGTERM, ended)


def die() -> None:
    count(taken)
    sys.stderr.write("Connection to b closed by remote host.\n")
    sys.stderr.flush()
    os._exit(255)


def take(size: int) -> bytes:
    global taken
    data = b""
    while len(data) < size:
        want = size - len(data)
        if cut is not None:
            want = min(want, cut - taken)
            if want <= 0:
                die()
        piece = os.read(0, want)
        if not piece:
            ended()
        taken += len(piece)
        data += piece
    return data


def give(body: bytes) -> None:
    data = struct.pack(">I", len(body)) + body
    while data:
        data = data[os.write(1, data) :]


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def status(number: int, code: int, words: bytes = b"") -> None:
    give(struct.pack(">BII", 101, number, code) + text(words) + text(b""))


def attributes(number: int, there: os.stat_result) -> None:
    fields = struct.pack(">IQIIIII", 1 | 2 | 4 | 8, there.st_size, 0, 0, there.st_mode, int(there.st_atime), int(there.st_mtime))
    give(struct.pack(">BI", 105, number) + fields)


class Fields:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def string(self) -> bytes:
        (size,) = struct.unpack_from(">I", self.data)
        found, self.data = self.data[4 : 4 + size], self.data[4 + size :]
        return found

    def number(self, kind: str = ">I") -> int:
        (found,) = struct.unpack_from(kind, self.data)
        self.data = self.data[struct.calcsize(kind) :]
        return int(found)

    def path(self) -> str:
        return str(root / os.fsdecode(self.string()).lstrip("/"))


def serve(kind: int, number: int, fields: Fields) -> None:
    if kind == 3:
        path, flags = fields.path(), fields.number()
        how = os.O_RDONLY if flags == 1 else os.O_WRONLY
        how |= os.O_CREAT * bool(flags & 8) | os.O_EXCL * bool(flags & 32)
        if mode == "readonly" and flags != 1:
            raise PermissionError
        handle = str(len(handles)).encode()
        handles[handle] = os.open(path, how, 0o600)
        give(struct.pack(">BI", 102, number) + text(handle))
    elif kind == 4:
        os.close(handles.pop(fields.string()))
        status(number, 0)
    elif kind == 5:
        handle, offset, length = fields.string(), fields.number(">Q"), fields.number()
        data = os.pread(handles[handle], max(1, length // 3) if mode == "short" else length, offset)
        if data:
            give(struct.pack(">BI", 103, number) + text(data))
        else:
            status(number, 1)
    elif kind == 6:
        handle, offset, data = fields.string(), fields.number(">Q"), fields.string()
        if mode == "full":
            raise OSError("Failure")
        os.pwrite(handles[handle], data, offset)
        status(number, 0)
    elif kind in (7, 17):
        attributes(number, os.stat(fields.path()))
    elif kind == 8:
        attributes(number, os.fstat(handles[fields.string()]))
    elif kind == 13:
        os.unlink(fields.path())
        status(number, 0)
    elif kind == 18:
        old, new = fields.path(), fields.path()
        os.link(old, new)
        os.unlink(old)
        status(number, 0)
    elif kind == 200:
        name = fields.string()
        if name == b"posix-rename@openssh.com":
            os.rename(fields.path(), fields.path())
            status(number, 0)
        elif name == b"fsync@openssh.com":
            os.fsync(handles[fields.string()])
            status(number, 0)
        elif name == b"statvfs@openssh.com":
            free = 0 if mode == "full" else 1 << 30
            give(struct.pack(">BI", 201, number) + struct.pack(">11Q", 1, 1, free, free, free, 0, 0, 0, 0, 0, 255))
        else:
            status(number, 8)
    else:
        status(number, 8)


if mode == "nosub":
    sys.stderr.write("subsystem request failed on channel 0\n")
    sys.exit(1)
if mode == "silent":
    os.read(0, 1 << 20)
    while os.read(0, 1 << 20):
        pass
    sys.exit(0)
if mode == "chatter":
    os.write(1, b"Welcome to b! Have a lot of fun.\n")
while True:
    (length,) = struct.unpack(">I", take(4))
    body = take(length)
    if body[0] == 1:
        names = [] if mode == "v3" else [b"posix-rename@openssh.com", b"fsync@openssh.com", b"statvfs@openssh.com"]
        give(struct.pack(">BI", 2, 3) + b"".join(text(name) + text(b"1") for name in names))
        continue
    try:
        serve(body[0], struct.unpack_from(">I", body, 1)[0], Fields(body[5:]))
    except FileNotFoundError:
        status(struct.unpack_from(">I", body, 1)[0], 2, b"No such file")
    except PermissionError:
        status(struct.unpack_from(">I", body, 1)[0], 3, b"Permission denied")
    except OSError:
        status(struct.unpack_from(">I", body, 1)[0], 4, b"Failure")
