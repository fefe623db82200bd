"""Libvirt's XML of a domain: written from a ResolvedDomain, read back where it is compared.

Built as a tree, never by pasting text: names come from users.
Source: https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from mcloud_agents.compute.driver import (
    Identity,
    ResolvedDisk,
    ResolvedDomain,
    ResolvedNic,
    libvirt_name,
)
from mcloud_base import ids

NAMESPACE = "urn:mcloud:domain:1"
PREFIX = "mcloud"
_TAG = f"{{{NAMESPACE}}}domain"
ET.register_namespace(PREFIX, NAMESPACE)

# XML 1.0 has no way to write these, and libvirt refuses line breaks in a title.
_UNWRITABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Platform:
    """What the hypervisor of this host runs."""

    hypervisor_type: str  # "kvm", "qemu"; "test" for libvirt's own test driver
    arch: str = "x86_64"
    machine: str = "pc"  # has a free PCI slot for every disk and NIC plugged later; q35 has not


def build(domain: ResolvedDomain, platform: Platform) -> str:
    """Return the XML to define; equal input gives equal text.

    The metadata carry a digest of all the rest, by which a later caller sees whether the
    persistent definition must be replaced: what libvirt returns is its own rewriting of it.
    """
    spec = domain.spec
    root = ET.Element("domain", type=platform.hypervisor_type)
    _add(root, "name", libvirt_name(spec.instance_id))
    _add(root, "uuid", spec.uuid)
    if title := _UNWRITABLE.sub("", spec.name).strip():
        _add(root, "title", title)
    _add(root, "memory", str(spec.memory_mib), unit="MiB")
    _add(root, "vcpu", str(spec.vcpu_count))
    system = _add(root, "os")
    machine = {"machine": platform.machine} if platform.machine else {}
    _add(system, "type", "hvm", arch=platform.arch, **machine)
    _add(system, "smbios", mode="sysinfo")
    _add_identity(root, spec.uuid)
    features = _add(root, "features")
    _add(features, "acpi")
    _add(features, "apic")
    _add_cpu(root, platform)
    _add(root, "clock", offset="utc")
    _add(root, "on_poweroff", "destroy")
    _add(root, "on_reboot", "restart")
    _add(root, "on_crash", "destroy")
    power = _add(root, "pm")
    _add(power, "suspend-to-mem", enabled="no")
    _add(power, "suspend-to-disk", enabled="no")
    _add_devices(_add(root, "devices"), domain)

    digest = hashlib.sha256(ET.tostring(root)).hexdigest()
    identity = Identity(
        spec.domain_id, spec.instance_id, spec.epoch, spec.generation, spec.boot_number
    )
    metadata = ET.Element("metadata")
    metadata.append(_metadata_element(identity, digest))
    root.insert(2, metadata)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _add_cpu(root: ET.Element, platform: Platform) -> None:
    """Give the model that a guest can keep on every host of the same kind.

    Under TCG a fixed one: "maximum" boots twice as slowly, and cannot migrate.
    """
    if platform.hypervisor_type == "kvm":
        _add(root, "cpu", mode="host-model", check="partial")
    else:
        cpu = _add(root, "cpu", mode="custom", match="exact", check="none")
        _add(cpu, "model", "qemu64", fallback="forbid")


def _add_identity(root: ET.Element, uuid: str) -> None:
    """Tell the firmware's tables what the machine is.

    Stock cloud-init asks the metadata service only where the product is this one.
    Source: cloud-init, tools/ds-identify, dscheck_OpenStack.
    """
    table = _add(_add(root, "sysinfo", type="smbios"), "system")
    for name, value in (
        ("manufacturer", "mcloud"),
        ("product", "OpenStack Compute"),
        ("uuid", uuid),
        ("family", "Virtual Machine"),
    ):
        _add(table, "entry", value, name=name)


def _add_devices(devices: ET.Element, domain: ResolvedDomain) -> None:
    _add_root_disk(devices, domain)
    devices.extend(disk_element(disk) for disk in domain.disks)
    if domain.config_drive:
        drive = _add(devices, "disk", type="file", device="cdrom")
        _add(drive, "driver", name="qemu", type="raw", cache="none")
        _add(drive, "source", file=str(domain.config_drive))
        _add(drive, "target", dev="hda", bus="ide")
        _add(drive, "readonly")
    _add(devices, "controller", type="usb", model="none")
    devices.extend(nic_element(nic) for nic in domain.nics)
    for name in ("serial", "console"):
        port = _add(devices, name, type="pty")
        _add(port, "log", file=str(domain.console_log), append="on")
        _add(port, "target", port="0", **({"type": "serial"} if name == "console" else {}))
    channel = _add(devices, "channel", type="unix")
    _add(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    # Loopback only: whoever is to see the screen comes through the agent.
    graphics = _add(devices, "graphics", type="vnc", port="-1", autoport="yes", listen="127.0.0.1")
    _add(graphics, "listen", type="address", address="127.0.0.1")
    video = _add(devices, "video")
    _add(video, "model", type="vga", vram="8192", heads="1", primary="yes")
    balloon = _add(devices, "memballoon", model="virtio")
    _add(balloon, "stats", period="10")
    rng = _add(devices, "rng", model="virtio")
    _add(rng, "backend", "/dev/urandom", model="random")


def _add_root_disk(devices: ET.Element, domain: ResolvedDomain) -> None:
    """Name the whole chain with its formats: libvirt probes whatever is left open."""
    root_disk = domain.root_disk
    disk = _add(devices, "disk", type="file", device="disk")
    _add(disk, "driver", name="qemu", type="qcow2", cache="none", discard="unmap")
    _add(disk, "source", file=str(root_disk.overlay))
    backing = _add(disk, "backingStore", type="file")
    _add(backing, "format", type=root_disk.base_format)
    _add(backing, "source", file=str(root_disk.base))
    _add(backing, "backingStore")
    _add(disk, "target", dev="vda", bus="virtio")
    _add(disk, "boot", order="1")


def disk_element(disk: ResolvedDisk) -> ET.Element:
    """Return the element of a volume's disk, as defined and as plugged.

    The policies stop the guest while the volume's server is away; by default it would get I/O
    errors, and libvirt 9.0 drops a <reconnect> of NBD sources without a word.
    """
    element = ET.Element("disk", type="network", device="disk")
    _add(
        element,
        "driver",
        name="qemu",
        type="raw",
        cache="none",
        io="threads",
        discard="unmap",
        error_policy="stop",
        rerror_policy="stop",
    )
    source = _add(element, "source", protocol="nbd", name=disk.nbd.export_name, tls="yes")
    _add(source, "host", name=disk.nbd.address, port=str(disk.nbd.port))
    _add(element, "target", dev=disk.device, bus="virtio")
    # virtio-blk shows 20 characters, which is what an id has after its prefix.
    _add(element, "serial", disk.volume_id.partition("-")[2])
    return element


def nic_element(nic: ResolvedNic) -> ET.Element:
    """Return the element of a NIC, as defined and as plugged."""
    element = ET.Element("interface", type="bridge")
    _add(element, "mac", address=nic.binding.mac)
    _add(element, "source", bridge=nic.bridge)
    _add(element, "target", dev=nic.binding.device_name)
    _add(element, "model", type="virtio")
    if nic.mtu:
        _add(element, "mtu", size=str(nic.mtu))
    return element


# --- metadata -----------------------------------------------------------------------------------


def metadata_xml(identity: Identity, digest: str) -> str:
    """Return mcloud's metadata element for virDomainSetMetadata, which adds the namespace."""
    element = _metadata_element(identity, digest)
    element.tag = "domain"
    return ET.tostring(element, encoding="unicode")


def _metadata_element(identity: Identity, digest: str) -> ET.Element:
    return ET.Element(
        _TAG,
        {
            "id": identity.domain_id,
            "instance-id": identity.instance_id,
            "epoch": identity.epoch,
            "generation": str(identity.generation),
            "boot-number": str(identity.boot_number),
            "digest": digest,
        },
    )


def read_metadata(text: str) -> tuple[Identity, str] | None:
    """Return the identity and the definition's digest; None if this is not ours after all.

    Args:
        text: the element, as virDomainGetMetadata or `build` gives it.
    """
    element = ET.fromstring(text)  # noqa: S314 (libvirt's own output, which it has parsed before)
    found = element.find(f".//{_TAG}")
    # Asked for the element alone, libvirt returns it without its namespace.
    attributes = element.attrib if found is None else found.attrib
    try:
        identity = Identity(
            attributes["id"],
            attributes["instance-id"],
            attributes["epoch"],
            int(attributes["generation"]),
            int(attributes["boot-number"]),
        )
    except (KeyError, ValueError):
        return None
    return identity, attributes.get("digest", "")


# --- what a live domain has ---------------------------------------------------------------------


def surplus_devices(text: str, wanted: ResolvedDomain) -> list[str]:
    """Return those network disks and NICs of a live domain's XML that should not be there."""
    disks = {_disk_key(disk_element(disk)) for disk in wanted.disks}
    nics = {_nic_key(nic_element(nic)) for nic in wanted.nics}
    live_disks, live_nics = _live_devices(text)
    return [
        *(_to_text(live_disks[key]) for key in live_disks if key not in disks),
        *(_to_text(live_nics[key]) for key in live_nics if key not in nics),
    ]


def missing_devices(text: str, wanted: ResolvedDomain) -> list[str]:
    """Return the XML of network disks and NICs that a live domain lacks."""
    live_disks, live_nics = _live_devices(text)
    disks = [disk_element(disk) for disk in wanted.disks]
    nics = [nic_element(nic) for nic in wanted.nics]
    return [
        *(_to_text(disk) for disk in disks if _disk_key(disk) not in live_disks),
        *(_to_text(nic) for nic in nics if _nic_key(nic) not in live_nics),
    ]


def disks(text: str) -> tuple[tuple[str, str], ...]:
    """Return the disks of a domain's XML by device, with the volume that each is of, or ""."""
    root = ET.fromstring(text)  # noqa: S314 (libvirt's own output)
    found = []
    for disk in root.findall("./devices/disk[@device='disk']"):
        serial = disk.findtext("serial", "") if disk.get("type") == "network" else ""
        volume_id = f"vol-{serial}"
        owner = volume_id if ids.is_id(volume_id, "vol") else ""
        found.append((_attribute(disk, "target", "dev"), owner))
    return tuple(found)


_DiskKey = tuple[str, str]


def _live_devices(text: str) -> tuple[dict[_DiskKey, ET.Element], dict[str, ET.Element]]:
    """Return network disks by target and export, NICs by MAC."""
    root = ET.fromstring(text)  # noqa: S314 (libvirt's own output)
    disks = root.findall("./devices/disk[@type='network']")
    nics = root.findall("./devices/interface")
    return {_disk_key(disk): disk for disk in disks}, {_nic_key(nic): nic for nic in nics}


def _disk_key(disk: ET.Element) -> _DiskKey:
    # A volume that has moved to another server is still the same disk; another export is not.
    return _attribute(disk, "target", "dev"), _attribute(disk, "source", "name")


def _nic_key(nic: ET.Element) -> str:
    return _attribute(nic, "mac", "address").lower()


def _attribute(element: ET.Element, child: str, name: str) -> str:
    found = element.find(child)
    return "" if found is None else found.get(name, "")


def _to_text(element: ET.Element) -> str:
    return ET.tostring(element, encoding="unicode")


def _add(parent: ET.Element, tag: str, text: str = "", **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    if text:
        element.text = text
    return element
