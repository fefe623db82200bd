"""What every service stands on: its database, requests, operations, sessions, policy, listing."""
