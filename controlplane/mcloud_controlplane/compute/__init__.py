"""The compute API: instances, flavors, key pairs, server groups, hosts and quotas."""
