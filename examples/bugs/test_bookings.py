"""uv run pytest -q test_bookings.py. The ruler runs these, each with a module loaded anew, and more."""

import datetime
import json

import bookings


def same(got, want):
    """As plain data, so that an object of any other kind is no right answer."""
    assert json.dumps(got, default=str) == json.dumps(want, default=str)


def day(text):
    return datetime.date.fromisoformat(text)


def refuses(function, *arguments):
    try:
        function(*arguments)
    except ValueError:
        return True
    return False


def test_time_is_read():
    same([bookings.parse_time(text) for text in ("9:05", "09:05", " 0:00", "24:00")], [545, 545, 0, 1440])


def test_no_time_is_refused():
    same([refuses(bookings.parse_time, text) for text in ("9", "9:5", "9:60", "24:01", "x:00", "")], [True] * 6)


def test_time_is_written():
    same([bookings.format_time(minutes) for minutes in (0, 545, 1440)], ["00:00", "09:05", "24:00"])


def test_slot_is_read():
    same(bookings.parse_slot("9:00-10:30"), [540, 630])


def test_slot_that_ends_too_early_is_refused():
    same([refuses(bookings.parse_slot, text) for text in ("10:00-9:00", "9:00-9:00", "9:00")], [True] * 3)


def test_overlap():
    same([bookings.overlap((0, 60), (30, 90)), bookings.overlap((0, 60), (90, 120))], [True, False])


def test_back_to_back_is_no_overlap():
    same([bookings.overlap((540, 600), (600, 660)), bookings.overlap((600, 660), (540, 600))], [False, False])


def test_merge():
    same(bookings.merge([(30, 50), (0, 10), (10, 20)]), [(0, 20), (30, 50)])


def test_free_around_a_short_slot_within_a_long_one():
    same(bookings.free([(540, 720), (600, 615)], 480, 780), [(480, 540), (720, 780)])


def test_first_free():
    same(bookings.first_free([(540, 600), (630, 700)], 45, 540, 780), (700, 745))


def test_first_free_after():
    same(bookings.first_free([(540, 600)], 30, 480, 780, after=500), (500, 530))


def test_first_free_if_there_is_none():
    same(bookings.first_free([(0, 1400)], 60), None)


def test_rooms_needed():
    same(bookings.rooms_needed([(0, 60), (30, 90), (45, 50)]), 3)


def test_one_after_the_other_needs_one_room():
    same(bookings.rooms_needed([(60, 120), (0, 60), (120, 180)]), 1)


def test_monthly_on_the_31st():
    same(bookings.monthly(day("2031-01-31"), 4), ["2031-01-31", "2031-02-28", "2031-03-31", "2031-04-30"])


def test_add_months_over_the_year():
    same(
        [bookings.add_months(day("2031-12-31"), 2), bookings.add_months(day("2031-11-15"), 14)],
        ["2032-02-29", "2033-01-15"],
    )


def test_weekly_without_the_closed_days():
    same(
        bookings.weekly(day("2031-03-03"), day("2031-03-24"), [day("2031-03-10")]),
        ["2031-03-03", "2031-03-17", "2031-03-24"],
    )


def test_a_bill_of_three():
    same(bookings.share(10000, [1, 1, 1]), [3334, 3333, 3333])


def test_a_bill_by_weight():
    same(bookings.share(1000, [3, 1, 1]), [600, 200, 200])


def test_price_in_the_evening():
    same([bookings.price((600, 660), 800), bookings.price((1050, 1110), 800)], [800, 1000])


def test_price_without_a_surcharge():
    same(bookings.price((1080, 1140), 800, surcharge=0), 800)


def test_new_calendar_is_empty():
    bookings.Calendar().add("hall", (0, 60), "Ada")
    same(bookings.Calendar().bookings, [])


def test_calendar_refuses_what_is_taken():
    calendar = bookings.Calendar([("hall", (540, 600), "Ada")])
    same(
        [refuses(calendar.add, "hall", (570, 630), "Bo"), refuses(calendar.add, "cellar", (570, 630), "Bo")],
        [True, False],
    )


def test_cancel_takes_out_everything():
    calendar = bookings.Calendar([("hall", (hour * 60, hour * 60 + 60), "Ode") for hour in range(8, 12)])
    same([calendar.cancel("Ode"), calendar.bookings], [4, []])


def test_minutes_by_person():
    calendar = bookings.Calendar([("hall", (0, 30), "Bo"), ("hall", (30, 60), "Ada"), ("cellar", (0, 60), "Cleo")])
    same(list(calendar.minutes().items()), [["Cleo", 60], ["Ada", 30], ["Bo", 30]])


def test_rooms_for_a_slot():
    calendar = bookings.Calendar([("hall", (540, 600), "Ada")])
    same(calendar.rooms_for((570, 630), ["hall", "cellar"]), ["cellar"])
