"""A device as a service: its place on the machine (runtime) and the process that serves it."""
