"""Hypervisor hosts on one machine: what `scripts/lab` is made of.

    the machine's namespace      PREFIX-switch            a host: its own net, mount, PID, UTS
    +--------------------+      +------------+           +--------------------------------------+
    | eth0 <- masquerade |      |   bridge   |           | br-ex 10.99.0.11, guests' routers    |
    | mcl0 ==============|======|= uplink    |           |   | libvirtd, QEMU, dnsmasq, agent … |
    |   10.99.0.1        |      |      h1 ===|===========|= eth0                                |
    |   172.24.4.1       |      |      h2 …  |           | /etc/libvirt, /run, … of its own     |
    +--------------------+      +------------+           +--------------------------------------+

kernel.py   namespaces, mounts and processes
machine.py  the few things that the machine's own namespace gets, each recorded before it is made
host.py     what a host looks like from inside: files, cable, libvirtd
lab.py      the lab: its settings, up, down, status
"""
