"""What the tests do not say: properties of bookings.py on inputs nobody has seen, against a slow oracle. Frozen.

The oracle knows no cleverness: it looks at every minute of a short day, at every cent, at every day of the calendar.
"""

import datetime
import json
import random

import bookings

RNG = random.Random(random.SystemRandom().getrandbits(64))
CASES = 200  # of each property; days are short and numbers small, so that borders meet often


def same(got, want):
    assert json.dumps(got, default=str) == json.dumps(want, default=str)


def some_slots(most=6, day=24):
    return [tuple(sorted(RNG.sample(range(day), 2))) for _ in range(RNG.randint(0, most))]


def minutes_of(slots):
    return {minute for start, end in slots for minute in range(start, end)}


def as_slots(minutes):
    """The runs of a set of minutes."""
    slots = []
    for minute in sorted(minutes):
        if slots and slots[-1][1] == minute:
            slots[-1][1] = minute + 1
        else:
            slots.append([minute, minute + 1])
    return slots


def some_date():
    return datetime.date(2024, 1, 1) + datetime.timedelta(days=RNG.randrange(3000))


def month_later(date, months):
    """Day by day: the last date of the month that is wanted, and not of a later day of the month."""
    wanted = date.year * 12 + date.month + months
    dates = (date.replace(day=1) + datetime.timedelta(days=number) for number in range(31 * months + 62))
    return max(each for each in dates if each.year * 12 + each.month == wanted and each.day <= date.day)


def is_refused(function, *arguments):
    try:
        function(*arguments)
    except ValueError:
        return True
    return False


def some_calendar():
    """A calendar filled by way of its constructor, and the list that it was given."""
    names = ["Ada", "Bo", "Cleo"]
    rows = [(RNG.choice(["hall", "cellar"]), slot, RNG.choice(names)) for slot in some_slots(8)]
    return bookings.Calendar(list(rows)), rows


# == PROPERTIES, called CASES times each ==


def check_times_come_back():
    minutes = RNG.randrange(1441)
    same(bookings.parse_time(bookings.format_time(minutes)), minutes)


def check_odd_times_are_refused():
    text = "".join(RNG.choices("0123456789:", weights=[2] * 10 + [12], k=RNG.randint(1, 5)))
    hour, colon, minute = text.partition(":")
    right = bool(colon) and len(hour) in (1, 2) and len(minute) == 2 and hour.isdigit() and minute.isdigit()
    right = right and int(minute) < 60 and int(hour) * 60 + int(minute) <= 1440
    same(is_refused(bookings.parse_time, text), not right)


def check_slots_are_read():
    start, end = RNG.randrange(1441), RNG.randrange(1441)
    text = f"{start // 60}:{start % 60:02}-{end // 60}:{end % 60:02}"
    if start < end:
        same(bookings.parse_slot(text), [start, end])
    else:
        same(is_refused(bookings.parse_slot, text), True)


def check_overlap_is_a_shared_minute():
    one, other = (tuple(sorted(RNG.sample(range(8), 2))) for _ in range(2))
    same(bookings.overlap(one, other), bool(minutes_of([one]) & minutes_of([other])))


def check_merge_keeps_the_minutes():
    slots = some_slots()
    same(bookings.merge(slots), as_slots(minutes_of(slots)))


def check_free_is_all_the_rest():
    slots = some_slots()
    opens, closes = sorted(RNG.sample(range(24), 2))
    same(bookings.free(slots, opens, closes), as_slots(set(range(opens, closes)) - minutes_of(slots)))


def check_first_free_is_the_first():
    slots, length = some_slots(), RNG.randint(1, 5)
    opens, closes = sorted(RNG.sample(range(24), 2))
    after = RNG.choice([None, RNG.randrange(24)])
    rest = set(range(max(opens, after or 0), closes)) - minutes_of(slots)
    starts = [start for start in sorted(rest) if rest >= set(range(start, start + length))]
    same(bookings.first_free(slots, length, opens, closes, after), [starts[0], starts[0] + length] if starts else None)


def check_rooms_are_counted_by_the_minute():
    slots = some_slots()
    same(bookings.rooms_needed(slots), max(sum(start <= minute < end for start, end in slots) for minute in range(24)))


def check_months_day_by_day():
    date, months = some_date(), RNG.randrange(15)
    same(bookings.add_months(date, months), month_later(date, months))


def check_monthly_keeps_the_day():
    date = some_date().replace(month=RNG.choice([1, 3, 5]), day=RNG.choice([1, 28, 29, 30, 31]))
    count = RNG.randrange(6)
    same(bookings.monthly(date, count), [month_later(date, number) for number in range(count)])


def check_weekly_day_by_day():
    first, days = some_date(), RNG.randrange(-3, 60)
    dates = [first + datetime.timedelta(days=number) for number in range(days + 1)]
    closed = RNG.sample(dates, len(dates) // 3)
    wanted = [date for date in dates[::7] if date not in closed]
    same(bookings.weekly(first, first + datetime.timedelta(days=days), closed), wanted)


def check_share_gives_cent_by_cent():
    """Every cent that is left over goes to the largest remainder that has got none."""
    cents, weights = RNG.randrange(300), RNG.choices(range(1, 6), k=RNG.randint(1, 5))
    parts = [cents * weight // sum(weights) for weight in weights]
    lack = [cents * weight - part * sum(weights) for weight, part in zip(weights, parts)]
    for _ in range(cents - sum(parts)):
        index = lack.index(max(lack))
        parts[index] += 1
        lack[index] = -1
    same(bookings.share(cents, weights), parts)


def check_price_quarter_by_quarter():
    start, hourly = RNG.randrange(1000, 1200), RNG.randrange(2000)
    end = start + RNG.randrange(1, 200)
    surcharge = RNG.choice([None, 0, 0, 10, 35])
    percent = 50 if surcharge is None else surcharge
    begun = [minute for minute in range(start, end) if (minute - start) % 15 == 0]
    same(
        bookings.price((start, end), hourly, surcharge),
        sum(hourly * (100 + percent * (m >= 1080)) for m in begun) // 400,
    )


def check_calendars_have_nothing_in_common():
    one, other = bookings.Calendar(), bookings.Calendar()
    one.add("hall", (RNG.randrange(50), 60), "Ada")
    same([len(one.bookings), other.bookings, bookings.Calendar().bookings], [1, [], []])


def check_calendar_leaves_the_callers_list_alone():
    rows = [("hall", (0, 10), "Ada")]
    calendar = bookings.Calendar(rows)
    calendar.add("hall", (10 + RNG.randint(1, 9), 30), "Bo")
    calendar.cancel("Ada")
    same(rows, [("hall", (0, 10), "Ada")])


def check_add_refuses_exactly_what_is_taken():
    calendar, rows = some_calendar()
    room, slot = RNG.choice(["hall", "cellar"]), tuple(sorted(RNG.sample(range(24), 2)))
    taken = minutes_of(other for name, other, _ in rows if name == room) & minutes_of([slot])
    same(is_refused(calendar.add, room, slot, "Dan"), bool(taken))
    same(calendar.bookings, rows if taken else [*rows, (room, slot, "Dan")])


def check_cancel_takes_all_and_only_theirs():
    calendar, rows = some_calendar()
    kept = [row for row in rows if row[2] != "Ada"]
    same([calendar.cancel("Ada"), calendar.bookings], [len(rows) - len(kept), kept])


def check_minutes_are_summed():
    calendar, rows = some_calendar()
    total = [
        [name, sum(slot[1] - slot[0] for _, slot, who in rows if who == name)] for name in {row[2] for row in rows}
    ]
    same(list(calendar.minutes().items()), sorted(total, key=lambda item: (-item[1], item[0])))


def check_rooms_that_are_free():
    calendar, rows = some_calendar()
    slot = tuple(sorted(RNG.sample(range(24), 2)))
    free = [
        room for room in ("cellar", "hall") if not minutes_of([slot]) & minutes_of(s for r, s, _ in rows if r == room)
    ]
    same(calendar.rooms_for(slot, ["cellar", "hall"]), free)


def check_lists_of_a_calendar():
    calendar, rows = some_calendar()
    same(calendar.of_room("hall"), sorted(slot for room, slot, _ in rows if room == "hall"))
    same(calendar.of_person("Bo"), [(room, slot) for room, slot, person in rows if person == "Bo"])
