"""The kernel's side of a device: its node (attach), and what the node is used for (use)."""
