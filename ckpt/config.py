"""Settings: flag > `CKPT_*` > `$XDG_CONFIG_HOME/ckpt/ckpt.toml` > `/etc/ckpt/ckpt.toml.d/*.toml` > `/etc/ckpt/ckpt.toml`.

Flags are the business of `cli/`; this module reads the rest, says exactly which file or variable is wrong, and knows the defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from ckpt.errors import ConfigError

SYSTEM_FILE: Final = Path("/etc/ckpt/ckpt.toml")
LogLevel = Literal["debug", "info", "warning", "error"]
Compress = Literal["zstd", "gzip", "none"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the files and the environment decide."""

    store: Path = Path("/var/lib/ckpt")
    """The store's directory."""
    stores: tuple[tuple[str, Path], ...] = ()
    """Further stores, (name, directory): `--store NAME`."""
    log_dir: Path = Path("/var/log/ckpt")
    """Where CRIU's logs and tracebacks are kept."""
    log_level: LogLevel = "warning"
    compress: Compress = "zstd"
    """How `export` packs an archive."""
    timeout_s: float = 200.0
    """Longest time that one dump or restore may take."""
    link_timeout_s: float = 15.0
    """How long nothing may be heard of the other host before the link counts as dead, on the host that waits."""
    hook_timeout_s: float = 30.0
    """How long one hook may take."""
    ssh_options: tuple[str, ...] = ()
    """Added to every ssh call as `-o OPTION`."""
    allow: tuple[str, ...] = ()
    """What checkpoints from elsewhere may have beyond this host's defaults, as `--allow` takes it."""
    encrypt: tuple[str, ...] = ()
    """Whom archives are encrypted to, unless `--encrypt` says otherwise."""
    identity: tuple[Path, ...] = ()
    """Files with the keys that open encrypted archives."""
    sign_key: Path | None = None
    """What checkpoints and archives are signed with."""
    allowed_signers: Path | None = None
    """Whose signatures count, for what comes in (ssh-keygen(1), ALLOWED SIGNERS)."""
    require_signature: bool = False
    """Refuse what comes in without a signature."""
    http: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What belongs to web servers and registries, by the beginning of the URL: token_file, token_command, header_file, ca_file,
    fingerprint, client_cert, client_key."""

    def http_of(self, url: str) -> Mapping[str, Any]:
        """The entry of `http` for a URL: of those with its scheme, host and port, the one with the longest path above it."""
        fitting = [prefix for prefix in self.http if _is_below(url, prefix)]
        return self.http[max(fitting, key=len)] if fitting else {}


def _is_below(url: str, prefix: str) -> bool:
    from urllib.parse import urlsplit

    ports = {"https": 443, "http": 80}
    given, above = urlsplit(url), urlsplit(prefix)
    origins = [(parts.scheme, parts.hostname, parts.port or ports.get(parts.scheme)) for parts in (given, above)]
    path = above.path.rstrip("/")
    return origins[0] == origins[1] and (given.path == path or given.path.startswith(path + "/") or not path)


def store_named(settings: Settings, text: str) -> Path:
    """The directory of a store as people name it: the name of a configured one, or a directory (with a "/" it always is one)."""
    if "/" not in text:
        for name, path in settings.stores:
            if name == text:
                return path
    return Path(os.path.abspath(text))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text")
    return value


def _path(value: Any) -> Path:
    path = Path(_text(value)).expanduser()
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _paths(value: Any) -> tuple[Path, ...]:
    items = value.split(os.pathsep) if isinstance(value, str) else value
    if not isinstance(items, list):
        raise ValueError("must be a list of absolute paths")
    return tuple(_path(item) for item in items)


def _yes_or_no(value: Any) -> bool:
    word = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(str(value).lower())
    if word is None or not isinstance(value, (bool, str)):
        raise ValueError("must be true or false")
    return word


def _recipients(value: Any) -> tuple[str, ...]:
    found = _texts(value)
    if not all(item.startswith("age:") for item in found):
        raise ValueError("must be a list of age:RECIPIENT")
    return found


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError("must be one of " + ", ".join(allowed))
        return str(value)

    return check


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError("must be a number of seconds") from None
    if isinstance(value, bool) or not 0 < seconds < 1e6:
        raise ValueError("must be a positive number of seconds")
    return seconds


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):  # the environment: separated by spaces
        return tuple(value.split())
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of texts")
    return tuple(value)


def _stores(value: Any) -> tuple[tuple[str, Path], ...]:
    if not isinstance(value, dict):
        raise ValueError("must be a table: NAME = DIRECTORY")
    for name in value:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,31}", name):
            raise ValueError("has a name that is not letters, digits, _ and -")
    return tuple((name, _path(path)) for name, path in value.items())


def _command(value: Any) -> tuple[str, ...]:
    words = _texts(value)
    if not words:
        raise ValueError("must be a command")
    return words


def _fingerprint(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 71 or not value.startswith("sha256:") or not set(value[7:]) <= set("0123456789abcdef"):
        raise ValueError("must be sha256: and 64 hexadecimal digits")
    return value


_HTTP_KEYS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "token_file": _path,
    "token_command": _command,
    "header_file": _path,
    "ca_file": _path,
    "fingerprint": _fingerprint,
    "client_cert": _path,
    "client_key": _path,
}


def _http(value: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise ValueError('must be tables, [http."https://b:7443"]')
    found: dict[str, dict[str, Any]] = {}
    for prefix, entry in value.items():
        from urllib.parse import urlsplit

        try:
            parts = urlsplit(prefix)
            usable = bool(parts.hostname) and bool(parts.scheme) and parts.username is None and not parts.query and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("must have URLs as its keys, https://HOST[:PORT][/PATH]")
        found[prefix] = {}
        for key, setting in entry.items():
            if key not in _HTTP_KEYS:
                raise ValueError(f"has an unknown key {key} (known are {', '.join(_HTTP_KEYS)})")
            try:
                found[prefix][key] = _HTTP_KEYS[key](setting)
            except ValueError as error:
                raise ValueError(f"has a {key} that {error}") from None
        if "token_file" in entry and "token_command" in entry:
            raise ValueError("has both a token_file and a token_command")
    return found


_KEYS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "store": _path,
    "stores": _stores,
    "log_dir": _path,
    "log_level": _one_of("debug", "info", "warning", "error"),
    "compress": _one_of("zstd", "gzip", "none"),
    "timeout_s": _seconds,
    "link_timeout_s": _seconds,
    "hook_timeout_s": _seconds,
    "ssh_options": _texts,
    "allow": _texts,
    "encrypt": _recipients,
    "identity": _paths,
    "sign_key": _path,
    "allowed_signers": _path,
    "require_signature": _yes_or_no,
    "http": _http,
}


def load(environ: Mapping[str, str] | None = None, *, system_file: Path = SYSTEM_FILE) -> Settings:
    """Read all sources, weakest first.

    Raises:
        ConfigError: a file cannot be read or parsed, a key is unknown, a value is wrong; names the file or variable.
    """
    env = os.environ if environ is None else environ
    settings = Settings()
    drop_ins = sorted((system_file.parent / (system_file.name + ".d")).glob("*.toml"))
    for path in (system_file, *drop_ins, user_file(env)):
        if path is not None:
            settings = _merge(settings, _read(path), str(path))
    overrides = {key: env[variable(key)] for key in _KEYS if key not in ("stores", "http") and env.get(variable(key))}
    for key, value in overrides.items():
        settings = _merge(settings, {key: value}, "the environment", shown=variable(key))
    return settings


def variable(key: str) -> str:
    """The environment variable of a key: `store` -> `CKPT_STORE`, `timeout_s` -> `CKPT_TIMEOUT_S`."""
    return "CKPT_" + key.upper()


def user_file(environ: Mapping[str, str]) -> Path | None:
    """`$XDG_CONFIG_HOME/ckpt/ckpt.toml` (default `~/.config`), None without a home."""
    base = environ.get("XDG_CONFIG_HOME")
    if not base:
        home = environ.get("HOME")
        if not home:
            return None
        base = os.path.join(home, ".config")
    return Path(base) / "ckpt" / "ckpt.toml"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            import tomllib

            return tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="mend it or remove it") from error


def _merge(settings: Settings, values: Mapping[str, Any], source: str, *, shown: str | None = None) -> Settings:
    for key, value in values.items():
        name = shown or key
        check = _KEYS.get(key)
        if check is None:
            raise ConfigError(f"{source}: unknown key {name}", hint="known keys: " + ", ".join(_KEYS))
        try:
            settings = replace(settings, **{key: check(value)})
        except ValueError as error:
            given = "" if isinstance(value, dict) else f", not {value!r}"
            raise ConfigError(f"{source}: {name} {error}{given}") from None
    return settings
