"""Where settings come from, and which one wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt import config
from ckpt.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults(tmp_path: Path) -> None:
    assert config.load({}, system_file=tmp_path / "none.toml") == config.Settings()


def test_the_stronger_source_wins(tmp_path: Path) -> None:
    system = write(tmp_path / "etc/ckpt.toml", 'store = "/a"\nlog_level = "info"\ncompress = "gzip"\ntimeout_s = 10\nssh_options = ["A=1"]')
    write(tmp_path / "etc/ckpt.toml.d/10-a.toml", 'store = "/b"\nlog_level = "error"\ncompress = "none"')
    write(tmp_path / "etc/ckpt.toml.d/20-b.toml", 'store = "/c"\nlog_level = "debug"')
    write(tmp_path / "home/ckpt/ckpt.toml", 'store = "/d"')
    env = {"XDG_CONFIG_HOME": str(tmp_path / "home"), "CKPT_TIMEOUT_S": "5"}
    found = config.load(env, system_file=system)
    assert found == config.Settings(store=Path("/d"), log_level="debug", compress="none", timeout_s=5.0, ssh_options=("A=1",))


@pytest.mark.parametrize("text", ["store = 1", 'store = "relative"', "stor = 1", "timeout_s = -1", "timeout_s = true", "ssh_options = [1]", "x ="])
def test_mistakes_name_the_file(tmp_path: Path, text: str) -> None:
    system = write(tmp_path / "ckpt.toml", text)
    with pytest.raises(ConfigError, match=str(system)):
        config.load({}, system_file=system)


def test_mistakes_name_the_variable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CKPT_LOG_LEVEL must be one of debug"):
        config.load({"CKPT_LOG_LEVEL": "loud"}, system_file=tmp_path / "none")


@pytest.mark.parametrize(
    "text",
    [
        'http = "x"', '[http."b:7443"]', '[http."https://me:sesame@b"]',
        '[http."https://b"]\ntoken = "sesame"', '[http."https://b"]\ntoken_file = "x"',
        '[http."https://b"]\ntoken_file = "/x"\ntoken_command = ["y"]', '[http."https://b"]\ntoken_command = []',
    ],
)  # fmt: skip
def test_mistakes_about_servers_show_no_secrets(tmp_path: Path, text: str) -> None:
    system = write(tmp_path / "ckpt.toml", text)
    with pytest.raises(ConfigError, match="http") as caught:
        config.load({}, system_file=system)
    assert "sesame" not in caught.value.message
