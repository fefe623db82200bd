"""The conductor: the workflows of instances, and the sessions with hosts."""
