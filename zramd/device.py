"""Zram: one device: its initialisation, its reset, its snapshots.

All front ends talk to this and to nothing below it; I/O goes through the `Opener` that `open`
gives.

Init (`init`, what writing disksize does), under init_lock:
1. Initialised already: DeviceBusy, before anything is allocated. Zero or senseless: BadValue.
2. Build meta (arena, table, pool, comp) aside. A failure leaves the device as it was.
3. Tell who keeps arenas (`on_arena`): what is written from now on can be adopted after a crash.
4. Publish it; then, last, open the gate.

Adopt (`adopt`, and `load` of a file) is an init of which move 2 takes an arena whose process has
ended, with all that the arena says of its device. `restore` is one that makes such an arena of a
snapshot.

Reset (`reset`), one at a time:
1. Claim. Open, or being reset: DeviceBusy naming who is in the way, nothing changed. With force, go
   on, after a reset under way. From here on there are no new openers.
2. Close the gate, under init_lock. New requests get EIO.
3. Drain: wait for the requests inside, each once. Interrupted, open the gate again: nothing is lost
   yet. Then close the openers for good: the gate will open again, for a generation that is not
   theirs.
4. Free meta and comp, a file of the user's too, unless this is the end of the device (`close`),
   which seals that; clear limits, parameters and statistics; tell who keeps arenas to drop his,
   which is what frees the memory then. A re-init waits on init_lock meanwhile, so two tables never
   exist at once. Killed before he is told, the reset has not been.
5. Drop init_lock and tell the outside world (`on_reset`): connections end. The claim still stands:
   whoever has opened the device by now is of the generation that has ended.
6. Drop the claim.

Lock order: reset_lock, init_lock, then openers, then what the store has. I/O takes none of the
first three. Meta is touched inside the gate or under init_lock only.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from zramd import heap, sizes
from zramd.errors import BadArena, BadValue, DeviceBusy, NoMemory, NotInitialised
from zramd.gate import Gate
from zramd.opener import IoCounts, Opener
from zramd.statistics import Statistics
from zramd.store import PAGE
from zramd.store.arena import Arena, default_mem_limit, remove
from zramd.store.image import find, unpack, unseal
from zramd.store.pages import Counters, Pages
from zramd.store.recovery import recover
from zramd.store.zcomp import Algorithm, Comp

DEFAULT_ALGORITHM: Final = Algorithm("lz4")
"""lz4 costs a third of zstd's time per page; people who want the ratio say so."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an init goes by, until a reset brings the defaults back."""

    algorithm: str = str(DEFAULT_ALGORITHM)
    mem_limit: int = 0
    prealloc: bool = False


class Zram:
    """A device called `name`, not initialised. Any number of threads may call. `path`: its arenas
    are kept in this file of the user's, and not in memory."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name = name
        self._path = None if path is None else Path(os.path.realpath(path))
        self.on_reset: list[Callable[[], None]] = []
        """Called by a reset that has closed openers when all is freed, in its thread, before anyone
        can open the device again. They must not block, and not call the device."""
        self.on_arena: Callable[[int | None], None] = _keep_nothing
        """Called by `init` with the descriptor of the new arena, to be duplicated by whoever wants
        it to outlive this process, and by a reset with None, when the arena is freed. It must not
        call the device. What it raises in `init` ends that, the device as it was; in a reset it
        must not raise."""
        self.on_settings: Callable[[Settings], None] = lambda _: None
        """Called with what the next init will go by, when that has changed, and by a reset before
        `on_arena` is. As that, it must not call the device; nor may it raise."""
        self._gate = Gate()
        self._reset_lock = threading.Lock()  # held by the one who resets
        self._init_lock = threading.Lock()  # protects initialisation: meta, algorithm, limit
        self._meta: Pages | None = None
        self._disksize = 0
        self._algorithm = DEFAULT_ALGORITHM
        self._mem_limit = 0
        self._reserved_limit = 0  # what the mem_limit was that meta has reserved
        self._prealloc = False
        self._openers_lock = threading.Lock()  # protects the two below
        self._openers: list[Opener] = []
        self._claimed = False
        self._io = IoCounts()

    @property
    def disksize(self) -> int:
        """Bytes; 0 while the device is not initialised."""
        return self._disksize

    def init(self, disksize: int) -> None:
        """Give the device `disksize` bytes, rounded up to a page.

        Raises DeviceBusy, BadValue, NoMemory; the device is then as it was before.
        """
        with self._init_lock:
            self._must_be_new()
            if disksize <= 0:
                raise BadValue(
                    f"a disksize of {disksize} is senseless", hint="give it a size such as 1G"
                )
            disksize = -(-disksize // PAGE) * PAGE
            try:
                comp = Comp(self._algorithm)
                limit = self._mem_limit
                if self._prealloc and not limit:
                    limit = default_mem_limit(disksize)
                arena = Arena(
                    *(disksize, str(self._algorithm)),
                    limit=limit,
                    reserve=self._prealloc,
                    path=self._path,
                )
                try:
                    meta = Pages(arena, comp)
                    self.on_arena(arena.fd)
                except BaseException:
                    arena.close()
                    raise
            except MemoryError as error:
                raise NoMemory(f"no memory for a device of {sizes.human(disksize)}") from error
            self._disksize, self._mem_limit = disksize, limit
            self._reserved_limit = limit if self._prealloc else 0
            self._publish_locked(meta)

    def adopt(self, fd: int) -> list[int]:
        """Go on with the arena that `fd` is open on, whose process has ended: content, disksize,
        algorithm, limits and statistics are its own. Nobody else may use it.

        Returns the slots whose content was damaged, ascending: their pages read as Corrupt until
        they are overwritten as a whole or discarded. None, where the memory is intact. From then on
        the descriptor is the device's, which closes it.

        Raises DeviceBusy, BadArena, NoMemory, and BadValue for an algorithm that is not known here.
        Device and arena are then as they were before, and the descriptor is the caller's.
        """
        with self._init_lock:
            self._must_be_new()
            return self._adopt_locked(fd, lambda _: None)

    def load(self, wait_s: float = 0) -> list[int] | None:
        """Go on with what is in the device's file; None where there is no such file. Waits so long
        for another server of it to end.

        Returns and raises what `adopt` does, DeviceBusy also where that server does not end.
        """
        with self._init_lock:
            self._must_be_new()
            assert self._path is not None, "the device has a file"
            try:
                fd = find(self._path, wait_s)
            except BadArena as error:
                raise error.of(self._path) from error
            if fd is None:
                return None
            try:
                return self._adopt_locked(fd, self.on_arena)
            except BaseException:
                os.close(fd)
                raise

    def restore(self, fd: int) -> list[int]:
        """Give the device the content of the snapshot that the file `fd` has, and all else that an
        arena says of its device. The file's position tells how far this is.

        Returns and raises what `adopt` does; the descriptor stays the caller's.
        """
        with self._init_lock:
            self._must_be_new()
            arena = unpack(fd, self._path)
            try:
                return self._adopt_locked(arena, self.on_arena)
            except BaseException:
                if self._path is not None:
                    remove(arena, self._path)
                os.close(arena)
                raise

    def _adopt_locked(self, fd: int, tell: Callable[[int | None], None]) -> list[int]:
        """`tell`: who keeps arenas, where he has it not."""
        try:
            arena = Arena.adopt(fd)
            try:
                algorithm = Algorithm.parse(arena.header.algorithm)
                comp = Comp(algorithm)
                tell(arena.fd)
                try:
                    unseal(arena)  # the last that fails for other reasons than a want of memory
                    meta, lost = recover(arena, comp)
                except BaseException:
                    tell(None)
                    raise
            except BaseException:
                arena.close(keep=True)
                raise
        except MemoryError as error:
            raise NoMemory("no memory to recover a device") from error
        self._algorithm = algorithm
        self._disksize, self._mem_limit = arena.header.disksize, arena.limit
        self._reserved_limit = arena.header.reserved_limit
        self._prealloc = arena.reserved > 0
        self._publish_locked(meta)
        os.close(fd)  # the arena has its own
        return lost

    def _must_be_new(self) -> None:
        if self._meta is not None:
            raise DeviceBusy(
                f"{self.name} is initialised already, with a disksize of {self.disksize}",
                hint=f"to change it, reset the device first: zramd reset {self.name}",
            )

    def _publish_locked(self, meta: Pages) -> None:
        meta.checkpoint = partial(_must_be_open, self._gate)
        self._io = IoCounts.kept_in(meta.arena.figures)
        self._meta = meta
        self._gate.open()

    def reset(self, *, force: bool = False) -> None:
        """Back to the state before init: no content, no limit, the default algorithm.

        Raises DeviceBusy when the device is open or being reset, unless `force`.
        """
        self._reset(force, keep=False)

    def close(self, *, force: bool = True) -> None:
        """The end of the device: a reset, but that a file of the user's stays, sealed, so that
        another device can `load` it. Raises what `reset` does, and SaveFailed where the file is
        good for this run of the machine only."""
        self._reset(force, keep=True)

    def _reset(self, force: bool, *, keep: bool) -> None:
        if not self._reset_lock.acquire(blocking=force):
            inside = ", ".join(sorted(self._gate.inside()))
            waits = f" and waits for requests of {inside}" if inside else ""
            raise DeviceBusy(
                f"{self.name} is being reset{waits}", hint="try again when that has ended"
            )
        try:
            self._claim(force)
            try:
                with self._init_lock:
                    closed = self._deinit_locked(keep)
                for tell in self.on_reset if closed else ():
                    tell()
            finally:
                self._claimed = False
        finally:
            self._reset_lock.release()

    def _deinit_locked(self, keep: bool) -> int:
        """The inverse of `init`, moves 2 to 4; how many openers it has closed."""
        closed = 0
        meta = self._meta
        if meta is not None:
            self._gate.close()
            try:
                self._gate.drain()
            except BaseException:
                self._gate.open()
                raise
            closed = self._close_openers()
        self._meta, self._disksize = None, 0
        self._algorithm = DEFAULT_ALGORITHM
        self._mem_limit, self._prealloc = 0, False
        self._io = IoCounts()
        if meta is not None:
            try:
                meta.close(keep=keep)
            finally:
                heap.trim()
                self._tell_settings_locked()
                self.on_arena(None)
        return closed

    def _claim(self, force: bool) -> None:
        with self._openers_lock:
            if self._openers and not force:
                times = Counter(opener.who for opener in self._openers)
                holders = [who if n == 1 else f"{who} ({n} times)" for who, n in times.items()]
                raise DeviceBusy(
                    f"{self.name} is in use by {', '.join(holders)}",
                    hint="detach it or end these connections first,"
                    f" or lose what it holds: zramd reset {self.name} --force",
                )
            self._claimed = True

    def _close_openers(self) -> int:
        with self._openers_lock:
            closed, self._openers = self._openers, []
            for opener in closed:
                opener.closed = True
        return len(closed)

    def _let_go(self, opener: Opener) -> None:
        with self._openers_lock:
            if opener in self._openers:
                self._openers.remove(opener)

    def forked(self) -> None:
        """To be called by the child of a fork that goes on with the device: what is preallocated is
        locked for it, too. Raises NoMemory."""
        with self._init_lock:
            if self._meta is not None and self._meta.arena.reserved:
                self._meta.arena.hold()

    def open(self, who: str) -> Opener:
        """Open the device for I/O; `who` names the holder in a few words.

        Raises NotInitialised without a disksize, DeviceBusy while a reset is under way.
        """
        with self._openers_lock:
            if self._claimed:
                raise DeviceBusy(f"{self.name} is being reset", hint="try again in a moment")
            meta = self._meta
            if meta is None or not self._gate.init_done:
                raise NotInitialised(
                    f"{self.name} has no disksize yet",
                    hint=f"set one: zramd set {self.name} disksize 1G",
                )
            opener = Opener(who, self._disksize, self._gate, meta, self._io, self._let_go)
            self._openers.append(opener)
            return opener

    @property
    def description(self) -> str:
        """What clients are told of the export, in a few words."""
        now = self.statistics()
        return f"zramd, {sizes.human(now.disksize)}, {now.algorithm}"

    def statistics(self) -> Statistics:
        """The figures of this moment; zeros where the device is not initialised."""
        counters, used, used_max, reserved, disksize = Counters(), 0, 0, 0, 0
        try:
            record = self._gate.enter("statistics")
        except NotInitialised:
            pass
        else:
            try:
                meta = self._meta
                assert meta is not None, "the gate is open, so meta is published"
                counters = meta.snapshot()
                used, used_max = meta.arena.used, meta.arena.used_max
                reserved = meta.arena.reserved
                disksize = self._disksize
            finally:
                self._gate.leave(record)
        with self._openers_lock:
            openers = tuple(opener.who for opener in self._openers)
        io = self._io
        return Statistics(
            name=self.name,
            disksize=disksize,
            algorithm=str(self._algorithm),
            streams=_cpus(),
            orig_data_size=counters.pages * PAGE,
            compr_data_size=counters.compressed_bytes,
            mem_used_total=used,
            mem_limit=self._mem_limit,
            mem_used_max=used_max,
            mem_reserved=reserved,
            same_pages=counters.same,
            pages_compacted=counters.compacted,
            huge_pages=counters.huge,
            huge_pages_since=counters.huge_since,
            failed_reads=io.failed_reads,
            failed_writes=io.failed_writes,
            invalid_io=io.invalid_io,
            notify_free=io.notify_free,
            openers=openers,
            in_flight=tuple(sorted(self._gate.inside())),
        )

    @property
    def sparse(self) -> bool:
        """Whether `compact` would give back much; what a background task asks now and then."""
        try:
            record = self._gate.enter("a look")
        except NotInitialised:
            return False
        try:
            meta = self._meta
            assert meta is not None, "the gate is open, so meta is published"
            return meta.sparse
        finally:
            self._gate.leave(record)

    def compact(self) -> None:
        """Move what is stored together, so that memory goes back to the system.

        A request like any other, but that it ends when a reset comes, within 128 slots, with
        NotInitialised, and nothing is wrong then. Raises BadValue without a disksize.
        """
        try:
            record = self._gate.enter("compact")
        except NotInitialised:
            raise BadValue(
                f"{self.name} has no disksize yet: there is nothing to compact"
            ) from None
        try:
            meta = self._meta
            assert meta is not None, "the gate is open, so meta is published"
            meta.compact()
        finally:
            self._gate.leave(record)

    def save(self, fd: int, must_go_on: Callable[[], None] = lambda: None) -> None:
        """Write a snapshot, all that is stored now, to the file `fd`, from its beginning on, while
        I/O goes on. It is good when this returns, but not yet on the disk. `must_go_on` is called
        now and then, and ends it by what it raises.

        A request like any other, but that a reset ends it, with NotInitialised. Raises BadValue
        without a disksize, DeviceBusy while another is made, SaveFailed, also where the device is
        full, and waiting for this would stop it.
        """
        try:
            record = self._gate.enter("save")
        except NotInitialised:
            raise BadValue(f"{self.name} has no disksize yet: there is nothing to save") from None
        try:
            meta = self._meta
            assert meta is not None, "the gate is open, so meta is published"
            meta.save(fd, must_go_on)
        finally:
            self._gate.leave(record)

    def end_saving(self, why: str) -> None:
        """Have the snapshot that is made, if one is, fail with this reason."""
        try:
            record = self._gate.enter("a look")
        except NotInitialised:
            return
        try:
            meta = self._meta
            assert meta is not None, "the gate is open, so meta is published"
            meta.end_saving(why)
        finally:
            self._gate.leave(record)

    # What can be set

    @property
    def algorithm(self) -> Algorithm:
        """The compressor that is used, or will be."""
        return self._algorithm

    def choose(self, attribute: str, change: Callable[[Algorithm], Algorithm]) -> None:
        """Have the compressor that `change` makes of the one chosen. Raises what it raises, and
        DeviceBusy, naming the `attribute`, where there is a disksize."""
        with self._init_lock:
            self._must_not_be_initialised(attribute)
            self._algorithm = change(self._algorithm)
            self._tell_settings_locked()

    @property
    def prealloc(self) -> bool:
        """Whether all of mem_limit is taken at once."""
        return self._prealloc

    @prealloc.setter
    def prealloc(self, prealloc: bool) -> None:
        with self._init_lock:
            self._must_not_be_initialised("prealloc")
            self._prealloc = prealloc
            self._tell_settings_locked()

    def _must_not_be_initialised(self, attribute: str) -> None:
        if self._meta is not None:
            raise DeviceBusy(
                f"{attribute} cannot change while {self.name} is initialised",
                hint=f"reset it first (its content is lost): zramd reset {self.name}",
            )

    def limit(self, limit: int) -> None:
        """Take no more than so many bytes, rounded up to a page, of memory; 0 for no limit. Raises
        BadValue where that is more than is preallocated."""
        limit = -(-limit // PAGE) * PAGE
        with self._init_lock:
            if self._meta is not None:
                most = self._reserved_limit
                if most and not 0 < limit <= most:
                    raise BadValue(
                        f"{self.name} has {sizes.human(most)} preallocated, and no more than"
                        " that can be its mem_limit",
                        hint="to preallocate another size, reset it and set mem_limit first",
                    )
                self._meta.arena.limit = limit
            self._mem_limit = limit
            if self._meta is None:
                self._tell_settings_locked()

    def _tell_settings_locked(self) -> None:
        self.on_settings(Settings(str(self._algorithm), self._mem_limit, self._prealloc))

    def forget_used_max(self) -> None:
        """Let the peak of what is used be what is used now."""
        with self._init_lock:
            if self._meta is not None:
                self._meta.arena.forget_used_max()


def _keep_nothing(_fd: int | None) -> None:
    """No arena outlives this process."""


def _must_be_open(gate: Gate) -> None:
    """What takes long inside `gate` looks here whether somebody waits for it."""
    if not gate.init_done:
        raise NotInitialised("the device is being reset", hint="try again when that has ended")


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
