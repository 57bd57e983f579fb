"""The figures of one device, taken once and shown everywhere: list, JSON, mm_stat, varlink.

Names and meanings are zram's (Documentation/admin-guide/blockdev/zram.rst). Where ours differ:
`mem_used_total` is all that the arena occupies, the slot table included, and is what `mem_limit`
limits; `orig_data_size` counts same-filled pages, as current kernels do.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Statistics:
    """One device at one moment. Sizes are bytes; page counts are 4 KiB pages."""

    name: str
    disksize: int
    """0 while the device is not initialised."""
    algorithm: str
    """The chosen compressor as a user would type it: `lz4`, `zstd(level=3)`."""
    streams: int
    """Threads that may compress at the same time."""
    orig_data_size: int
    compr_data_size: int
    mem_used_total: int
    mem_limit: int
    """0 where there is no limit."""
    mem_used_max: int
    mem_reserved: int
    """What is preallocated, whether it is used or not; 0 where memory is taken as it is needed."""
    same_pages: int
    pages_compacted: int
    huge_pages: int
    huge_pages_since: int
    failed_reads: int
    failed_writes: int
    invalid_io: int
    notify_free: int
    openers: tuple[str, ...]
    """Who holds the device open, each in a few words."""
    in_flight: tuple[str, ...]
    """Whose requests are under way, one entry for each: whom a reset waits for."""

    def mm_stat(self) -> str:
        """The line of /sys/block/zramN/mm_stat, widths included (zram_drv.c, mm_stat_show)."""
        return (
            f"{self.orig_data_size:8} {self.compr_data_size:8} {self.mem_used_total:8}"
            f" {self.mem_limit:8} {self.mem_used_max:8} {self.same_pages:8}"
            f" {self.pages_compacted:8} {self.huge_pages:8} {self.huge_pages_since:8}"
        )

    def io_stat(self) -> str:
        """The line of /sys/block/zramN/io_stat; the third column is our invalid_io."""
        return (
            f"{self.failed_reads:8} {self.failed_writes:8} {self.invalid_io:8} {self.notify_free:8}"
        )
