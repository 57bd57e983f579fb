"""The compressed-page store: an arena of mapped memory with a slot table and a pool of objects.

`pages.Pages` is the way in: read, write and discard of byte ranges. It knows nothing of devices,
requests or NBD. `arena` is the memory, `header` its first page, `table` the word per slot, `pool`
the size classes and spans, `zcomp` the compressors. `recovery` goes on with the arena of a process
that has ended, `saving` makes a snapshot of one in use, and `image` is the form of both at rest.
"""

PAGE = 4096
"""Bytes of a page: the unit of compression, as in zram on every machine with 4 KiB pages."""

SPAN = 65536
"""Bytes of a span: 16 raw pages; large enough that punching a hole (about 3 us) is rare."""
