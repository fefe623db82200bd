"""What verify finds between the rows and what hosts have: domains, disks, taps, rules, servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mcloud.common.v1 import session_pb2
from mcloud.volume.v1 import attachment_pb2
from mcloud_base import ids
from mcloud_controlplane.conductor.picture import Finding, Others, Rows

Artifact = session_pb2.Artifact

OF_DOMAINS = (Artifact.KIND_DOMAIN, Artifact.KIND_OVERLAY, Artifact.KIND_CONFIG_DRIVE)
OF_PORTS = (Artifact.KIND_TAP, Artifact.KIND_FILTER, Artifact.KIND_DHCP_ENTRY)
OF_VOLUMES = (Artifact.KIND_VOLUME, Artifact.KIND_EXPORT)
# What the network's next pass over the host makes right.
_REPLACED = (Artifact.KIND_FILTER, Artifact.KIND_DHCP_ENTRY)
_HIGHEST = 1 << 62  # a generation; the tombstone's is one more
_LET_ALONE = "no row and no tombstone names it; it is left alone"


def find(others: Others, rows: Rows, only_host: str) -> Iterator[Finding]:
    """Return what is wrong on the hosts that have answered."""
    for host_id, artifacts in others.listings.items():
        host = _Host(host_id, artifacts, others, rows)
        yield from host.unknown()
        yield from host.missing()
    for host_id, progress in others.dataplanes.items():
        behind = progress.observed_generation < progress.generation
        if progress.connected and progress.error and behind and only_host in ("", host_id):
            yield Finding(
                kind=Finding.KIND_DATAPLANE_BEHIND,
                subject=host_id,
                host_id=host_id,
                service="network",
                generation=progress.generation,
                detail=f"its network is at generation {progress.observed_generation} of "
                f"{progress.generation}: {progress.error}",
                repair="have the host go over its network once more",
            )


class _Host:
    """One host's things beside the rows that name it."""

    def __init__(self, host_id: str, artifacts: list[Artifact], others: Others, rows: Rows) -> None:
        self._id = host_id
        self._artifacts = artifacts
        self._rows = rows
        self._volumes = {v.volume_id: v for v in others.volumes.values() if v.host_id == host_id}
        self._domains = {id_: row for id_, row in rows.domains.items() if row.host_id == host_id}
        self._ports = {id_ for id_, p in others.ports.items() if p.status.host_id == host_id}
        self._attachments = {
            each.spec.volume_id: each
            for each in others.attachments.values()
            if each.status.host_id == host_id
        }
        progress = others.dataplanes.get(host_id)
        self._network_reached = (
            progress is None or progress.observed_generation >= progress.generation
        )
        self._dataplane = progress.generation if progress else 0

    def unknown(self) -> Iterator[Finding]:
        """Return what no row names."""
        for artifact in self._artifacts:
            if not self._is_known(artifact):
                yield self._unknown(artifact)

    def _is_known(self, artifact: Artifact) -> bool:
        owner = artifact.owner_id
        if artifact.kind in OF_DOMAINS:
            return owner in self._domains or owner in self._rows.settling
        if artifact.kind in OF_PORTS:
            return owner in self._ports or not self._network_reached
        if artifact.kind == Artifact.KIND_VOLUME:
            return owner in self._volumes
        if artifact.kind == Artifact.KIND_EXPORT:
            volume = self._volumes.get(owner)
            return volume is not None and (volume.served or not _is_reached(volume))
        if artifact.kind == Artifact.KIND_DISK and owner not in self._domains:
            domain_id, _, _ = artifact.name.partition("/")
            domain = self._domains.get(domain_id)
            return domain is None or self._in_flight(domain) or owner in self._attachments
        return True  # networks and routers are the dataplane's: it removes what it does not name

    def _unknown(self, artifact: Artifact) -> Finding:
        finding = Finding(
            kind=Finding.KIND_UNKNOWN_ARTIFACT,
            subject=artifact.name,
            owner_id=artifact.owner_id,
            host_id=self._id,
            artifact_kind=artifact.kind,
            generation=min(artifact.generation, _HIGHEST),
            detail=_LET_ALONE,
        )
        # Without an id of ours nothing can be said to the host about it.
        if artifact.kind in OF_DOMAINS and ids.is_id(artifact.owner_id, "d"):
            finding.repair = "have the host remove the domain, its disks and its files"
            finding.must_be_named = True
        elif artifact.kind == Artifact.KIND_VOLUME and ids.is_id(artifact.owner_id, "vol"):
            finding.repair = "have the host remove the volume's data"
            finding.must_be_named = True
        elif artifact.kind == Artifact.KIND_EXPORT and artifact.owner_id in self._volumes:
            finding.generation = self._volumes[artifact.owner_id].desired_generation
            finding.repair = "have the host end the volume's server"
        elif artifact.kind == Artifact.KIND_DISK:
            finding.repair = "have the host take the disk off the domain"
            finding.detail = "the volume is not attached to the domain's instance"
        elif artifact.kind in _REPLACED:
            finding.service = "network"
            finding.generation = self._dataplane
            finding.repair = "have the host go over its network once more"
        else:
            finding.detail = f"{_LET_ALONE}: remove it by hand"
        return finding

    def missing(self) -> Iterator[Finding]:
        """Return what rows say that the host has, and it has not."""
        present = {(each.kind, each.owner_id) for each in self._artifacts}
        disks = {each.name for each in self._artifacts if each.kind == Artifact.KIND_DISK}
        for id_, row in self._domains.items():
            if row.absent or not row.observed_generation or self._in_flight(row):
                continue
            if row.unproven:
                continue  # restored: its host says first whether it is there
            if (Artifact.KIND_DOMAIN, id_) not in present:
                yield self._missing(
                    Artifact.KIND_DOMAIN,
                    id_,
                    row.instance_id,
                    f"the host reached generation {row.observed_generation}, and has it no more",
                    "have the host make it again, from the disk that is there",
                )
            elif any(name.startswith(f"{id_}/") for name in disks):  # agents of old list none
                yield from self._missing_disks(id_, row, present)
        for id_, volume in self._volumes.items():
            if volume.absent or not _is_reached(volume):
                continue
            if (Artifact.KIND_VOLUME, id_) not in present:
                yield self._missing(
                    Artifact.KIND_VOLUME, id_, "", "the volume's data is not on its host", ""
                )
            elif volume.served and (Artifact.KIND_EXPORT, id_) not in present:
                finding = self._missing(
                    Artifact.KIND_EXPORT,
                    id_,
                    "",
                    "a client is to have the volume, and no server of it runs",
                    "have its host start the server",
                )
                finding.generation = volume.desired_generation
                yield finding

    def _missing_disks(self, id_: str, row: Any, present: set[Any]) -> Iterator[Finding]:
        connected = attachment_pb2.AttachmentStatus.STATE_CONNECTED
        for volume_id, attachment in self._attachments.items():
            status = attachment.status
            if status.domain_id != id_ or status.state != connected:
                continue
            if (Artifact.KIND_DISK, volume_id) not in present:
                yield self._missing(
                    Artifact.KIND_DISK,
                    volume_id,
                    id_,
                    "the volume is connected to the domain, which has no such disk",
                    "have the host plug it in",
                )

    def _missing(
        self, kind: Artifact.Kind.ValueType, subject: str, owner: str, detail: str, repair: str
    ) -> Finding:
        return Finding(
            kind=Finding.KIND_MISSING_ARTIFACT,
            subject=subject,
            owner_id=owner,
            host_id=self._id,
            artifact_kind=kind,
            detail=detail,
            repair=repair,
        )

    def _in_flight(self, domain: Any) -> bool:
        behind = domain.observed_generation < domain.generation
        return behind or self._rows.is_held(domain.instance_id)


def _is_reached(volume: Any) -> bool:
    return bool(volume.observed_generation >= volume.desired_generation)
