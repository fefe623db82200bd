"""The host side: one program, mcloud-agent, with a part for each kind of thing on a host."""
