"""What the report does not say: properties of bookings.py on inputs nobody has seen, against a slow oracle. Frozen.

The oracle knows no cleverness: it looks at every minute of a short day, at every cent, at every day of the calendar. Each
check_ draws one input and returns the right answer and then that of the module, which could change what it was given.
"""

import datetime
import random

RNG = random.Random(random.SystemRandom().getrandbits(64))


def some_slots(most=6, day=24):
    return [tuple(sorted(RNG.sample(range(day), 2))) for _ in range(RNG.randint(0, most))]


def minutes_of(slots):
    return {minute for start, end in slots for minute in range(start, end)}


def as_slots(minutes):
    """The runs of a set of minutes."""
    starts = [minute for minute in sorted(minutes) if minute - 1 not in minutes]
    ends = [minute + 1 for minute in sorted(minutes) if minute + 1 not in minutes]
    return list(zip(starts, ends))


def month_later(date, months):
    """Day by day: the last date of the month that is wanted, and not of a later day of the month."""
    wanted = date.year * 12 + date.month + months
    dates = (date + datetime.timedelta(days=number) for number in range(28 * months, 31 * months + 1))
    return max(each for each in dates if each.year * 12 + each.month == wanted and each.day <= date.day)


def some_date():
    day = RNG.choice([1, 15, 28, 29, 30, 31])
    return datetime.date(RNG.randrange(2024, 2033), RNG.choice([1, 3, 5, 7, 8, 10, 12]), day)


def some_rows():
    return [(RNG.choice(["hall", "cellar"]), slot, RNG.choice(["Ada", "Bo", "Cleo"])) for slot in some_slots(8)]


def check_overlap_is_a_shared_minute(bookings):
    one, other = (tuple(sorted(RNG.sample(range(8), 2))) for _ in range(2))
    return bool(minutes_of([one]) & minutes_of([other])), bookings.overlap(one, other)


def check_merge_keeps_the_minutes(bookings):
    slots = some_slots()
    return as_slots(minutes_of(slots)), bookings.merge(slots)


def check_free_is_all_the_rest(bookings):
    slots = some_slots()
    opens, closes = sorted(RNG.sample(range(24), 2))
    return as_slots(set(range(opens, closes)) - minutes_of(slots)), bookings.free(slots, opens, closes)


def check_rooms_are_counted_by_the_minute(bookings):
    slots = some_slots()
    at_once = [sum(start <= minute < end for start, end in slots) for minute in range(24)]
    return max(at_once), bookings.rooms_needed(slots)


def check_months_day_by_day(bookings):
    date = some_date()
    months = RNG.randrange(15)
    return month_later(date, months), bookings.add_months(date, months)


def check_monthly_keeps_the_day(bookings):
    date = some_date()
    count = RNG.randrange(6)
    return [month_later(date, number) for number in range(count)], bookings.monthly(date, count)


def check_share_gives_cent_by_cent(bookings):
    """What is left after rounding down goes to whoever lacks most."""
    cents = RNG.randrange(2000)
    weights = [RNG.randint(1, 9) for _ in range(RNG.randint(1, 6))]
    parts = [cents * weight // sum(weights) for weight in weights]
    lack = [cents * weight % sum(weights) for weight in weights]
    for _ in range(cents - sum(parts)):
        index = lack.index(max(lack))
        parts[index] += 1
        lack[index] = -1
    return parts, bookings.share(cents, weights)


def check_price_quarter_by_quarter(bookings):
    start = RNG.randrange(1000, 1200)
    end = start + RNG.randrange(1, 200)
    hourly = RNG.randrange(2000)
    surcharge = RNG.choice([None, 0, 0, 10, 35])
    percent = 50 if surcharge is None else surcharge
    begun = [minute for minute in range(start, end) if (minute - start) % 15 == 0]
    cents = sum(hourly * (100 + percent * (minute >= 1080)) for minute in begun) // 400
    return cents, bookings.price((start, end), hourly, surcharge)


def check_calendars_have_nothing_in_common(bookings):
    slot = (RNG.randrange(50), 60)
    one = bookings.Calendar()
    one.add("hall", slot, "Ada")
    return [[("hall", slot, "Ada")], []], [one.bookings, bookings.Calendar().bookings]


def check_calendar_leaves_the_callers_list_alone(bookings):
    given = some_rows()
    before = list(given)
    one = bookings.Calendar(given)
    one.cancel("Ada")
    one.add("attic", (0, 1), "Dan")
    return before, given


def check_add_refuses_exactly_what_is_taken(bookings):
    rows = some_rows()
    one = bookings.Calendar(list(rows))
    slot = tuple(sorted(RNG.sample(range(24), 2)))
    taken = minutes_of(other for room, other, _ in rows if room == "hall") & minutes_of([slot])
    try:
        one.add("hall", slot, "Dan")
        refused = False
    except ValueError:
        refused = True
    return [bool(taken), rows if taken else [*rows, ("hall", slot, "Dan")]], [refused, one.bookings]


def check_cancel_takes_all_and_only_theirs(bookings):
    rows = some_rows()
    one = bookings.Calendar(list(rows))
    kept = [row for row in rows if row[2] != "Ada"]
    return [len(rows) - len(kept), kept], [one.cancel("Ada"), one.bookings]
