"""The compute API: instances, flavors, key pairs, hosts and quotas."""
