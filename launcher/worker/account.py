"""The meter's account: blocks of memory in the order in which they came and went, and what they were for.

It knows nothing of torch: it is told of addresses and bytes, phases and regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from launcher.memory import RESIDENT, Category, Phase, Region, category_of, settle_region


@dataclass(slots=True)
class HeldBlock:
    """A block of memory, from the moment when it is taken."""

    num_bytes: int
    address: int | None
    region: Region
    category: Category | None = None
    born: int = 0
    """The moment when it was taken."""
    gone: int | None = None
    """The moment when it was given back; None while it is held."""


@dataclass(frozen=True)
class AccountedPeak:
    """The highest moment of a phase."""

    allocated_bytes: int
    by_category_bytes: Mapping[Category, int]
    """Sums to `allocated_bytes`."""


class Account:
    """Adds up what is held, moment by moment.

    Args:
        phase: The phase in which it begins.
    """

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._region = Region.OUTSIDE
        self._blocks: list[HeldBlock] = []
        self._held: dict[int, HeldBlock] = {}
        self._nameless: list[HeldBlock] = []
        self._total = 0
        self.totals: list[int] = []
        """Bytes held at every moment."""
        self.phases: list[Phase] = []
        """The phase of every moment."""

    def take(self, address: int | None, num_bytes: int, category: Category | None = None) -> HeldBlock:
        """A block is taken; None for an address that nobody knows.

        What was at the address before is gone, whether or not anybody said so.
        """
        if address in self._held:
            self.drop(self._held[address])
        block = HeldBlock(num_bytes, address, self._region, category, len(self.totals))
        self._blocks.append(block)
        if address is not None:
            self._held[address] = block
        self._change(num_bytes)
        return block

    def open(self) -> None:
        """What is held now was there before: the account's first moment is this one."""
        for block in self._held.values():
            block.born = 0
        for block in self._nameless:
            block.born = 0
        self._blocks = [*self._held.values(), *self._nameless]
        self.totals, self.phases = [self._total], [self._phase]

    def mark_buckets(self, sizes_bytes: Iterable[int]) -> list[int]:
        """Buckets that gradients are views of are held, nobody knows where: they are blocks of their size.

        Args:
            sizes_bytes: Of the buckets.

        Returns:
            The sizes of those that are not held.
        """
        unseen = Counter(sizes_bytes)
        for block in self._held.values():
            if block.category in (None, Category.GRADIENTS) and unseen[block.num_bytes] > 0:
                block.category = Category.GRADIENTS
                unseen[block.num_bytes] -= 1
        return list(unseen.elements())

    def hold_buckets(self, sizes_bytes: Iterable[int]) -> None:
        """The same, and those that are not held are taken."""
        self._nameless += [
            self.take(None, size, Category.GRADIENTS) for size in self.mark_buckets(sizes_bytes)
        ]

    def claim(self, known: Container[int], category: Category) -> None:
        """Says what those blocks are for that are held still, at none of the known addresses."""
        for address, block in self._held.items():
            if address not in known and block.category not in RESIDENT:
                block.category = category

    def give_back(self, address: int, num_bytes: int) -> None:
        """A block is given back: the one at the address, or one of its size of which nobody knew the address.

        Of what was never counted nothing changes.
        """
        block = self._held.get(address)
        if block is None:
            block = next((block for block in self._nameless if block.num_bytes == num_bytes), None)
            if block is not None:
                self._nameless.remove(block)
        if block is not None:
            self.drop(block)

    def drop(self, block: HeldBlock) -> None:
        """A block is given back, if it was not before."""
        if block.gone is None:
            block.gone = len(self.totals)
            if block.address is not None:
                del self._held[block.address]
            self._change(-block.num_bytes)

    def enter_phase(self, phase: Phase) -> None:
        """A phase begins, outside of every region."""
        self._phase = phase
        self._region = Region.OUTSIDE
        self._change(0)

    def enter_region(self, region: Region) -> None:
        """A region begins, and another ends."""
        settle_region(self._held.values(), self._region)
        self._region = region

    def mark(self, addresses: Iterable[int], category: Category) -> None:
        """Says what blocks are for, for all the time that they are held; the first word counts."""
        for address in addresses:
            block = self._held.get(address)
            if block is not None and block.category is None:
                block.category = category

    def peaks(self) -> dict[Phase, AccountedPeak]:
        """The highest moment of every phase, the first of equals."""
        highest: dict[Phase, int] = {}
        for moment, (total, phase) in enumerate(zip(self.totals, self.phases, strict=True)):
            if phase not in highest or total > self.totals[highest[phase]]:
                highest[phase] = moment
        return {phase: self._peak(moment) for phase, moment in highest.items()}

    def _peak(self, moment: int) -> AccountedPeak:
        sizes: Counter[Category] = Counter()
        for block in self._blocks:
            if block.born <= moment and (block.gone is None or moment < block.gone):
                sizes[category_of(block.category, block.region)] += block.num_bytes
        return AccountedPeak(self.totals[moment], dict(sizes))

    def _change(self, num_bytes: int) -> None:
        self._total += num_bytes
        self.totals.append(self._total)
        self.phases.append(self._phase)
