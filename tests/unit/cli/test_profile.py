"""What is kept between commands, and who may read it."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import click
import pytest

from mcloud_cli import profile
from mcloud_cli.session import Options, Session


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ENDPOINT", "PASSWORD", "TOKEN", "USERNAME", "PROJECT", "CLOUD", "CA"):
        monkeypatch.delenv(f"MCLOUD_{name}", raising=False)
    monkeypatch.setenv("MCLOUD_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


def test_files_are_for_their_owner_only(home: Path) -> None:
    profile.save("lab", profile.Profile("lab:7700", "/ca.pem", "ada", "norprod"))
    profile.save_token("lab:7700|ada|norprod", profile.Token("secret", time.time() + 60))

    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for name in ("config.yaml", "tokens.json"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600
    assert "secret" not in (home / "config.yaml").read_text()


def test_last_saved_cloud_is_the_current_one() -> None:
    profile.save("one", profile.Profile("one:7700"))
    profile.save("two", profile.Profile("two:7700"))

    assert profile.find("") == ("two", profile.Profile("two:7700"))
    assert profile.find("one") == ("one", profile.Profile("one:7700"))


def test_unknown_cloud_is_a_usage_error_that_lists_the_known() -> None:
    profile.save("one", profile.Profile("one:7700"))

    with pytest.raises(click.UsageError, match="no cloud three; logged in to: one"):
        profile.find("three")


def test_broken_config_names_its_file(home: Path) -> None:
    home.mkdir()
    (home / "config.yaml").write_text("clouds: [")

    with pytest.raises(click.UsageError, match=r"config\.yaml"):
        profile.find("")


@pytest.mark.parametrize("text", ["just words", "clouds: [a]", "clouds: {a: b}", "- list"])
def test_config_of_another_form_names_its_file(home: Path, text: str) -> None:
    home.mkdir()
    (home / "config.yaml").write_text(text)

    with pytest.raises(click.UsageError, match="must be like"):
        profile.find("")


def test_config_edited_by_hand_is_read_anew(home: Path) -> None:
    profile.save("lab", profile.Profile("lab:7700"))
    assert profile.find("")[1].endpoint == "lab:7700"
    assert profile.find("")[1].endpoint == "lab:7700"  # from the copy

    path = home / "config.yaml"
    path.write_text(path.read_text().replace("lab:7700", "new:7700"))

    assert profile.find("")[1].endpoint == "new:7700"
    (home / ".config.json").write_text("damaged")
    assert profile.find("")[1].endpoint == "new:7700"


def test_empty_config_is_no_config(home: Path) -> None:
    home.mkdir()
    (home / "config.yaml").write_text("")

    assert profile.find("") == ("", profile.Profile())


def test_broken_token_file_counts_as_no_token(home: Path) -> None:
    home.mkdir()
    (home / "tokens.json").write_text("{")

    assert profile.find_token("x") is None


def test_token_about_to_end_is_not_good() -> None:
    assert not profile.Token("t", time.time() + 5).is_good()
    assert profile.Token("t", time.time() + 120).is_good()


def test_old_tokens_go_when_new_ones_are_kept() -> None:
    profile.save_token("old", profile.Token("t", time.time() - 100_000))
    profile.save_token("ended", profile.Token("t", time.time() - 10))
    profile.save_token("new", profile.Token("t", time.time() + 10))

    assert profile.find_token("old") is None
    assert profile.find_token("ended") is not None
    assert profile.forget_tokens("") == 2


def test_flags_win_over_the_profile_and_another_endpoint_takes_nothing_of_it() -> None:
    profile.save("lab", profile.Profile("lab:7700", "/ca.pem", "ada", "norprod"))

    same = Session(Options(project="other"))
    assert (same.endpoint, same.ca, same.username, same.project) == (
        "lab:7700",
        "/ca.pem",
        "ada",
        "other",
    )
    elsewhere = Session(Options(endpoint="evil:7700"))
    assert (elsewhere.ca, elsewhere.username, elsewhere.project) == ("", "", "")
