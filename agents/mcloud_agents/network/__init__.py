"""The dataplane of a host: bridges, overlay, packet filters, DHCP, metadata and routers."""
