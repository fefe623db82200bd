"""Block storage of one host: volumes as files, each served over NBD and TLS to its clients only."""
