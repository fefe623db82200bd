"""Backups are of one moment and whole, or they are refused; restoring replaces nothing."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures_postgresql import DATABASES, postgresql_server, postgresql_url  # noqa: F401
from mcloud_base import errors
from mcloud_controlplane.compute import model as compute
from mcloud_controlplane.core import migrations, pki, tables
from mcloud_controlplane.maintenance import backup, databases, migrate, restore
from mcloud_controlplane.maintenance.moment import frozen
from mcloud_controlplane.settings import Settings
from mcloud_controlplane.volume import model as volume

Edit = Callable[[dict[str, bytes]], None]
IMAGE = "img-00000000000000000001"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """A control plane that has been started once, with an image."""
    database = "sqlite"
    if request.param == "postgresql":
        database = str(request.getfixturevalue("postgresql_url"))
    made = Settings(state_dir=tmp_path / "state", database=database)
    pki.Authority(made.state_dir / "pki")
    for name in migrations.DATABASES:
        model = importlib.import_module(f"mcloud_controlplane.{name}.model")
        model.open_database(made.database_url(name)).close()
    (made.state_dir / "images").mkdir()
    (made.state_dir / "images" / IMAGE).write_bytes(b"bytes")
    (made.state_dir / "images" / "img-2.partial").write_bytes(b"half")
    return made


only_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


def take(settings: Settings, path: Path, *, images: bool = True) -> list[str]:
    return list(backup.run(settings, path, images=images))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {each.name: tar.extractfile(each).read() for each in tar}  # type: ignore[union-attr]


def write_members(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def counting(settings: Settings) -> Iterator[threading.Event]:
    """Somebody who counts in one database, and after each commit in another."""
    first = compute.open_database(settings.database_url("compute"))
    second = volume.open_database(settings.database_url("volume"))
    stop, begun = threading.Event(), threading.Event()

    def note(table: Any, column: str, value: int) -> None:
        row = {"project_id": "p-1", column: value}
        table.insert(**row).on_conflict(
            conflict_target=[table.project_id], update={column: value}
        ).execute()
        tables.changed("quota", "p-1", "p-1")

    def count() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            first.write_now(note, compute.Quota, "vcpu_count", value)
            second.write_now(note, volume.Quota, "volume_count", value)
            begun.set()

    thread = threading.Thread(target=count)
    thread.start()
    assert begun.wait(60)
    yield begun
    stop.set()
    thread.join()
    first.close()
    second.close()


def test_all_databases_are_of_one_moment(settings: Settings, counting: threading.Event) -> None:
    for _ in range(15):
        with frozen(settings, lambda: None) as connections:
            second = _one(connections["volume"], "SELECT volume_count FROM quota")
            first = _one(connections["compute"], "SELECT vcpu_count FROM quota")
        assert first - second in (0, 1), (first, second)
        counting.clear()
        assert counting.wait(60), "it is written to meanwhile"


def _one(connection: Any, statement: str) -> int:
    return int(connection.execute(statement).fetchone()[0])


def test_what_is_restored_is_what_was_there_but_for_its_epoch(
    settings: Settings, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    opened = compute.open_database(settings.database_url("compute"))
    awkward = "tab\t, line\n, \\, quote \" ', \N{SNOWMAN}"

    def fill() -> tuple[str, int]:
        compute.Quota.create(project_id=awkward, vcpu_count=7)
        row = compute.shared.deployment.get_by_id(1)
        return row.epoch, row.revision

    epoch, revision = opened.write_now(fill)
    opened.close()
    said = take(settings, tmp_path / "b.tar")
    assert "images: 1" in said
    target = _elsewhere(settings, tmp_path, request)

    said = list(restore.run(target, tmp_path / "b.tar"))

    assert said[-1].startswith("restored")
    with databases.opened(target, "compute") as each:
        row = each.database.read_now(lambda: each.tables.deployment.get_by_id(1))
        store: Any = each.database
        sql = "SELECT project_id, vcpu_count FROM quota"
        found = store.read_now(lambda: store.peewee.execute_sql(sql).fetchall())
    assert [tuple(each) for each in found] == [(awkward, 7)]
    assert row.epoch != epoch
    assert row.revision > revision
    assert set(migrate.run(target, dry_run=True)) == {
        f"{name}: up to date" for name in migrations.DATABASES
    }
    for name in ("pki/ca.key", "pki/ca.pem", f"images/{IMAGE}"):
        restored = target.state_dir / name
        assert restored.read_bytes() == (settings.state_dir / name).read_bytes()
        assert restored.stat().st_mode & 0o777 == 0o600
    assert not list(target.state_dir.glob("*restoring*"))
    with pytest.raises(errors.WrongState) as refused:
        list(restore.run(target, tmp_path / "b.tar"))
    assert refused.value.reason == "RESTORE_TARGET_NOT_EMPTY"


def _elsewhere(settings: Settings, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    database = "sqlite"
    if settings.database != "sqlite":
        server = request.getfixturevalue("postgresql_server")
        for name in DATABASES:
            server.execute("DROP SCHEMA IF EXISTS elsewhere CASCADE", name)
            server.execute("CREATE SCHEMA elsewhere", name)
        database = server.url("{name}", "elsewhere")
    return Settings(state_dir=tmp_path / "elsewhere", database=database)


@only_sqlite
def test_an_image_that_is_deleted_meanwhile_is_in_the_backup(
    settings: Settings, tmp_path: Path
) -> None:
    lines = backup.run(settings, tmp_path / "b.tar", images=True)
    assert next(lines).startswith("database identity")
    (settings.state_dir / "images" / IMAGE).unlink()
    list(lines)
    assert members(tmp_path / "b.tar")[f"images/{IMAGE}"] == b"bytes"
    assert [each.name for each in (settings.state_dir / "images").iterdir()] == ["img-2.partial"]


@only_sqlite
def test_a_backup_without_images_says_so(settings: Settings, tmp_path: Path) -> None:
    assert "images: left out" in take(settings, tmp_path / "b.tar", images=False)
    target = Settings(state_dir=tmp_path / "elsewhere")
    said = list(restore.run(target, tmp_path / "b.tar"))
    assert any("put the image store back yourself" in line for line in said)


@only_sqlite
def test_a_backup_replaces_no_file_and_leaves_none_behind(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "b.tar").touch()
    with pytest.raises(errors.AlreadyExists) as exists:
        take(settings, tmp_path / "b.tar")
    assert exists.value.reason == "BACKUP_EXISTS"
    (settings.state_dir / "volume.db").unlink()
    with pytest.raises(errors.WrongState) as missing:
        take(settings, tmp_path / "c.tar")
    assert missing.value.reason == "DATABASE_MISSING"
    assert {each.name for each in tmp_path.iterdir()} == {"b.tar", "state"}


def _manifest(**changes: Any) -> Edit:
    def edit(contents: dict[str, bytes]) -> None:
        manifest = json.loads(contents["manifest.json"])
        contents["manifest.json"] = json.dumps({**manifest, **changes}).encode()

    return edit


def _flip(contents: dict[str, bytes]) -> None:
    content = bytearray(contents["databases/compute.db"])
    content[5000] ^= 1
    contents["databases/compute.db"] = bytes(content)


DAMAGES: dict[str, tuple[Edit, str]] = {
    "a bit": (_flip, "BACKUP_DAMAGED"),
    "a member less": (lambda c: c.__delitem__("pki/ca.key"), "BACKUP_DAMAGED"),
    "a member more": (lambda c: c.update({"pki/other": b""}), "BACKUP_DAMAGED"),
    "a member outside": (lambda c: c.update({"../evil": b""}), "BACKUP_DAMAGED"),
    "no manifest": (lambda c: c.__delitem__("manifest.json"), "BACKUP_DAMAGED"),
    "half a manifest": (lambda c: c.update({"manifest.json": b'{"format": 1}'}), "BACKUP_DAMAGED"),
    "a newer format": (_manifest(format=2), "BACKUP_UNKNOWN"),
    "another database": (_manifest(kind="postgresql"), "BACKUP_OF_OTHER_DATABASE"),
    "a newer schema": (
        _manifest(schemas={**dict.fromkeys(migrations.DATABASES, [1]), "volume": [1, 999]}),
        "SCHEMA_UNKNOWN",
    ),
}


@only_sqlite
def test_what_is_not_whole_or_does_not_fit_is_refused_untouched(
    settings: Settings, tmp_path: Path
) -> None:
    take(settings, tmp_path / "b.tar")
    good = members(tmp_path / "b.tar")
    target = Settings(state_dir=tmp_path / "elsewhere")
    for what, (edit, reason) in DAMAGES.items():
        contents = dict(good)
        edit(contents)
        write_members(tmp_path / "bad.tar", contents)
        with pytest.raises(errors.Error) as refused:
            list(restore.run(target, tmp_path / "bad.tar"))
        assert refused.value.reason == reason, what
        assert not target.state_dir.exists(), what
    (tmp_path / "bad.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:20_000])
    with pytest.raises(errors.DataLoss):
        list(restore.run(target, tmp_path / "bad.tar"))
    with pytest.raises(errors.NotFound):
        list(restore.run(target, tmp_path / "none.tar"))
    assert not target.state_dir.exists()
