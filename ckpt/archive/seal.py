"""Encrypted archives: an age file around the archive, written and read as a stream; no plaintext is kept on the way.

Whom it is for (`age:RECIPIENT`), and what opens it, comes from files and commands, never from the command line itself where it is secret.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, cast

from ckpt.archive import age, armor
from ckpt.archive.age import Identity, Recipient, Sink, Source, Stanza
from ckpt.archive.behind import Behind
from ckpt.errors import ArchiveInvalid, DigestMismatch, KeyProblem, UsageError
from ckpt.host import run

HEAD_BYTES: Final = len(armor.BEGIN)
"""`is_sealed` needs so many bytes from the beginning of a file."""
PREFIX: Final = "age:"
NONE: Final = "none"
_MAX_KEY_FILE: Final = 1 << 20
_MAX_PASSPHRASE: Final = 4096
_COMMAND_LIMIT_S: Final = 120.0
_COMMAND_ENVIRONMENT: Final = ("DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "GNUPGHOME", "GPG_TTY", "PASSWORD_STORE_DIR", "WAYLAND_DISPLAY", "XAUTHORITY")
"""What programs that keep passphrases (pass, gpg, secret-tool) look at."""


def is_sealed(head: bytes) -> bool:
    """Whether a file that begins with `head` (HEAD_BYTES, or all of it) is an age file, armored or not."""
    return head.startswith((age.VERSION.rstrip(b"\n"), armor.BEGIN))


# -- keys ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passphrase:
    """A passphrase from a file or a command: encrypts (alone, as age has it) and opens."""

    secret: bytes

    def __repr__(self) -> str:
        return "Passphrase(...)"

    def wrap(self, file_key: bytes) -> Stanza:
        from ckpt.archive import agekeys

        return agekeys.wrap_scrypt(self.secret, file_key)

    def unwrap(self, stanzas: tuple[Stanza, ...]) -> bytes | None:
        from ckpt.archive import agekeys

        return agekeys.unwrap_scrypt(self.secret, stanzas)


def passphrase(file: Path | None = None, command: str | None = None) -> Passphrase | None:
    """The first line of a file that only its owner can read, or of what a command (run by the shell) prints. None for neither.

    Raises:
        UsageError: both.
        KeyProblem: there is none; others can read the file; the command failed.
    """
    if file is not None and command is not None:
        raise UsageError("--passphrase-file or --passphrase-command, not both")
    if file is not None:
        line, place = _key_file(file, "passphrase").split(b"\n", 1)[0], str(file)
    elif command is not None:
        env = {key: os.environ[key] for key in _COMMAND_ENVIRONMENT if key in os.environ}
        place = "the passphrase command"
        try:
            line = run.run(["/bin/sh", "-c", command], timeout_s=_COMMAND_LIMIT_S, env=env).stdout.split(b"\n", 1)[0]
        except run.CommandFailed as error:
            code = error.result.returncode
            # Not its words: they may hold what it is to keep secret.
            raise KeyProblem(f"the passphrase command failed ({f'exit status {code}' if code > 0 else 'no answer in time'})") from None
    else:
        return None
    line = line.rstrip(b"\r")
    if not line or len(line) > _MAX_PASSPHRASE:
        raise KeyProblem(f"{place} gave no passphrase" if not line else f"{place} gave a passphrase of more than {_MAX_PASSPHRASE} bytes")
    return Passphrase(line)


def recipients(specs: Sequence[str], secret: Passphrase | None = None) -> tuple[Recipient, ...]:
    """Whom an archive is encrypted to.

    Args:
        specs: `age:age1...`, `age:ssh-ed25519 ...`, `age:ssh-rsa ...`, or `age:FILE` with such lines. One "none" alone is nobody.
        secret: a passphrase instead of them.

    Returns:
        () for an archive that is not encrypted.

    Raises:
        UsageError: a recipient that is none, or together with a passphrase.
        KeyProblem: a file of recipients cannot be read, or holds none.
    """
    if NONE in specs:
        if len(specs) > 1 or secret is not None:
            raise UsageError('"none" means not encrypted, it stands alone')
        return ()
    if secret is not None:
        if specs:
            raise UsageError("a passphrase and recipients do not go together", hint="age allows a passphrase only alone")
        return (secret,)
    from ckpt.archive import agekeys

    found: list[Recipient] = []
    for spec in specs:
        text = spec.removeprefix(PREFIX).strip()
        if not spec.startswith(PREFIX) or not text:
            raise UsageError(f"{_shown(spec)} is no recipient", hint="age:age1..., age:ssh-ed25519 ..., or age:FILE with such lines")
        try:
            if agekeys.is_recipient(text):
                found.append(agekeys.recipient(text))
                continue
            path = Path(text).expanduser()
            lines = [line.strip() for line in _read(path, "file of recipients").decode("utf-8", "replace").splitlines()]
            wanted = [line for line in lines if line and not line.startswith("#")]
            found += [agekeys.recipient(line) for line in wanted]
        except ValueError as error:
            raise UsageError(f"{_shown(spec)}: {error}", hint="age:age1..., age:ssh-ed25519 ..., or age:FILE with such lines") from None
        if not wanted:
            raise KeyProblem(f"{path} holds no recipient")
    return tuple(found)


def identities(files: Iterable[Path], secret: Passphrase | None = None) -> tuple[Identity, ...]:
    """What opens encrypted archives: identities of age, private keys of ssh, a passphrase (which opens protected key files, too).

    Raises:
        KeyProblem: a file is not there, holds no key, can be read by others, or needs a passphrase that is not there.
    """
    from ckpt.archive import agekeys

    found: list[Identity] = [] if secret is None else [secret]
    for path in files:
        data = _key_file(path, "identity")
        if is_sealed(data):
            data = _opened_key_file(path, data, secret)
        try:
            found += agekeys.identities(data)
        except ValueError as error:
            raise KeyProblem(f"{path}: {error}") from None
    return tuple(found)


def _opened_key_file(path: Path, data: bytes, secret: Passphrase | None) -> bytes:
    if secret is None:
        raise KeyProblem(f"{path} is protected by a passphrase", hint="give it: --passphrase-file or --passphrase-command")
    try:
        return decrypting(io.BytesIO(data), (secret,)).read(_MAX_KEY_FILE)
    except (ArchiveInvalid, DigestMismatch, KeyProblem) as error:
        raise KeyProblem(f"{path} cannot be opened with this passphrase: {error.message}") from None


def _shown(spec: str) -> str:
    """A recipient that is wrong, for a message; what looks like a secret key is not repeated."""
    return "what was given" if "SECRET" in spec.upper() or "PRIVATE" in spec.upper() else repr(spec[:80])


def _read(path: Path, what: str, *, private: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if private and stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o077:
                raise KeyProblem(f"{path} can be read by others (mode {facts.st_mode & 0o777:04o})", hint=f"chmod 600 {path}, and think of a new one")
            data = file.read(_MAX_KEY_FILE + 1)
    except OSError as error:
        raise KeyProblem(f"the {what} {path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_KEY_FILE:
        raise KeyProblem(f"the {what} {path} is larger than {_MAX_KEY_FILE >> 20} MiB")
    return data


def _key_file(path: Path, what: str) -> bytes:
    return _read(path, f"{what} file", private=True)


# -- streams ---------------------------------------------------------------------------------------------------------


@contextmanager
def encrypting(out: Sink, to: Sequence[Recipient]) -> Iterator[BinaryIO]:
    """A stream to write plaintext to; what arrives in `out` is an age file. It is only complete when the block ends without an error.

    Without recipients it is `out` itself.
    """
    if not to:
        yield cast(BinaryIO, out)
        return
    sealed = age.Encrypting(out, to)
    behind = Behind(sealed.write)  # encrypted and sent while the next of it is compressed
    try:
        yield cast(BinaryIO, behind)
    except BaseException:
        behind.abort()
        raise
    behind.finish()
    sealed.finish()


def decrypting(source: Source, keys: Sequence[Identity]) -> BinaryIO:
    """What an age file (armored or not) holds, decrypted while it is read. Each byte was authenticated before it is given out.

    Raises:
        KeyProblem: no key, or none of them opens it. ArchiveInvalid: no age file.
        DigestMismatch: altered or truncated; also from every `read`.
    """

    head = Prefixed(source)
    armored = head.peek(len(armor.BEGIN)).startswith(armor.BEGIN)
    return cast(BinaryIO, age.open_file(armor.Dearmored(head) if armored else head, partial(_unwrap, keys)))


def random_access(fd: int, keys: Sequence[Identity]) -> age.RandomAccess:
    """What an encrypted archive file holds, to be read at any place; `fd` stays the caller's.

    Raises:
        ArchiveInvalid: armored, so that it can only be read from its beginning. Else as `decrypting`.
    """
    if os.pread(fd, HEAD_BYTES, 0).startswith(armor.BEGIN):
        raise ArchiveInvalid("an armored archive can only be read as a whole", hint="age -d | ckpt import -, or ckpt import")
    return age.RandomAccess(fd, partial(_unwrap, keys))


def _unwrap(keys: Sequence[Identity], stanzas: tuple[Stanza, ...]) -> bytes:
    """The file key. Raises KeyProblem."""
    if not keys:
        needs = "a passphrase" if stanzas[0].kind == "scrypt" else "a key"
        hint = "--passphrase-file or --passphrase-command" if stanzas[0].kind == "scrypt" else "--identity FILE, or identity in the configuration"
        raise KeyProblem(f"the archive is encrypted and needs {needs}", hint=hint)
    for key in keys:
        file_key = key.unwrap(stanzas)
        if file_key is not None:
            return file_key
    raise KeyProblem("the archive is encrypted to other keys than those given", hint=f"it is for: {_kinds(stanzas)}")


def _kinds(stanzas: tuple[Stanza, ...]) -> str:
    known = {"X25519": "an age key", "ssh-ed25519": "an ssh-ed25519 key", "ssh-rsa": "an ssh-rsa key", "scrypt": "a passphrase"}
    return ", ".join(sorted({known[stanza.kind] for stanza in stanzas if stanza.kind in known})) or "a kind of key that this version does not know"


class Prefixed:
    """A stream whose first bytes can be looked at before it is read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end; they stay to be read."""
        while len(self._head) < size and (data := self._source.read(size - len(self._head))):
            self._head += data
        return self._head[:size]

    def read(self, size: int = -1, /) -> bytes:
        if self._head:
            data, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
            return data
        return self._source.read(size) or b""


def reading(source: Source, keys: Sequence[Identity]) -> BinaryIO:
    """An archive as it is, or decrypted when it is encrypted (told by its first bytes). Raises as `decrypting`."""
    head = Prefixed(source)
    return decrypting(head, keys) if is_sealed(head.peek(HEAD_BYTES)) else cast(BinaryIO, head)


def finish(stream: BinaryIO) -> None:
    """Read an archive's stream to its end, of which the archive's own end may come short: only then it is known that nothing was cut off.

    Raises:
        DigestMismatch: altered or truncated. ArchiveInvalid: there is more.
    """
    if isinstance(stream, age.Decrypting):
        while data := stream.read(age.CHUNK_BYTES):
            if data.count(0) != len(data):
                raise ArchiveInvalid("the archive goes on after its end")
