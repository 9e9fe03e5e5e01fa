"""Signatures of OpenSSH (PROTOCOL.sshsig) over the manifest, which holds the digest of every other member.

    ssh-keygen -Y verify -f ALLOWED_SIGNERS -I PRINCIPAL -n manifest@ckpt -s artifacts/ckpt.json.sig < artifacts/ckpt.json

says the same as ckpt, for it is what ckpt runs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.errors import DigestMismatch, FeatureMissing, KeyProblem
from ckpt.host import run

NAMESPACE: Final = "manifest@ckpt"
"""What keeps a signature made for another purpose from counting here (ssh-keygen(1), -n)."""
MAX_BYTES: Final = 64 << 10
_BEGIN: Final = b"-----BEGIN SSH SIGNATURE-----"
_LIMIT_S: Final = 60.0
"""A key on a token may wait for a touch."""
_MAX_PRINCIPALS: Final = 100


@dataclass(frozen=True, slots=True)
class Demand:
    """What the signature of a checkpoint that comes in must be."""

    allowed_signers: Path
    required: bool = True
    """Refuse what is not signed; a signature that is there must be right in any case."""
    local: bool = False
    """Also of what this host itself made."""


def _program() -> str:
    program = run.which("ssh-keygen")
    if program is None:
        raise FeatureMissing("ssh-keygen is not installed: it makes and verifies signatures", hint="install openssh-client")
    return program


def _environment() -> dict[str, str]:
    """No question is ever put to anybody: a key with a passphrase belongs into ssh-agent."""
    return {"SSH_ASKPASS": run.which("false") or "/bin/false", "SSH_ASKPASS_REQUIRE": "force"}


def sign(data: bytes, key: Path) -> bytes:
    """The armored signature over `data`.

    Args:
        key: a private key without a passphrase, or a public key whose private half is in ssh-agent.

    Raises:
        KeyProblem: the key cannot be read or used. FeatureMissing: no ssh-keygen.
    """
    argv: list[str | os.PathLike[str]] = [_program(), "-q", "-Y", "sign", "-n", NAMESPACE, "-f", key]
    hint = "a private key of ssh (mode 0600, no passphrase), or a public one whose private key ssh-agent has"
    if not key.is_file():
        raise KeyProblem(f"there is no key {key} to sign with", hint=hint)
    try:
        found = run.run(argv, input=data, timeout_s=_LIMIT_S, env=_environment()).stdout
    except run.CommandFailed as error:
        lines = [line.strip("@ ").strip() for line in error.result.error_text.splitlines()]
        said = next((line for line in lines if line and "WARNING" not in line), error.reason)
        raise KeyProblem(f"nothing can be signed with {key}: {said[:200]}", hint=hint) from None
    if not found.startswith(_BEGIN) or len(found) > MAX_BYTES:
        raise KeyProblem(f"nothing can be signed with {key}: ssh-keygen gave no signature", hint=hint)
    return found


def try_key(key: Path) -> None:
    """Raise as `sign` when it would fail: before anything is frozen."""
    sign(b"", key)


def verify(data: bytes, signature: bytes, allowed_signers: Path) -> str:
    """Whose signature over `data` it is.

    Args:
        allowed_signers: as ssh-keygen(1) describes it: principals and their public keys, with namespaces and times.

    Returns:
        The principal.

    Raises:
        DigestMismatch: altered, or not by one of them.
        KeyProblem: the file of allowed signers cannot be read. FeatureMissing: no ssh-keygen.
    """
    program = _program()
    try:
        with allowed_signers.open("rb"):
            pass
    except OSError as error:
        raise KeyProblem(f"the file of allowed signers {allowed_signers} cannot be read: {error.strerror}") from None
    if len(signature) > MAX_BYTES or not signature.startswith(_BEGIN):
        raise DigestMismatch("the signature of the checkpoint is damaged")
    directory = Path(tempfile.mkdtemp(prefix="ckpt-signature-"))  # 0700
    try:
        path = directory / "sig"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(signature)
        common: list[str | os.PathLike[str]] = ["-f", allowed_signers, "-s", path]
        found = _run([program, "-Y", "find-principals", *common], b"")
        # One line may name several, with commas.
        principals = [name for line in found.text.splitlines() for name in line.strip().split(",") if name and name[0] != "!"] if found.ok else []
        for principal in principals[:_MAX_PRINCIPALS]:
            if _run([program, "-q", "-Y", "verify", *common, "-n", NAMESPACE, "-I", principal], data).ok:
                return principal
        if not _run([program, "-q", "-Y", "check-novalidate", "-n", NAMESPACE, "-s", path], data).ok:
            raise DigestMismatch("the checkpoint is not what was signed: its signature is wrong, or its manifest was changed")
        raise DigestMismatch(f"the checkpoint is signed by nobody who is in {allowed_signers}")
    except run.CommandFailed as error:
        raise KeyProblem(f"the signature cannot be verified: {error.reason}") from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(argv: list[str | os.PathLike[str]], data: bytes) -> run.Result:
    return run.run(argv, input=data, timeout_s=_LIMIT_S, env=_environment(), check=False)


def check(data: bytes, signature: bytes | None, demand: Demand) -> str | None:
    """Hold a manifest and its signature (None: there is none) against what is demanded.

    Returns:
        The principal; None for an unsigned checkpoint where that is allowed.

    Raises:
        DigestMismatch: not signed, altered, or signed by somebody else. KeyProblem: as `verify`.
    """
    if signature is not None:
        return verify(data, signature, demand.allowed_signers)
    if demand.required:
        raise DigestMismatch("the checkpoint is not signed", hint=f"only what somebody in {demand.allowed_signers} signed is taken")
    return None
