"""The scheduler: filters and weighs hosts, and claims one."""
