"""Rooms of a community house: who has which room when, what is free, and who pays what.

Times are minutes since midnight; a slot is (start, end), from start until just before end.
"""

import calendar
import datetime

EVENING = 18 * 60
SURCHARGE = 50  # percent


def overlap(one, other):
    """Whether two slots share a minute. One may begin at the minute at which the other ends."""
    return one[0] <= other[1] and other[0] <= one[1]


def merge(slots):
    """The same minutes in as few slots as possible, in order; slots that touch become one."""
    merged = []
    for start, end in sorted(slots):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def free(slots, opens, closes):
    """The slots between opens and closes that none of the given ones touches, in order."""
    found = []
    cursor = opens
    for start, end in merge(slots):
        if cursor < start and cursor < closes:
            found.append((cursor, min(start, closes)))
        cursor = max(cursor, end)
    if cursor < closes:
        found.append((cursor, closes))
    return found


def rooms_needed(slots):
    """The largest number of slots that go on at the same minute."""
    changes = [(start, 1) for start, _ in slots] + [(end, -1) for _, end in slots]
    most = 0
    now = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        most = max(most, now)
    return most


def add_months(date, months):
    """The same day of a later month, or the month's last day where it is shorter."""
    number = date.year * 12 + date.month - 1 + months
    year, month = number // 12, number % 12 + 1
    return datetime.date(year, month, min(date.day, calendar.monthrange(year, month)[1]))


def monthly(first, count):
    """`count` dates, a month apart, all on the day of the first or on the last day of a shorter month."""
    dates = [first]
    while len(dates) < count:
        dates.append(add_months(dates[-1], 1))
    return dates[:count]


def share(cents, weights):
    """A bill in whole cents by weight; the sum is the bill. What rounding down leaves goes, a cent each, to the largest
    remainders, the earlier one first."""
    total = sum(weights)
    return [round(cents * weight / total) for weight in weights]


def price(slot, hourly, surcharge=None):
    """Cents: every begun quarter of an hour by the hourly price, those that begin in the evening plus a surcharge in
    percent (None: the usual one). What is less than a cent at the end is dropped."""
    if not surcharge:
        surcharge = SURCHARGE
    total = 0
    for minute in range(slot[0], slot[1], 15):
        percent = 100 + surcharge if minute >= EVENING else 100
        total += hourly * percent
    return total // 400


class Calendar:
    """Bookings of one day: (room, slot, person)."""

    def __init__(self, bookings=[]):
        self.bookings = bookings

    def add(self, room, slot, person):
        """Books a room, or ValueError if somebody has it."""
        for name, other, _ in self.bookings:
            if name == room and overlap(slot, other):
                raise ValueError(f"room {room} is taken from minute {other[0]} to {other[1]}")
        self.bookings.append((room, slot, person))

    def cancel(self, person):
        """Takes out all that a person has booked; returns how many bookings that were."""
        before = len(self.bookings)
        for booking in self.bookings:
            if booking[2] == person:
                self.bookings.remove(booking)
        return before - len(self.bookings)
