"""Settings: flag > `CKPT_*` > `$XDG_CONFIG_HOME/ckpt/ckpt.toml` > `/etc/ckpt/ckpt.toml.d/*.toml` > `/etc/ckpt/ckpt.toml`.

Flags are the business of `cli/`; this module reads the rest, says exactly which file or variable is wrong, and knows the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    log_dir: Path = Path("/var/log/ckpt")
    """Where CRIU's logs and tracebacks are kept."""
    log_level: LogLevel = "warning"
    compress: Compress = "zstd"
    """How `export` packs an archive."""
    timeout_s: float = 200.0
    """Longest time that one dump or restore may take."""
    link_timeout_s: float = 15.0
    """How long nothing may be heard of the other host before the link counts as dead, on the host that waits."""
    ssh_options: tuple[str, ...] = ()
    """Added to every ssh call as `-o OPTION`."""
    allow: tuple[str, ...] = ()
    """What checkpoints from elsewhere may have beyond this host's defaults, as `--allow` takes it."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text")
    return value


def _path(value: Any) -> Path:
    path = Path(_text(value)).expanduser()
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


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


_KEYS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "store": _path,
    "log_dir": _path,
    "log_level": _one_of("debug", "info", "warning", "error"),
    "compress": _one_of("zstd", "gzip", "none"),
    "timeout_s": _seconds,
    "link_timeout_s": _seconds,
    "ssh_options": _texts,
    "allow": _texts,
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
    overrides = {key: env[variable(key)] for key in _KEYS if env.get(variable(key))}
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
            raise ConfigError(f"{source}: {name} {error}, not {value!r}") from None
    return settings
