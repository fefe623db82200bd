"""The network service: networks, addresses, ports, groups, routers, and each host's dataplane."""
