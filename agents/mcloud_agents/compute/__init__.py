"""The hypervisor of a host: domains, their disks, and what their guests are told."""
