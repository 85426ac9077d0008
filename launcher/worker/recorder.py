"""Records what a training run holds of one kind of memory, block by block, and what each block was for.

torch tells of every allocation and release, also those inside kernels (see `launcher.worker.events`). What each block is
for follows from where in the step it was taken, and from the live objects that lie in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

import torch
from transformers import Trainer

from launcher.memory import TRAINING, Category, Phase, Region, Timeline, last_step
from launcher.regions import RegionWatch
from launcher.run_record import WORKER_MARK
from launcher.worker.account import Account, AccountedPeak
from launcher.worker.events import Change, EventSource
from launcher.worker.residents import distinct_storages
from launcher.worker.unseen import Notes, WatchedTensors

METERED_STEPS = 2
"""Optimizer steps that are recorded: it is too dear for a whole run."""


class Recorder:
    """Keeps the account of a device's memory, while it is on.

    Args:
        events: What tells of the allocator.
        open_account: Fills an account with what is held as recording begins.
        close_account: Has the last word on an account's blocks as recording ends.
        residents: What the run's lasting tensors are for, asked at the borders of phases.
        while_recording: Makes the context in which recording happens.
        passes: Forward passes of each phase after which recording stops; without an entry it goes on.
    """

    def __init__(
        self,
        events: EventSource,
        open_account: Callable[[Account, WatchedTensors], None],
        residents: Callable[[], Mapping[Category, Sequence[torch.Tensor]]],
        *,
        close_account: Callable[[Account], None] = lambda account: None,
        while_recording: Callable[[], AbstractContextManager[None]] = nullcontext,
        passes: Mapping[Phase, int] | None = None,
    ) -> None:
        self._events = events
        self._is_on = False
        self._open_account = open_account
        self._close_account = close_account
        self._residents = residents
        self._context = while_recording
        self._passes = passes or {}
        self._while_recording = ExitStack()
        self._account = Account(Phase.LOAD)
        self._notes = Notes(events.mark)
        self._watched = WatchedTensors(self._notes)
        self._regions = RegionWatch(self._enter_region, self.mark_residents)
        self._phase = Phase.LOAD
        self._passed = 0
        self._seen: set[Phase] = set()
        self._history: list[Account] = []  # back to where the last recorded step began
        self.peaks: dict[Phase, AccountedPeak] = {}
        """The highest moment of every phase so far."""
        self.step: Timeline | None = None
        """The last optimizer step that was recorded."""

    @property
    def is_on(self) -> bool:
        """Whether it records."""
        return self._is_on

    def listen(self, trainer: Trainer) -> None:
        """Follows the passes of a trainer's model; before it trains."""
        self._regions.listen(trainer)
        self.mark_residents()  # an engine will put others in their place

    def enter(self, phase: Phase, steps: int, *, begins_anew: bool = False) -> None:
        """A phase begins: recording starts, goes on or ends.

        The first steps are recorded, and of every other phase the first time.

        Args:
            phase: The phase.
            steps: Optimizer steps finished so far.
            begins_anew: Whether the account of this phase must not rest on that of the one before.
        """
        is_early = steps < METERED_STEPS
        in_step = phase in TRAINING
        wanted = is_early or (not in_step and phase not in self._seen)
        self.mark_residents()
        if self.is_on and (begins_anew or not wanted):
            self.fold()
        self._phase, self._passed = phase, 0
        if not self.is_on and wanted:
            self.start(phase)
        self._regions.region = Region.OUTSIDE
        if self.is_on:
            self._notes.write(lambda account: account.enter_phase(phase))
            self._seen.add(phase)

    def has_seen(self, phase: Phase) -> bool:
        """Whether a phase was recorded before."""
        return phase in self._seen

    def receive(self, batch: Iterable[torch.Tensor]) -> None:
        """The loader hands over a batch."""
        if self.is_on and (tensors := list(batch)):
            self._watched.receive(tensors)
            addresses = addresses_of(tensors)
            self._notes.write(lambda account: account.mark(addresses, Category.INPUTS))

    def mark_residents(self) -> None:
        """Says what the lasting tensors of this moment are for."""
        if self.is_on:
            for category, addresses in self._resident_addresses():
                self._notes.write(partial(Account.mark, addresses=addresses, category=category))

    def start(self, phase: Phase) -> None:
        """Begins to record, where nothing stands against it."""
        self._account, self._notes = Account(phase), Notes(self._events.mark)
        self._watched = WatchedTensors(self._notes)
        self._open_account(self._account, self._watched)
        for category, addresses in self._resident_addresses():
            self._account.mark(addresses, category)
        self._account.open()
        self._is_on = self._events.start()
        if self._is_on:
            self._while_recording.enter_context(self._context())

    def stop(self) -> Account:
        """Ends the recording: what was held, moment by moment, since it began."""
        self._while_recording.close()
        self._is_on = False
        events = self._events.stop()
        account, notes = self._account, self._notes
        self._account, self._notes = Account(self._phase), Notes(self._events.mark)
        self._watched = WatchedTensors(self._notes)
        for event in events:
            if not isinstance(event, Change):
                notes.read(event, account)
            elif event.num_bytes > 0:
                account.take(event.address, event.num_bytes)
            else:
                account.give_back(event.address, -event.num_bytes)
        self._close_account(account)
        return account

    def fold(self) -> None:
        """Ends the recording and adds what was seen to the peaks, or says that there is no room to read it.

        The account of a step is megabytes of Python's objects, of which the training needs none: a run that has come
        this far is not ended for them.
        """
        try:
            self._fold(self.stop())
        except MemoryError:
            sys.stderr.write(
                f"{WORKER_MARK}no memory to read the meter: these phases have no measured peak\n"
            )

    def abandon(self) -> None:
        """Ends the recording, and reads nothing."""
        if self.is_on:
            self._while_recording.close()
            self._is_on = False
            self._events.abandon()

    def _enter_region(self, region: Region) -> None:
        if not self.is_on:
            return
        if region is Region.BACKBONE:
            if self._passed == self._passes.get(self._phase):
                self.fold()  # the passes to come are like those before
                return
            self._passed += 1
        self._notes.write(lambda account: account.enter_region(region))

    def _resident_addresses(self) -> list[tuple[Category, list[int]]]:
        return [(category, addresses_of(tensors)) for category, tensors in self._residents().items()]

    def _fold(self, account: Account) -> None:
        for phase, peak in account.peaks().items():
            seen = self.peaks.get(phase)
            if seen is None or peak.allocated_bytes > seen.allocated_bytes:
                self.peaks[phase] = peak
        self._history.append(account)
        if Phase.OPTIMIZER_STEP in account.phases:
            totals = [total for known in self._history for total in known.totals]
            self.step = last_step(totals, [phase for known in self._history for phase in known.phases])
            self._history = [account]  # in which the next step may have begun


def addresses_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Where the storages behind tensors begin."""
    return [storage.data_ptr() for storage in distinct_storages(tensors)]
