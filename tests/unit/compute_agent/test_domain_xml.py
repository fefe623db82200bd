"""Libvirt's XML, against golden files and against libvirt's schema."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import domains
from fakes.driver_contract import NODE
from mcloud_agents.compute import domain_xml, host
from mcloud_agents.compute.domain_xml import Platform
from mcloud_agents.compute.driver import Identity, ResolvedDomain, RootDisk

GOLDEN = Path(__file__).parents[2] / "golden"
STATE = Path("/var/lib/mcloud/compute")


def wanted(**fields: object) -> ResolvedDomain:
    spec = domains.spec(
        "i-06h00000000000000001", domain_id="d-06h00000000000000002", memory_mib=512, vcpu_count=2
    )
    directory = STATE / "instances" / spec.domain_id
    base = STATE / "images" / ("5e" * 32 + ".qcow2")
    plain = ResolvedDomain(
        spec, RootDisk(directory / "root.qcow2", base, "qcow2"), directory / "console.log"
    )
    return replace(plain, **fields)  # type: ignore[arg-type]


def full() -> ResolvedDomain:
    drive = STATE / "instances/d-06h00000000000000002/config-drive.iso"
    return wanted(
        config_drive=drive,
        nics=(domains.nic(1), domains.nic(2, "br-ex")),
        disks=(domains.disk(), domains.disk("vdc", "vol-00000000000000000002")),
    )


@pytest.mark.parametrize(
    ("name", "domain", "platform"),
    [
        ("plain", wanted(), Platform("qemu")),
        ("full", full(), Platform("qemu")),
        ("kvm", wanted(), Platform("kvm", machine="q35")),
        ("test", wanted(), Platform("test", arch="i686", machine="")),
    ],
)
def test_golden(
    name: str, domain: ResolvedDomain, platform: Platform, request: pytest.FixtureRequest
) -> None:
    text = domain_xml.build(domain, platform)
    path = GOLDEN / f"domain-{name}.xml"
    if request.config.getoption("--update-golden", default=False):
        path.write_text(text)
    assert text == path.read_text()


def test_libvirts_schema_accepts_it(tmp_path: Path) -> None:
    libvirt = pytest.importorskip("libvirt")
    node = tmp_path / "node.xml"
    node.write_text(NODE)
    connection = libvirt.open(f"test://{node}")
    text = domain_xml.build(full(), Platform("test", arch="i686", machine=""))
    connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    broken = text.replace("<devices>", "<devices><nonsense/>")
    with pytest.raises(libvirt.libvirtError):
        connection.defineXMLFlags(broken, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    connection.close()


@given(st.text(max_size=255))
def test_any_name_is_only_a_title(name: str) -> None:
    domain = wanted()
    domain.spec.name = name
    root = ElementTree.fromstring(domain_xml.build(domain, Platform("qemu")))
    assert [child.tag for child in root].count("devices") == 1
    assert len(root.findall("devices/disk")) == 1
    title = root.findtext("title", "")
    assert not set(title) & {"\n", "\r", "\0"}
    assert title == "" or title in name or name.isprintable() is False


def test_metadata_are_read_back() -> None:
    text = domain_xml.build(wanted(), Platform("qemu"))
    found = domain_xml.read_metadata(text)
    assert found is not None
    identity, digest = found
    assert identity == Identity(
        "d-06h00000000000000002", "i-06h00000000000000001", domains.EPOCH, 1, 1
    )
    assert domain_xml.read_metadata(domain_xml.metadata_xml(identity, digest)) == found
    assert domain_xml.read_metadata("<domain id='x'/>") is None


def test_the_digest_is_of_what_the_guest_gets() -> None:
    domain = wanted()

    def digest() -> str:
        found = domain_xml.read_metadata(domain_xml.build(domain, Platform("qemu")))
        assert found is not None
        return found[1]

    first = digest()
    domain.spec.generation, domain.spec.boot_number, domain.spec.epoch = 7, 8, "other"
    assert digest() == first
    domain.spec.memory_mib += 1
    assert digest() != first


def test_devices_are_compared_by_what_they_are() -> None:
    live = domain_xml.build(full(), Platform("qemu"))
    assert domain_xml.surplus_devices(live, full()) == []
    assert domain_xml.missing_devices(live, full()) == []
    other = wanted(disks=(domains.disk("vdb", "vol-00000000000000000009"),), nics=(domains.nic(2),))
    surplus = domain_xml.surplus_devices(live, other)
    assert len(surplus) == 3, "two disks (one replaced in its place) and a NIC"
    (missing,) = domain_xml.missing_devices(live, other)
    assert "vol-00000000000000000009" in missing


@pytest.mark.parametrize(
    ("flags", "kvm", "chosen"),
    [
        ("fpu vmx sse", True, "kvm"),
        ("fpu svm", True, "kvm"),
        ("fpu sse", True, "qemu"),
        ("fpu vmx", False, "qemu"),
    ],
)
def test_acceleration_needs_both_signs(tmp_path: Path, flags: str, kvm: bool, chosen: str) -> None:
    cpuinfo, device = tmp_path / "cpuinfo", tmp_path / "kvm"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    if kvm:
        device.touch()
    assert host.choose_hypervisor_type(cpuinfo=cpuinfo, kvm=device) == chosen
    assert host.choose_hypervisor_type("kvm", cpuinfo=cpuinfo, kvm=device) == "kvm"
