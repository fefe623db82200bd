"""The floor that every speaker of the contract stands on: errors, ids, TLS, connections."""
