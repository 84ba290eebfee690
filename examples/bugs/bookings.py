"""Rooms of a community house, by the minute: who has which room when, what is free, and who pays what.

Times are minutes since midnight, 0 to 1440; a booking is (start, end), from start until just before end.
"""

import datetime
import re
from collections import Counter

DAY = 24 * 60
EVENING = 18 * 60
SURCHARGE = 50  # percent


# == TIMES ==


def parse_time(text):
    """Minutes of "9:05" or "09:05"; "24:00" is the end of the day. ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,2}):(\d\d)", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is no time; write it as 9:05")
    minutes = int(match[1]) * 60 + int(match[2])
    if int(match[2]) > 59 or minutes > DAY:
        raise ValueError(f"{text!r} is no time of a day")
    return minutes


def format_time(minutes):
    """545 -> "09:05"."""
    return f"{minutes // 60:02}:{minutes % 60:02}"


def parse_slot(text):
    """ "9:00-10:30" -> (540, 630). ValueError if it ends before it has begun."""
    start, dash, end = text.partition("-")
    if not dash:
        raise ValueError(f"{text!r} is no slot; write it as 9:00-10:30")
    slot = (parse_time(start), parse_time(end))
    if slot[0] >= slot[1]:
        raise ValueError(f"{text!r} ends before it has begun")
    return slot


# == SLOTS ==


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


def first_free(slots, length, opens=0, closes=DAY, after=None):
    """The first slot of `length` minutes that is free and does not begin before `after` (None: at any time); None if
    there is none."""
    earliest = opens if after is None else max(opens, after)
    for start, end in free(slots, earliest, closes):
        if end - start >= length:
            return (start, start + length)
    return None


def rooms_needed(slots):
    """The largest number of slots that go on at the same minute."""
    changes = [(start, 1) for start, _ in slots] + [(end, -1) for _, end in slots]
    most = 0
    now = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        most = max(most, now)
    return most


# == DATES ==


def last_day(year, month):
    """Number of the month's last day."""
    following = datetime.date(year + month // 12, month % 12 + 1, 1)
    return (following - datetime.timedelta(days=1)).day


def add_months(date, months):
    """The same day of a later month, or the month's last day where it is shorter."""
    number = date.year * 12 + date.month - 1 + months
    year, month = number // 12, number % 12 + 1
    return datetime.date(year, month, min(date.day, last_day(year, month)))


def monthly(first, count):
    """`count` dates, a month apart, all on the day of the first or on the last day of a shorter month."""
    dates = [first]
    while len(dates) < count:
        dates.append(add_months(dates[-1], 1))
    return dates[:count]


def weekly(first, until, closed=()):
    """Every seventh day from first to until, both included, without the closed days."""
    closed = set(closed)
    dates = []
    while first <= until:
        if first not in closed:
            dates.append(first)
        first += datetime.timedelta(days=7)
    return dates


# == MONEY ==


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


# == CALENDAR ==


class Calendar:
    """Bookings of one day: (room, slot, person)."""

    def __init__(self, bookings=[]):
        self.bookings = bookings

    def add(self, room, slot, person):
        """Books a room, or ValueError if somebody has it."""
        for other in self.of_room(room):
            if overlap(slot, other):
                raise ValueError(f"room {room} is taken from {format_time(other[0])} to {format_time(other[1])}")
        self.bookings.append((room, slot, person))

    def of_room(self, room):
        """The room's slots, in order."""
        return sorted(slot for name, slot, _ in self.bookings if name == room)

    def of_person(self, person):
        return [(room, slot) for room, slot, name in self.bookings if name == person]

    def cancel(self, person):
        """Takes out all that a person has booked; returns how many bookings that were."""
        before = len(self.bookings)
        for booking in self.bookings:
            if booking[2] == person:
                self.bookings.remove(booking)
        return before - len(self.bookings)

    def minutes(self):
        """{person: minutes booked}, those with most first, by name where equal."""
        total = Counter()
        for _, (start, end), person in self.bookings:
            total[person] += end - start
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def rooms_for(self, slot, rooms):
        """Those of the rooms that are free all through a slot, in the order given."""
        return [room for room in rooms if not any(overlap(slot, other) for other in self.of_room(room))]
