"""Volumes: block devices, the hosts that store them, the instances that they are attached to."""
