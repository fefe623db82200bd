"""Images: what instances are started from, their bytes, and who uses them."""
