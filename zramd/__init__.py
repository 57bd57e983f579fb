"""zramd: zram in user space.

A block device whose 4 KiB pages live compressed in RAM, served over NBD. `docs/design.md` says what
stands where; the modules below `zramd.device` know nothing of NBD, and those below `zramd.store`
nothing of devices. The Python modules are not an API; `zramd list --json` and the varlink interface
are.
"""

__version__ = "0.1.0"
