"""Getting in: flags, environment, profiles, tokens that end."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.cli.conftest import Cli


@pytest.fixture
def password(cli: Cli) -> str:
    return cli.cloud.password_file.read_text().strip()


def test_login_is_remembered_without_the_password(cli: Cli, password: str) -> None:
    kept = {path.name: path for path in cli.home.rglob("*") if path.is_file()}

    assert {"config.yaml", "tokens.json", "default.pem"} <= kept.keys()
    for path in kept.values():
        assert password not in path.read_text()
    for name in ("config.yaml", "tokens.json"):
        assert stat.S_IMODE(kept[name].stat().st_mode) == 0o600
    assert kept["default.pem"].read_bytes() == cli.cloud.ca.read_bytes()
    assert "NAME" in cli.run("list")


def test_login_says_where_to(stranger: Cli) -> None:
    said = stranger.log_in()

    assert said == (
        f"Logged in to {stranger.cloud.endpoint} as admin: project default, the whole system\n"
    )
    said = stranger.log_in("--system")
    assert said.endswith("as admin: the whole system\n")


def test_without_a_cloud(stranger: Cli) -> None:
    said = stranger.error("list", code=1)

    assert "(NOT_LOGGED_IN)" in said
    assert "mcloud login --endpoint HOST:PORT" in said


def test_without_a_login(stranger: Cli) -> None:
    said = stranger.error(
        "--endpoint", stranger.cloud.endpoint, "--ca", str(stranger.cloud.ca), "list", code=1
    )

    assert f"not logged in to {stranger.cloud.endpoint} (NOT_LOGGED_IN)" in said


def test_wrong_password(stranger: Cli, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("not-the-password\n")
    arguments = ["--endpoint", stranger.cloud.endpoint, "--ca", str(stranger.cloud.ca)]
    said = stranger.error(
        "login", *arguments, "--username", "nobody", "--password-file", str(wrong), code=1
    )

    assert "(BAD_CREDENTIALS)" in said
    assert not (stranger.home / "config.yaml").exists()


def test_unknown_authority(stranger: Cli) -> None:
    stranger.env = {"MCLOUD_PASSWORD": "x"}
    said = stranger.error(
        "login", "--endpoint", stranger.cloud.endpoint, "--username", "admin", code=5
    )

    assert stranger.cloud.endpoint in said
    assert "--ca FILE" in said


def test_nobody_answers(stranger: Cli) -> None:
    stranger.env = {"MCLOUD_PASSWORD": "x"}
    start = time.monotonic()
    said = stranger.error("login", "--endpoint", "127.0.0.1:1", "--username", "a", code=5)

    assert "127.0.0.1:1" in said
    assert "(UNAVAILABLE)" in said
    assert time.monotonic() - start < 20


def test_environment_alone_is_enough_and_its_token_is_kept(cli: Cli, password: str) -> None:
    cli.home = cli.home.with_name("other")
    cli.env = {
        "MCLOUD_ENDPOINT": cli.cloud.endpoint,
        "MCLOUD_CA": str(cli.cloud.ca),
        "MCLOUD_USERNAME": "admin",
        "MCLOUD_PASSWORD": password,
    }
    cli.run("keypair", "list")

    assert not (cli.home / "config.yaml").exists()
    kept = json.loads((cli.home / "tokens.json").read_text())
    assert list(kept) == [f"{cli.cloud.endpoint}|admin|"]
    cli.run("host", "list")  # needs the system's role: another token
    assert len(json.loads((cli.home / "tokens.json").read_text())) == 2


def _expire(cli: Cli) -> None:
    path = cli.home / "tokens.json"
    kept = json.loads(path.read_text())
    for value in kept.values():
        value["expire_time"] = time.time() - 5
    path.write_text(json.dumps(kept))


def test_expired_login_says_so(cli: Cli) -> None:
    _expire(cli)
    said = cli.error("list", code=1)

    assert f"the login to {cli.cloud.endpoint} is over (LOGIN_EXPIRED)" in said
    assert "Log in again: mcloud login" in said


def test_expired_login_is_renewed_with_the_password(cli: Cli, password: str) -> None:
    _expire(cli)
    cli.env = {"MCLOUD_PASSWORD": password}

    assert "NAME" in cli.run("list")


def _add_user(cli: Cli, name: str, tmp_path: Path, *, role: str = "member") -> Cli:
    """Make a user with a role in the default project; return its command line, logged in."""
    secret = tmp_path / f"{name}.password"
    secret.write_text("correct horse battery\n")
    cli.run("user", "create", name, "--password-file", str(secret))
    cli.run("role", "add", role, "--user", name, "--project", "default")
    own = Cli(cli.cloud, tmp_path / name)
    own.run(
        "login",
        *("--endpoint", cli.cloud.endpoint, "--ca", str(cli.cloud.ca)),
        *("--username", name, "--password-file", str(secret)),
    )
    return own


def test_revoked_tokens(cli: Cli, tmp_path: Path) -> None:
    ada = _add_user(cli, "ada", tmp_path)
    value = ada.run("token", "show", "--value").strip()

    assert ada.run("token", "revoke") == "Ended the tokens of ada\n"
    assert "(NOT_LOGGED_IN)" in ada.error("list", code=1)

    ada.env = {"MCLOUD_TOKEN": value}
    end = time.monotonic() + 10  # services follow revocations within a second or two
    while (done := ada.invoke("list")).exit_code == 0 and time.monotonic() < end:
        time.sleep(0.1)
    assert "(TOKEN_REVOKED)" in done.stderr

    # A token kept by another machine is refused; with the password at hand a new one is drawn.
    tokens = {f"{ada.cloud.endpoint}|ada|": {"token": value, "expire_time": time.time() + 999}}
    (ada.home / "tokens.json").write_text(json.dumps(tokens))
    ada.env = {"MCLOUD_PASSWORD": "correct horse battery"}
    assert "NAME" in ada.run("list")


def test_member_is_told_what_is_missing(cli: Cli, tmp_path: Path) -> None:
    bob = _add_user(cli, "bob", tmp_path)

    said = bob.error("flavor", "create", "x", "--vcpus", "1", "--ram", "64", "--disk", "1", code=1)
    assert "(ROLE_REQUIRED)" in said
    assert "HOST" not in bob.run("list")
    assert "HOST" in cli.run("list")


def test_application_credential(cli: Cli) -> None:
    text = cli.run("application-credential", "create", "ci", "--role", "reader")
    lines = [line.removeprefix("export ").partition("=") for line in text.splitlines()]
    program = Cli(
        cli.cloud,
        cli.home.with_name("program"),
        {name: value for name, _, value in lines}
        | {"MCLOUD_ENDPOINT": cli.cloud.endpoint, "MCLOUD_CA": str(cli.cloud.ca)},
    )

    assert "NAME" in program.run("list")
    assert "(ROLE_REQUIRED)" in program.error("network", "create", "no", code=1)
    cli.run("application-credential", "delete", "ci")


def test_logout(cli: Cli) -> None:
    assert cli.run("logout") == f"Forgot 2 tokens of {cli.cloud.endpoint}\n"
    assert "(NOT_LOGGED_IN)" in cli.error("list", code=1)


def test_several_clouds(cli: Cli) -> None:
    cli.log_in("--cloud", "second")

    assert "NAME" in cli.run("--cloud", "default", "list")
    assert "no cloud third; logged in to: default, second" in cli.error(
        "--cloud", "third", "list", code=2
    )


def test_token_and_endpoints(cli: Cli) -> None:
    token = cli.json("token", "show")
    assert token["user_name"] == "admin"
    assert token["project_name"] == "default"
    assert token["expire_time"].endswith("Z")
    assert cli.run("endpoint", "list", "-o", "name").split() == [
        "identity",
        "compute",
        "scheduler",
        "conductor",
        "image",
        "network",
        "volume",
    ]


def test_list_from_a_shell_imports_nothing_it_does_not_need(cli: Cli) -> None:
    cli.run("list")  # keeps a copy of the configuration that needs no YAML
    script = (
        "import sys\nfrom mcloud_cli.main import main\n"
        "main(['list'], standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"MCLOUD_CONFIG_DIR": str(cli.home), "PYTHONPATH": ":".join(sys.path)},
    )

    assert "grpc" in done.stderr.split()
    assert {"rich", "pydantic", "cryptography", "yaml"}.isdisjoint(done.stderr.split())
