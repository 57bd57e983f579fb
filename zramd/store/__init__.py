"""The compressed-page store: an arena of mapped memory with a slot table and a pool of objects.

`pages.Pages` is the way in: read, write and discard of byte ranges. It knows nothing of devices,
requests or NBD. `arena` is the memory and its header, `table` the word per slot, `pool` the size
classes and spans, `zcomp` the compressors.
"""

PAGE = 4096
"""Bytes of a page: the unit of compression, as in zram on every machine with 4 KiB pages."""
