"""What the server decides, by itself: who gets a place, who owes what, which round is next, what is repaired how."""

import collections
import zlib

import pytest

import kmcast

WIRE, BASE_WIRE = kmcast.SessionDialect, kmcast.BaseDialect
NO_FIGURES = (0, 0, 0, 0, 0)
PAYLOAD, COUNT, FIRST = 1460, 10, 100
GB = 1e9                                # bit/s
CALM = kmcast.Speed(GB, GB, True, None)


def member(host="node7", address="192.0.2.7", window=4):
    made = kmcast.Member(address, 0.0)
    made.host, made.window = host, window
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Roster

def test_it_begins_when_all_are_here_or_when_it_is_time_and_enough_are():
    roster = kmcast.Roster(3, enough=2, start_by=10.0)
    first, second = member("a"), member("b")
    assert roster.admit(first) == 1 and not roster.begin(11.0)
    assert roster.admit(second) == 2 and not roster.begin(9.0)
    roster.leave(first)
    assert not roster.begin(11.0), "what counts is who is here now"
    roster.admit(first)
    assert roster.begin(11.0) and roster.everyone == [second, first]


def test_who_was_refused_is_remembered_unless_the_host_has_the_image_from_another_client():
    roster = kmcast.Roster(1)
    first = member("a")
    roster.admit(first)
    assert roster.begin(0.0)
    roster.refuse(member("a"), kmcast.LATE)
    roster.refuse(member("b"), kmcast.LATE)
    assert [host for (host, _), _ in roster.refused] == ["a", "b"]
    first.outcome = "complete"
    assert [host for (host, _), _ in roster.refused] == ["b"]


def late_roster(**options):
    """A Roster of two places, of which one is taken, that has begun and whose image can be read again."""
    roster = kmcast.Roster(2, 1, 0.0, **options)
    roster.again = True
    roster.admit(member("a"))
    assert roster.begin(10.0)
    return roster


def test_who_comes_late_takes_part_while_there_are_places():
    roster = late_roster()
    assert roster.why_not() is None
    late = member("b")
    roster.admit(late, 12.5)
    assert late.late == 2.5 and roster.everyone[-1] is late
    assert roster.why_not() == kmcast.NO_PLACE
    late.outcome = "complete"
    roster.leave(late)
    assert roster.why_not() == kmcast.NO_PLACE, "it has had its place"
    lost = roster.here[0]
    lost.outcome = "it went away"
    roster.leave(lost)
    assert roster.why_not() is None, "it may come back"


def test_with_more_there_is_a_place_for_as_many_as_can_be_here_at_once():
    roster = late_roster(more=True, most=3)
    roster.admit(member("b"), 11.0)
    assert roster.why_not() is None
    roster.admit(member("c"), 11.0)
    assert roster.why_not() == kmcast.NO_PLACE


def test_who_is_late_for_what_cannot_be_read_again_hears_that():
    roster = late_roster()
    roster.again = False
    assert roster.why_not() == kmcast.NO_WAY_BACK


def test_who_is_back_is_the_one_that_was_here():
    """By what tells its output from others, or as the same host."""
    roster = late_roster()
    first = roster.here[0]
    first.lost, first.waited = 3, {"output": 1.0}
    first.outcome, first.ended = "it went away", 11.0
    roster.leave(first)
    back = member("a")
    back.lost = 4
    roster.admit(back, 12.0)
    assert roster.everyone == [back] and back.back and back.late is None
    assert (back.lost, back.waited) == (7, {"output": 1.0})


def test_the_place_of_who_was_set_aside_is_kept():
    roster = late_roster()
    roster.admit(member("b"), 10.0)
    slow = roster.here[0]
    roster.condemn(slow, "it was slow", away=True)
    slow.outcome, slow.ended = slow.sentence, 11.0
    roster.leave(slow)
    assert roster.why_not(member=member("c")) == kmcast.NO_PLACE and roster.why_not(member=member("a")) is None
    roster.closing = True
    assert roster.why_not(member=member("a")) is None, "it is one of those who are here"
    roster.admit(member("a"), 12.0)
    assert not roster.away and roster.why_not(member=member("a")) == kmcast.CLOSING


def test_the_same_output_takes_the_place_of_its_earlier_connection():
    roster = late_roster()
    first, again = member("x", "127.0.0.1"), member("x", "127.0.0.1")
    first.who = again.who = "01" * 16
    roster.admit(first, 11.0)
    assert roster.twin(again) is first and roster.why_not() and not roster.why_not(first)
    roster.admit(again, 12.0, first)
    assert first.sentence and not roster.is_here(first) and roster.twin(again) is again
    assert roster.everyone[1:] == [again]


def test_a_host_that_has_forgotten_what_it_was_takes_the_place_of_its_earlier_connection():
    """It was switched off, perhaps, which nobody has noticed yet."""
    roster = late_roster()
    first, again = roster.here[0], member("a")
    first.who, again.who = "01" * 16, "02" * 16
    assert roster.twin(again) is first and not roster.why_not(first, again)
    roster.admit(again, 12.0, first)
    assert first.sentence and roster.here == roster.everyone == [again], "it is not listed twice"


def test_nobody_comes_when_nobody_is_here_and_it_is_closed():
    roster = late_roster()
    assert not roster.close() and not roster.why_not(), "somebody is here"
    roster.leave(roster.here[0])
    assert roster.close() and roster.why_not() == kmcast.CLOSING


def test_of_very_many_that_have_left_the_first_are_forgotten():
    roster = late_roster(forever=True, most=10)
    for number in range(1500):
        one = member("host%d" % number)
        roster.admit(one, 20.0)
        one.outcome, one.ended = "complete", 21.0
        roster.leave(one)
    assert roster.served == 1500 and len(roster.everyone) <= roster.MOST_GONE + 1
    assert roster.everyone[0].host == "a" and roster.missing == [], "who is still here is not forgotten"


def test_a_host_that_comes_twice_has_a_twin_but_not_on_loopback():
    roster = kmcast.Roster(3)
    first = member("a")
    roster.admit(first)
    assert roster.twin(member("a")) is first
    assert roster.twin(member("b")) is None
    roster.admit(member("a", "127.0.0.1"))
    assert roster.twin(member("a", "127.0.0.1")) is None


# ---------------------------------------------------------------------------------------------------------------------
# ServerWindow

def a_round(number=0, count=COUNT, multicast=None):
    """A Round that is sent as a whole, at a rate that the line is known to carry."""
    buffer = kmcast.Buffer(PAYLOAD, count)
    buffer.start(FIRST + number * count, count, count * PAYLOAD)
    made = kmcast.Round(number, buffer, number * count * PAYLOAD)
    made.digest, made.speed = b"d" * 32, CALM
    made.multicast = count if multicast is None else multicast
    return made


def window(*members, **options):
    made = kmcast.ServerWindow(options.get("dialect", WIRE), 30.0)
    made.members += members
    return made


def step(kind, *args, **options):
    return kmcast.Step(kind, *args, **options)


def bits_of(places):
    return sum(1 << place for place in places)


def wanted(*places):
    """A Request for some packets, as they come."""
    return kmcast.Request(bits_of(places), len(places), None)


def request(number, *places, **options):
    count = options.get("count", COUNT)
    figures = options.get("figures", (count - len(places), 0, 0, 0, 0))
    return WIRE.request(number, figures, bits_of(places), FIRST, count)


def done(number, figures=(0, 0, 0, 0), heard=1000):
    return WIRE.done(number, (heard,) + figures)


def announced(*members):
    """A window in which round 0 is announced."""
    made, first = window(*members), a_round()
    assert made.begin(step("announce", first), 1.0) == [
        ("send", who, WIRE.info(0, COUNT * PAYLOAD, FIRST, COUNT, 0)) for who in members]
    assert made.complete() == [] and set(made.debtors()) == set(members)
    return made, first


def sent(*members):
    """A window in which round 0 was multicast; nobody has answered yet."""
    made, first = announced(*members)
    for who in members:
        assert made.heard(who, WIRE.ready(0), 2.0) == []
    assert [awaited.step.kind for awaited in made.complete()] == ["announce"]
    assert made.begin(step("sent", first), 3.0) == [("send", who, WIRE.sent(0, b"d" * 32)) for who in members]
    return made, first


def completed(made):
    """The steps that are complete: (kind, number of the round, what is asked for)."""
    return [(awaited.step.kind, awaited.step.round and awaited.step.round.number,
             dict((who, kmcast.places(asked.gaps)) for who, asked in awaited.answers.requests.items()))
            for awaited in made.complete()]


def test_a_step_is_through_when_all_have_answered_and_is_told_once():
    first, second = member("a"), member("b")
    made, _ = sent(first, second)
    made.heard(first, done(0), 4.0)
    assert completed(made) == [] and made.debtors() == [second]
    made.heard(second, done(0), 5.0)
    assert completed(made) == [("sent", 0, {})] and completed(made) == [] and made.debtors() == []
    assert first.oldest is None and first.owes is None


def test_what_is_asked_for_is_sent_as_packets_or_comes_again_by_multicast():
    who = member()
    made, first = sent(who)
    assert made.heard(who, request(0, 3, 9), 4.0) == []
    assert completed(made) == [("sent", 0, {who: [3, 9]})] and who.owes is None
    assert made.begin(step("repair", first, coded=[who], message=b"again"), 5.0) == [("send", who, b"again")]
    assert completed(made) == [("repair", 0, {})], "it owes nothing until the pass was sent"
    assert made.begin(step("sent", first), 6.0) == [("send", who, WIRE.sent(0, b"d" * 32))]
    made.heard(who, request(0, 9), 7.0)
    assert completed(made) == [("sent", 0, {who: [9]})]
    assert made.begin(step("repair", first), 8.0) == [("packets", who, (first, wanted(9)))]
    assert made.debtors() == [who]
    made.heard(who, done(0), 9.0)
    assert completed(made) == [("repair", 0, {})] and (who.lost, who.by_tcp) == (3, 1)


def test_a_round_can_be_repaired_for_some_by_tcp_and_for_others_by_multicast():
    first, second, third = member("a"), member("b"), member("c")
    made, the_round = sent(first, second, third)
    made.heard(first, request(0, 1), 4.0)
    made.heard(second, request(0, 2), 4.0)
    made.heard(third, done(0), 4.0)
    assert made.begin(step("repair", the_round, coded=[first], message=b"again"), 5.0) == [
        ("send", first, b"again"), ("packets", second, (the_round, wanted(2)))]
    assert made.begin(step("sent", the_round), 6.0) == [("send", first, WIRE.sent(0, b"d" * 32))], "only who listens is told"


def test_rounds_go_their_way_side_by_side():
    who = member()
    made, first = sent(who)
    second = a_round(1)
    made.begin(step("announce", second), 4.0)
    made.heard(who, WIRE.ready(1), 5.0)
    assert completed(made) == [("announce", 1, {})], "though the first one is unanswered"
    assert made.begin(step("sent", second), 6.0) == [("send", who, WIRE.sent(1, b"d" * 32))]
    made.heard(who, request(1, 4), 7.0)
    assert completed(made) == [("sent", 1, {who: [4]})]
    made.heard(who, request(0, 2), 8.0)
    assert completed(made) == [("sent", 0, {who: [2]})]
    assert made.begin(step("repair", second), 9.0) == [("packets", who, (second, wanted(4)))]
    assert made.begin(step("repair", first), 9.0) == [("packets", who, (first, wanted(2)))]
    made.heard(who, done(0), 9.0)
    made.heard(who, done(1), 9.0)
    assert [kind for kind, _, _ in completed(made)] == ["repair", "repair"]


def test_who_has_everything_hears_the_last_word_at_once_and_is_served_when_it_says_so():
    first, second = member("a"), member("b")
    made, _ = sent(first, second)
    made.heard(first, done(0), 4.0)
    assert made.begin(step("finish", message=b"bye"), 5.0) == [("send", first, b"bye")]
    assert made.heard(second, done(0), 6.0) == [("send", second, b"bye")]
    assert made.heard(second, WIRE.done(kmcast.END, NO_FIGURES), 7.0) == [("served", second, None)]
    assert (second.outcome, second.ended) == ("complete", 7.0) and first.outcome is None
    made.heard(first, WIRE.done(kmcast.END, NO_FIGURES), 8.0)
    assert [kind for kind, _, _ in completed(made)] == ["sent", "finish"]


def test_who_leaves_is_not_waited_for_and_gets_nothing_more():
    first, second = member("a"), member("b")
    made, the_round = sent(first, second)
    made.heard(second, request(0, 3), 4.0)
    made.heard(first, done(0), 4.0)
    made.leave(second)
    assert completed(made) == [("sent", 0, {})]
    made, the_round = sent(first, member("c"))
    made.leave(made.members[1])
    made.heard(first, done(0), 4.0)
    assert completed(made) == [("sent", 0, {})]
    assert made.begin(step("repair", the_round), 5.0) == []


@pytest.mark.parametrize("message", [
    WIRE.ready(0), done(0), request(0, 1), done(kmcast.END), kmcast.HELLO + kmcast.U32.pack(2) + b"{}"], ids=repr)
def test_what_is_not_owed_is_an_error(message):
    who = member()
    with pytest.raises(kmcast.ProtocolError):
        window(who).heard(who, message, 1.0)


@pytest.mark.parametrize("message", [done(0), request(0, 1), WIRE.ready(1), done(1)], ids=repr)
def test_who_owes_that_it_is_ready_can_say_nothing_else(message):
    who = member()
    made, _ = announced(who)
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, message, 1.0)


@pytest.mark.parametrize("message", [WIRE.ready(0), done(1), request(1, 1), WIRE.ready(1), done(kmcast.END)], ids=repr)
def test_who_owes_an_answer_can_say_nothing_else(message):
    who = member()
    made, _ = sent(who)
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, message, 1.0)


@pytest.mark.parametrize("before, message", [(done(0), done(0)), (done(0), request(0, 1)), (request(0, 1), done(0)),
                                             (request(0, 1), request(0, 1))], ids=repr)
def test_a_debt_is_paid_once(before, message):
    who = member()
    made, _ = sent(who)
    made.heard(who, before, 4.0)
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, message, 5.0)


@pytest.mark.parametrize("bitmap", [b"\0\0", b"\1\4", b"\0\x80"], ids=["nothing", "packet 10 of 10", "packet 15 of 10"])
def test_only_packets_of_the_round_can_be_asked_for(bitmap):
    who = member()
    made, _ = sent(who)
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, request(0, 1)[:-2] + bitmap, 4.0)


def test_the_size_of_a_request_for_a_round_that_is_not_under_way_is_not_known():
    who = member()
    made, _ = sent(who)
    assert made.size_of(request(0, 1)[:5]) == len(request(0, 1))
    for number in (1, 7, kmcast.END):
        with pytest.raises(kmcast.ProtocolError):
            made.size_of(request(number, 1)[:5])


def test_the_same_round_can_be_asked_for_twenty_times():
    who = member()
    made, the_round = sent(who)
    for _ in range(20):
        made.heard(who, request(0, 1), 4.0)
        made.begin(step("repair", the_round), 5.0)
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, request(0, 1), 6.0)


def sums(the_round):
    """SUMS of a round as the protocol has them."""
    return WIRE.sums(the_round.number, [zlib.crc32(b"\0" * PAYLOAD) & 0xffffffff] * the_round.buffer.count)


def test_who_finds_that_the_digest_differs_hears_the_sums_of_the_round_and_still_owes_its_answer():
    first, second = member("a"), member("b")
    made, the_round = sent(first, second)
    assert made.heard(first, WIRE.ask_for_sums(0), 4.0) == [("send", first, sums(the_round))]
    assert set(made.debtors()) == {first, second} and first.owes == kmcast.ANSWER
    assert made.heard(first, request(0, 3), 5.0) == []
    assert made.heard(second, done(0), 5.0) == []
    assert completed(made) == [("sent", 0, {first: [3]})]
    made.begin(step("repair", the_round), 6.0)
    assert made.heard(first, WIRE.ask_for_sums(0), 7.0) == [("send", first, sums(the_round))], "it may differ still"
    made.heard(first, done(0), 8.0)
    assert completed(made) == [("repair", 0, {})]


def test_sums_are_those_of_the_round_that_is_named():
    who = member()
    made, _ = sent(who)
    second = a_round(1, count=3)
    second.buffer.payloads[0:1] = b"x"
    made.begin(step("announce", second), 4.0)
    made.heard(who, WIRE.ready(1), 4.0)
    made.begin(step("sent", second), 4.0)
    (_, _, message), = made.heard(who, WIRE.ask_for_sums(1), 5.0)
    assert message == WIRE.sums(1, [zlib.crc32(b"x" + b"\0" * (PAYLOAD - 1)) & 0xffffffff]
                                + [zlib.crc32(b"\0" * PAYLOAD) & 0xffffffff] * 2)


def test_sums_count_as_a_request_does():
    who = member()
    made, the_round = sent(who)
    for _ in range(10):
        made.heard(who, WIRE.ask_for_sums(0), 4.0)
        made.heard(who, request(0, 1), 4.0)
        made.begin(step("repair", the_round), 5.0)
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, WIRE.ask_for_sums(0), 6.0)


@pytest.mark.parametrize("begin, messages", [
    (announced, []), (announced, [WIRE.ready(0)]), (sent, [done(0)]), (sent, [request(0, 1)])],
    ids=["before READY", "before SENT", "after DONE", "after REQUEST"])
def test_sums_of_a_round_for_which_no_answer_is_owed_are_an_error(begin, messages):
    who = member()
    made, _ = begin(who)
    for message in messages:
        made.heard(who, message, 4.0)
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, WIRE.ask_for_sums(0), 5.0)


@pytest.mark.parametrize("answer", [done(0), request(0, 3)], ids=["DONE", "REQUEST"])
def test_how_a_round_was_heard_is_known_though_its_digest_differed(answer):
    """From the first answer of those that tell it, and from no further one."""
    who = member()
    made, the_round = sent(who)
    made.heard(who, WIRE.ask_for_sums(0), 4.0)
    made.heard(who, answer, 5.0)
    (awaited,) = made.complete()
    assert awaited.answers.hearing == 1 and awaited.answers.lost == (0.1 if answer != done(0) else 0)
    if answer != done(0):
        made.begin(step("repair", the_round), 6.0)
        made.heard(who, done(0), 7.0)
        (awaited,) = made.complete()
        assert awaited.answers.hearing == 0


def test_only_who_gets_nothing_done_has_stalled():
    who = member()
    made, _ = announced(who)
    assert made.stalled(who, 0.0, 31.0) is None
    assert "ready for the next round" in made.stalled(who, 0.0, 31.1)
    assert made.stalled(who, 20.0, 31.1) is None, "its kernel took something"
    made.heard(who, kmcast.ALIVE, 30.0)
    assert made.stalled(who, 0.0, 59.0) is None
    made.heard(who, WIRE.state(busy="writing"), 59.0)
    assert made.stalled(who, 0.0, 60.1), "words alone move nothing"


def test_a_member_is_blamed_for_its_oldest_round_only():
    """It writes and hashes in order: what it owes for later rounds may have to wait."""
    who = member()
    made, _ = sent(who)
    made.begin(step("announce", a_round(1)), 10.0)
    assert (who.oldest, who.owes) == (0, kmcast.ANSWER)
    assert who.moved == 3.0, "that it owes more is no move"
    made.heard(who, WIRE.ready(1), 20.0)
    assert who.moved == 3.0, "nor that it pays for a later round"
    assert kmcast.ANSWER in made.stalled(who, 0.0, 33.1)
    made.heard(who, request(0, 1), 32.0)
    assert (who.oldest, who.owes) == (0, None), "now that waits for us"
    assert made.stalled(who, 0.0, 62.0) is None
    assert "takes what is sent" in made.stalled(who, 0.0, 62.1)


def test_what_it_owes_for_the_next_round_begins_when_that_is_the_oldest():
    who = member()
    made, _ = sent(who)
    made.begin(step("announce", a_round(1)), 4.0)
    made.heard(who, done(0), 30.0)
    assert (who.oldest, who.owes, who.moved) == (1, kmcast.READINESS, 30.0)
    assert made.stalled(who, 0.0, 60.0) is None and kmcast.READINESS in made.stalled(who, 0.0, 60.1)


def test_without_a_stall_timeout_nobody_is_dropped():
    who = member()
    made, _ = announced(who)
    made.stall_timeout = 0
    assert made.stalled(who, 0.0, 1e9) is None


def test_signs_of_life_have_a_limit():
    who = member()
    made, _ = announced(who)
    with pytest.raises(kmcast.ProtocolError):
        for _ in range(100):
            made.heard(who, kmcast.ALIVE, 10.0)


def test_signs_of_life_that_are_asked_for_have_none():
    who = member()
    made, _ = announced(who)
    for number in range(1000):
        made.heard(who, kmcast.ALIVE, number * kmcast.alive_every(30.0))


def test_a_client_says_what_it_is_busy_with():
    who = member()
    made, _ = announced(who)
    made.heard(who, WIRE.state(busy="writing", overflows=5), 2.0)
    assert who.busy == "writing" and who.figures == {"overflows": 5}
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, WIRE.state(busy=7), 2.0)


def test_a_client_that_ends_says_why():
    who = member()
    made, _ = announced(who)
    with pytest.raises(kmcast.Refused) as refused:
        made.heard(who, WIRE.bye(ok=False, reason="disk full"), 2.0)
    assert "disk full" in refused.value.reason


def test_the_window_of_the_base_protocol_is_one_round():
    who = member()
    made, the_round = window(who, dialect=BASE_WIRE), a_round()
    assert made.begin(step("announce", the_round), 1.0) == [("send", who, BASE_WIRE.info(0, COUNT * PAYLOAD, FIRST, COUNT, 0))]
    made.heard(who, kmcast.READY, 2.0)
    assert made.begin(step("sent", the_round), 3.0) == [("send", who, kmcast.SENT)]
    made.heard(who, kmcast.REQUEST + b"".join(map(kmcast.U32.pack, (2, FIRST + 9, FIRST + 3))), 4.0)
    assert made.begin(step("repair", the_round), 5.0) == [
        ("packets", who, (the_round, kmcast.Request(bits_of([3, 9]), 2, [9, 3])))], "in the order in which they were asked for"
    made.heard(who, kmcast.DONE, 6.0)
    assert [kind for kind, _, _ in completed(made)] == ["announce", "sent", "repair"]
    end = kmcast.Round(1, kmcast.Buffer(PAYLOAD, 0), COUNT * PAYLOAD)
    made.begin(step("announce", end), 7.0)
    made.heard(who, kmcast.READY, 8.0)
    assert made.begin(step("finish", end), 9.0) == [("send", who, kmcast.SENT)]
    assert made.heard(who, kmcast.DONE, 10.0) == [("served", who, None)] and who.outcome == "complete"


# ---------------------------------------------------------------------------------------------------------------------
# How the clients hear

def heard(who, message, count=1000, multicast=None, tail=GB, head=None, speed=CALM):
    """The Answers to the first `sent` of a round, of one member."""
    made, the_round = window(who), a_round(0, count, multicast)
    the_round.tail, the_round.head, the_round.speed = tail, head, speed
    made.begin(step("announce", the_round), 1.0)
    made.heard(who, WIRE.ready(0), 2.0)
    made.begin(step("sent", the_round), 3.0)
    awaited = made.awaited[-1]
    made.heard(who, message, 4.0)
    return awaited.answers


def figures(rate, count=500, packet=PAYLOAD + 40):
    """What a train of `count` packets that arrives at a rate makes."""
    return count, int(1e6 * count * packet * 8 / rate)


def test_a_round_that_arrives_as_it_was_sent_has_the_ratio_1():
    answers = heard(member(), done(0, (0, 0) + figures(GB)))
    reception, = answers.worst
    assert answers.hearing == 1 and answers.deaf == [] and reception.lost == 0
    assert reception.ratio == pytest.approx(1.0, abs=0.001)


def test_a_round_that_arrives_slower_tells_at_which_share_of_the_rate():
    who = member()
    reception, = heard(who, done(0, (0, 0) + figures(GB / 10))).worst
    assert reception.member is who and reception.lost == 0
    assert reception.ratio == pytest.approx(0.1, rel=0.001) and reception.error < 0.1


def test_a_clock_that_does_not_tell_leaves_it_to_the_losses():
    reception, = heard(member(), done(0, (0, 0, 500, 9))).worst
    assert reception.ratio == 1.0
    speed = kmcast.Speed(GB, GB, False, None)
    reception, = heard(member(), request(0, *range(500, 1000, 2), count=1000), speed=speed).worst
    assert reception.ratio == pytest.approx(0.5) and reception.lost == 0.25


def test_only_a_rate_that_the_line_carries_tells_what_a_medium_loses():
    who, message = member(), request(0, *range(500, 1000, 2), count=1000)
    heard(who, message, speed=kmcast.Speed(GB, GB, False, None))
    assert who.medium == 0.0
    heard(who, done(0))
    assert who.medium == 0.0
    who = member()
    heard(who, message)
    assert 0.0 < who.medium < 0.25, "little by little"
    who = member()
    heard(who, message, speed=kmcast.Speed(GB / 2, GB / 2, False, 0.25))
    assert who.medium == 0.25, "at once, where it was lost at another rate, too"


def test_what_a_clients_medium_loses_is_allowed_for():
    who = member()
    who.medium = 0.1
    reception, = heard(who, request(0, *range(0, 1000, 10), count=1000)).worst
    assert reception.ratio == pytest.approx(1.0) and reception.lost == pytest.approx(0.1)


def test_who_hears_nothing_is_deaf_and_its_losses_are_not_the_rates():
    who = member()
    answers = heard(who, request(0, *range(1000), count=1000))
    assert answers.deaf == [who] and answers.hearing == 0 and answers.worst == [] and who.deaf_since == 4.0


def test_only_what_was_multicast_can_have_been_heard():
    who = member()
    answers = heard(who, request(0, *range(16, 1000), count=1000), multicast=16, tail=None)
    assert answers.deaf == [] and answers.worst[0].lost == 0
    who = member()
    answers = heard(who, request(0, *range(1000), count=1000), multicast=16, tail=None)
    assert answers.deaf == [who]


def test_who_loses_too_much_counts_but_does_not_decide():
    who = member()
    who.ignored = True
    answers = heard(who, request(0, *range(900), count=1000))
    assert answers.hearing == 1 and answers.worst == []


def test_a_head_that_was_sent_faster_tells_how_fast_it_came():
    assert heard(member(), done(0, figures(2 * GB, 187) + figures(GB))).head is None
    answers = heard(member(), done(0, figures(2 * GB, 187) + figures(GB)), head=2 * GB)
    assert answers.head[0] == pytest.approx(2 * GB, rel=0.001)


def test_only_the_first_answer_tells_how_a_round_was_heard():
    who = member()
    made, the_round = sent(who)
    made.heard(who, request(0, 1), 4.0)
    made.complete()
    made.begin(step("repair", the_round, coded=[who], message=b""), 5.0)
    made.complete()
    made.begin(step("sent", the_round), 5.0)
    awaited = made.awaited[-1]
    made.heard(who, done(0), 6.0)
    assert awaited.answers.hearing == 0 and awaited.answers.worst == []


def test_answers_of_many_keep_the_two_worst_and_the_last_two():
    whole, other = kmcast.Answers(), kmcast.Answers()
    for number, ratio in enumerate((0.9, 0.2, 1.0, 0.5)):
        answers = whole if number % 2 else other
        answers.heard(kmcast.Reception(ratio, 0.0, 1 - ratio, number))
        answers.heard_head(ratio * GB, 0.01)
        answers.paid(number, float(number))
    whole.add(other)
    assert [reception.ratio for reception in whole.worst] == [0.2, 0.5]
    assert whole.hearing == 4 and whole.head == (0.2 * GB, 0.01) and whole.lost == pytest.approx(1.4)
    assert whole.late == [(3.0, 3, None), (2.0, 2, None)]


# ---------------------------------------------------------------------------------------------------------------------
# Course

class Hands(object):
    """The hands of a Course, with a clock that is set and a producer that gives buffers of what is left."""

    def __init__(self, packets, short=0):
        self.clock, self.size = 10.0, packets * PAYLOAD - short
        self.steps, self.released, self.room = collections.deque(), [], []
        self.filling, self.digests = None, []

    def now(self):
        return self.clock

    def fill(self, base, limit, place):
        assert self.filling is None, "one after the other"
        self.filling = base, limit, place

    def digest(self, part):
        self.digests.append(part)
        return ("d%d" % part).encode("ascii")

    def do(self, step):
        self.steps.append(step)

    def release(self, buffer):
        self.released.append(buffer)

    def leave_room(self, size):
        self.room.append(size)

    def trouble(self):
        return None


class Drive(object):
    """A Course and its fake hands, and who answers for the TCP servers."""

    def __init__(self, packets=0, members=1, windows=None, dialect=WIRE, capacity=1000, short=0, **options):
        self.hands = Hands(packets, short)
        self.members = [member("node%d" % number, "192.0.2.%d" % number, (windows or [4] * members)[number])
                        for number in range(members)]
        self.roster = kmcast.Roster(options.pop("places", members), 1, -1.0, options.pop("more", False))
        self.roster.again = options.pop("again", False)
        options.setdefault("rate", GB)
        self.course = kmcast.Course(self.hands, self.roster, dialect, PAYLOAD, capacity, farewell=lambda: b"bye",
                                    size=self.hands.size, **options)
        self.course.begin()
        for each in self.members:
            self.roster.admit(each)
        assert self.roster.begin(0.0)

    def start(self):
        self.fill()
        self.course.start()
        return self

    def fill(self):
        """The producer gives what the next buffer has room for."""
        (base, limit, place), self.hands.filling = self.hands.filling, None
        buffer = kmcast.Buffer(PAYLOAD, limit)
        size = min(limit * PAYLOAD, self.hands.size - place)
        buffer.start(base, -(-size // PAYLOAD), size)
        buffer.ended = size < limit * PAYLOAD       # that an image ends with a full buffer is known by an empty one
        self.course.filled(buffer)

    def fill_all(self):
        while self.hands.filling:
            self.fill()

    def took(self):
        """The steps since the last call: (kind, number)."""
        steps, self.hands.steps = self.hands.steps, collections.deque()
        return [(each.kind, each.round and each.round.number) for each in steps]

    def round(self, number):
        """A round that is under way."""
        found, = [underway.round for underway in self.course._underway          # pylint: disable=protected-access
                  if underway.round.number == number]
        return found

    def complete(self, kind, number=None, requests=None, reception=None):
        """All have done a step; reception: ratio of a round at the worst."""
        answers = kmcast.Answers()
        for who, places in (requests or {}).items():
            answers.requests[self.members[who]] = wanted(*places)
        if kind == "sent":
            for who in self.members:
                answers.heard(kmcast.Reception(reception or 1.0, 0.0, 0.0, who))
        self.course.complete(kmcast.Step(kind, None if number is None else self.round(number)), answers)
        while self.course.busy:
            self.course.work()

    def come(self, host, **facts):
        """A client comes; returns it."""
        late = member(host, "192.0.2.%d" % (100 + len(self.members)), facts.pop("window", 4))
        late.__dict__.update(facts)
        self.members.append(late)
        self.roster.admit(late, self.hands.clock)
        self.roster.news.append(("here", late, None))
        self.course.hear()
        return late

    def leave(self, number, outcome="it went away"):
        """A client leaves."""
        self.members[number].outcome, self.members[number].ended = outcome, self.hands.clock
        self.roster.leave(self.members[number])
        self.roster.news.append(("left", self.members[number], None))
        self.course.hear()

    def serve(self, number):
        """A client has everything, and says so."""
        self.leave(number, "complete")

    def bring(self):
        """Let all that can be brought be announced, multicast and answered for by all: [(place, packets, who)]."""
        brought, announced = [], set()
        while True:
            self.fill_all()
            underway = [each.round for each in self.course._underway if each.round.number not in announced]     # pylint: disable=protected-access
            if not underway:
                return brought
            for each in underway:
                announced.add(each.number)
                brought.append((each.place // PAYLOAD, each.buffer.count,
                                "".join(sorted(who.host for who in each.audience))))
                self.complete("announce", each.number)
            for each in underway:
                self.send()
            for each in underway:
                self.complete("sent", each.number)

    def send(self):
        """Multicast what is due; returns (number, packets, whether a repair), or None."""
        sending = self.course.next()
        if sending is None:
            return None
        done = sending.underway.round
        if sending.buffer is done.buffer:
            done.tail = GB
        self.course.sent(sending)
        return done.number, sending.last, sending.buffer is not done.buffer


def test_a_round_is_announced_when_it_is_full_and_multicast_when_all_are_ready():
    drive = Drive(100).start()
    assert drive.took() == [("announce", 0)] and drive.send() is None
    drive.complete("announce", 0)
    assert drive.send() == (0, 64, False)
    assert drive.took() == [("sent", 0)]
    assert drive.hands.digests == [0], "known when it is sent"
    assert drive.send() is None


def test_the_next_round_goes_out_while_the_first_is_unanswered():
    drive = Drive(1000).start()
    drive.fill_all()
    assert drive.took() == [("announce", number) for number in range(4)]
    for number in range(4):
        drive.complete("announce", number)
    assert [drive.send()[0] for _ in range(4)] == [0, 1, 2, 3] and drive.send() is None


def test_rounds_are_multicast_in_their_order_though_a_later_one_is_ready_first():
    drive = Drive(1000).start()
    drive.fill_all()
    drive.complete("announce", 1)
    assert drive.send() is None
    drive.complete("announce", 0)
    assert [drive.send()[0] for _ in range(2)] == [0, 1]


def test_a_round_begins_where_the_one_before_ends():
    drive = Drive(1000).start()
    drive.fill_all()
    rounds = [drive.round(number) for number in range(4)]
    for before, after in zip(rounds, rounds[1:]):
        assert after.buffer.base == before.buffer.base + before.buffer.count
        assert after.place == before.place + before.buffer.size
    assert rounds[0].place == 0 and [each.buffer.count for each in rounds] == [64, 128, 256, 512]


def test_a_round_is_through_when_nobody_asks_and_makes_room_for_the_next():
    drive = Drive(5000).start()
    drive.fill_all()
    assert drive.took()[-1] == ("announce", 3)
    drive.complete("announce", 0)
    drive.send()
    drive.took()
    first = drive.round(0)
    drive.complete("sent", 0)
    assert drive.hands.released == [first.buffer] and drive.course.delivered == 64 * PAYLOAD
    assert drive.took() == [("announce", 4)]


def test_many_clients_are_told_of_a_round_that_is_in_no_hurry_when_another_one_was_sent():
    drive = Drive(5000, kmcast.MANY).start()
    drive.fill_all()
    for number in range(4):
        drive.complete("announce", number)
    drive.send()
    drive.took()
    drive.complete("sent", 0)
    drive.fill_all()
    assert drive.took() == [], "three others are to be sent before it"
    drive.send()
    assert drive.took() == [("sent", 1)]
    drive.send()
    assert drive.took() == [("sent", 2), ("announce", 4)]


@pytest.mark.parametrize("windows, expected", [([4], 4), ([2], 2), ([1, 4], 1), ([9, 3], 3), ([8, 8], 4)])
def test_no_more_rounds_are_under_way_than_the_smallest_window(windows, expected):
    drive = Drive(5000, len(windows), windows).start()
    drive.fill_all()
    assert drive.took() == [("announce", number) for number in range(expected)]


def test_a_window_is_that_of_who_is_here():
    drive = Drive(5000, 2, [4, 2]).start()
    drive.fill_all()
    assert len(drive.took()) == 2
    drive.leave(1)
    drive.fill_all()
    assert len(drive.took()) == 2


def test_what_is_missing_comes_by_tcp_and_the_round_is_through_after_it():
    drive = Drive(64, 2).start()
    drive.complete("announce", 0)
    drive.send()
    drive.took()
    drive.complete("sent", 0, {1: [3, 9]})
    repair, = drive.hands.steps
    assert (repair.kind, list(repair.coded), repair.message) == ("repair", [], b"")
    assert drive.took() == [("repair", 0)] and drive.send() is None
    assert drive.course.by_tcp == 2 and drive.hands.room, "the line is left to these"
    drive.complete("repair", 0)
    assert drive.course.idle


def coded_drive(packets=5000):
    """A Drive where round 2, of 256 packets, has been multicast."""
    drive = Drive(packets, 10).start()
    drive.fill_all()
    for number in range(3):
        drive.complete("announce", number)
        assert drive.send() == (number, 64 << number, False)
    for number in range(2):
        drive.complete("sent", number)
    drive.fill_all()
    drive.took()
    return drive


LOSSES = dict((client, list(range(client, 256, 50))) for client in range(10))


def test_a_repair_pass_comes_before_the_next_round():
    drive = coded_drive()
    drive.complete("announce", 3)
    drive.complete("sent", 2, LOSSES)
    repair = drive.hands.steps[0]
    assert repair.kind == "repair" and set(repair.coded) == set(drive.members)
    combinations = max(map(len, LOSSES.values()))
    assert repair.message == WIRE.again(2, 0, 1, combinations)
    drive.took()
    assert drive.send() == (2, 1 + combinations, True)
    assert drive.took() == [("sent", 2)]
    assert drive.send() == (3, 512, False)


def test_a_pass_is_complete_when_both_again_and_what_it_brought_are_answered():
    drive = coded_drive()
    drive.complete("sent", 2, LOSSES)
    drive.send()
    drive.complete("repair", 2)
    assert drive.round(2)
    drive.complete("sent", 2)
    assert 2 not in [underway.round.number for underway in drive.course._underway]      # pylint: disable=protected-access


def test_repair_numbers_count_over_all_passes_and_there_are_three_for_a_round():
    drive = coded_drive()
    expected = 0
    for number in range(5):
        drive.complete("sent", 2, LOSSES)
        repair = [each for each in drive.hands.steps if each.kind == "repair"][-1]
        drive.took()
        if number < 3:
            assert kmcast.REPAIR.unpack(repair.message[5:])[0] == expected
            expected += drive.send()[1]
        else:
            assert (repair.coded, repair.message) == ((), b""), "then by TCP"
            break
        drive.complete("repair", 2)
    assert expected == drive.course.repair_number == drive.course.coded


def test_a_pass_never_goes_beyond_the_last_repair_number():
    drive = coded_drive()
    drive.course.repair_number = 2**31 - 10
    drive.complete("sent", 2, LOSSES)
    repair = [each for each in drive.hands.steps if each.kind == "repair"][-1]
    assert kmcast.REPAIR.unpack(repair.message[5:])[0] == 0


def test_who_has_left_is_not_repaired_for():
    drive = Drive(64, 2).start()
    drive.complete("announce", 0)
    drive.send()
    drive.roster.leave(drive.members[1])
    drive.took()
    drive.complete("sent", 0, {1: [3, 9]})
    assert drive.course.idle and drive.course.by_tcp == 0
    assert ("repair", 0) not in drive.took()


def test_the_last_word_comes_when_the_last_round_is_announced_and_it_is_over_when_that_is_said():
    drive = Drive(100, short=60).start()
    drive.fill_all()
    assert drive.took() == [("announce", 0), ("announce", 1), ("finish", None)]
    for number in range(2):
        drive.complete("announce", number)
        drive.send()
    for number in range(2):
        drive.complete("sent", number)
    assert drive.took() == [("sent", 0), ("sent", 1)] and not drive.course.over
    drive.complete("finish")
    assert not drive.course.over, "its clients are still here"
    drive.serve(0)
    assert drive.course.over and drive.course.delivered == 100 * PAYLOAD - 60


def test_the_last_word_is_not_said_while_a_round_waits_for_its_announcement():
    drive = Drive(1000, windows=[1]).start()
    drive.fill_all()
    for number in range(3):
        assert drive.took() == [("announce", number)]
        drive.complete("announce", number)
        drive.send()
        drive.took()
        drive.complete("sent", number)
        drive.fill_all()
    assert drive.took()[0] == ("announce", 3)


def test_an_image_of_nothing_has_no_rounds():
    with pytest.raises(kmcast.Failure):
        Drive(0).start()
    drive = Drive(0, allow_empty=True).start()
    assert drive.took() == [("finish", None)] and drive.send() is None
    assert len(drive.hands.released) == 1


def test_an_image_that_ends_with_a_full_buffer_ends_too():
    drive = Drive(64).start()
    drive.fill_all()
    assert drive.took() == [("announce", 0), ("finish", None)]


def test_the_base_protocol_never_has_two_rounds_under_way():
    drive = Drive(200, dialect=BASE_WIRE).start()
    for number in range(2):
        drive.fill_all()
        assert drive.took() == [("announce", number)] and drive.send() is None
        drive.complete("announce", number)
        assert drive.send() == (number, (64, 128)[number], False)
        drive.fill_all()
        assert drive.took() == [("sent", number)] and drive.send() is None
        drive.complete("sent", number, {0: [1]})
        assert drive.took() == [("repair", number)] and drive.send() is None
        drive.complete("repair", number)
    drive.fill_all()
    assert drive.took() == [("announce", 2)]
    drive.complete("announce", 2)
    drive.send()
    drive.took()
    drive.complete("sent", 2)
    assert drive.took() == [("announce", 3)], "a round of nothing ends the image"
    end = drive.round(3)
    assert (end.buffer.count, end.buffer.size) == (0, 0)
    drive.complete("announce", 3)
    assert drive.took() == [("finish", 3)] and drive.send() is None


def test_rounds_last_a_quarter_of_a_second_at_the_most_and_have_64_packets_at_least():
    for rate, most in ((1e6, 64), (20e6, 424), (1e12, 1000)):
        drive = Drive(10**5, rate=rate).start()
        for number in range(8):
            drive.fill_all()
            drive.complete("announce", number)
            count = drive.send()[1]
            drive.complete("sent", number)
        assert count == most


def test_rounds_do_not_cross_the_last_seq():
    class Late(kmcast.Course):
        FIRST_SEQ = 2**31 - 100
    known, kmcast.Course = kmcast.Course, Late
    try:
        drive = Drive(1000).start()
    finally:
        kmcast.Course = known
    drive.fill_all()
    assert [(drive.round(number).buffer.base, drive.round(number).buffer.count) for number in range(3)] == [
        (2**31 - 100, 64), (2**31 - 36, 36), (0, 72)]


def test_while_the_rate_is_unknown_little_is_under_way_unanswered():
    """Else a slow line would be buried before anybody could say so."""
    drive = Drive(10**5, rate="auto").start()
    drive.fill_all()
    for number in range(4):
        drive.complete("announce", number)
    for number, count in (0, 64), (1, 128), (2, 256):
        assert drive.send()[:2] == (number, count)
        assert drive.send() is None, "no more until all have answered"
        if number < 2:
            drive.complete("sent", number)
    drive.course.control.line = GB
    assert drive.send()[:2] == (3, 512), "now it is known"


def test_a_rate_that_the_user_sets_needs_no_slow_start():
    drive = Drive(10**5, rate=GB).start()
    drive.fill_all()
    for number in range(4):
        drive.complete("announce", number)
    assert [drive.send()[0] for _ in range(4)] == [0, 1, 2, 3]


def test_with_unicast_nothing_is_multicast_and_all_rounds_go():
    drive = Drive(200, unicast=True).start()
    drive.complete("announce", 0)
    assert drive.send() == (0, 0, False)
    drive.complete("sent", 0, {0: list(range(64))})
    assert drive.took()[-1] == ("repair", 0) and drive.course.by_tcp == 64


def silence(drive, number):
    """Nobody hears a round."""
    answers = kmcast.Answers()
    for who in drive.members:
        answers.deaf.append(who)
        answers.requests[who] = wanted(*range(drive.round(number).buffer.count))
    drive.course.complete(kmcast.Step("sent", drive.round(number)), answers)
    while drive.course.busy:
        drive.course.work()


def test_where_nobody_hears_multicast_the_first_packets_go_out_to_see_whether_one_does():
    drive = Drive(1000, 2).start()
    drive.fill_all()
    for number in range(4):
        drive.complete("announce", number)
    drive.send()
    silence(drive, 0)
    assert drive.course.multicasting, "once may be chance"
    assert drive.send() == (1, 128, False)
    silence(drive, 1)
    assert not drive.course.multicasting and drive.took()[-1] == ("repair", 1)
    assert drive.send() == (2, 16, False)
    drive.complete("sent", 2, {0: list(range(16, 256)), 1: list(range(16, 256))})
    assert drive.course.multicasting
    assert drive.send() == (3, 512, False)


def waited(until, busy=None):
    """Drive two clients through a round with nothing to multicast behind it: the first pays at 11 s, the second at `until`."""
    drive = Drive(64, 2).start()
    drive.fill_all()
    drive.complete("announce", 0)
    drive.send()
    assert drive.send() is None
    answers = kmcast.Answers()
    answers.paid(drive.members[0], 11.0)
    answers.paid(drive.members[1], until, busy)
    drive.course.complete(kmcast.Step("sent", drive.round(0)), answers)
    return drive


def test_who_alone_is_waited_for_is_known_while_there_is_nothing_to_multicast():
    drive = waited(13.0)
    assert drive.members[1].waited == {"output": 2.0} and drive.members[0].waited == {}


@pytest.mark.parametrize("busy, cause", [("writing", "output"), (None, "silence")])
def test_who_says_nothing_for_long_is_not_blamed_for_its_disk(busy, cause):
    """It was stopped, perhaps; who is held up by its output says so."""
    drive = waited(20.0, busy)
    assert drive.members[1].waited == {cause: 9.0}


def held_up(again, rounds):
    """A transfer that node1 alone keeps below the least rate, for so many rounds of a second."""
    drive = Drive(10**5, 2, windows=[1, 1], min_rate=GB, again=again, capacity=100).start()
    slow = drive.members[1]
    for number in range(rounds):
        drive.fill_all()
        drive.complete("announce", number)
        drive.send()
        assert drive.send() is None
        answers = kmcast.Answers()
        for who in drive.members:
            answers.heard(kmcast.Reception(1.0, 0.0, 0.0, who))
        answers.paid(drive.members[0], drive.hands.clock)
        drive.hands.clock += 1.0
        answers.paid(slow, drive.hands.clock)
        drive.course.complete(kmcast.Step("sent", drive.round(number)), answers)
    return drive, slow


def test_a_client_that_alone_keeps_the_transfer_below_the_least_rate_is_condemned_where_nothing_can_be_read_again():
    assert held_up(False, 9)[1].sentence is None
    drive, slow = held_up(False, 12)
    assert "below 1 Gbit/s" in slow.sentence and drive.members[0].sentence is None


def set_aside():
    """A Drive where node1 was set aside, and has left."""
    drive, slow = held_up(True, 4)
    assert slow.aside and slow.sentence and ("sentences", None) in drive.took(), "its thread looks at once"
    slow.who = "01" * 16
    drive.leave(1, slow.sentence)
    return drive, slow


def test_else_it_is_set_aside_and_gets_the_rest_when_nobody_else_lacks_anything():
    drive, slow = set_aside()
    back = drive.come("again", who=slow.who, seek=True, have=held((0, 64)))
    assert back.aside and back.waits and not drive.roster.away
    rest = [(start, count, who.replace("node1", "")) for start, count, who in drive.bring()]    # what was under way is for both
    assert not back.aside and not back.waits
    both = [who for _, _, who in rest]
    assert both == sorted(both, reverse=True) and set(both) == {"node0", "again"}, "one after the other"
    assert rest[-1][0] + rest[-1][1] == 10**5
    assert [start for start, _, who in rest if who == "again"][0] == 64


@pytest.mark.parametrize("comes", [True, False])
def test_who_was_set_aside_has_some_time_to_come_back_when_nobody_else_is_here(comes):
    drive, slow = set_aside()
    drive.bring()
    drive.serve(0)
    assert not drive.course.over
    drive.hands.clock += drive.course.RETURN - 1
    if comes:
        drive.come("node1", who=slow.who, seek=True)
        drive.bring()
    drive.hands.clock += 1
    drive.course.look(drive.hands.clock)
    assert drive.course.over != comes and not drive.roster.away


def one_far_slower(min_rate=10e6):
    """A Drive with --rate auto, of which the first rounds have told that node1 alone takes 2 Mbit/s."""
    drive = Drive(10**5, 3, rate="auto", min_rate=min_rate, again=True).start()
    for number in range(6):
        drive.fill_all()
        drive.complete("announce", number)
        sending = drive.course.next()
        drive.hands.clock += 0.1
        sending.underway.round.tail = sending.speed.rate
        drive.course.sent(sending)
        answers = kmcast.Answers()
        for place, line in ((0, 1e8), (1, 2e6), (2, 1e8)):
            answers.heard(kmcast.Reception(min(1.0, line / sending.underway.round.tail), 0.0, 0.0, drive.members[place]))
        drive.course.complete(kmcast.Step("sent", sending.underway.round), answers)
    assert drive.course.control.line == pytest.approx(2e6, rel=0.06)
    return drive


def test_whose_line_alone_is_slower_than_the_least_rate_is_set_aside_though_all_answer_in_time():
    for drive, aside in ((one_far_slower(), True), (one_far_slower(1e6), False)):
        assert not drive.members[1].aside, "it may be a hiccup"
        drive.hands.clock += drive.course.ENDURANCE
        drive.course.look(drive.hands.clock)
        assert [who.aside for who in drive.members] == [False, aside, False]


def test_those_who_were_set_aside_are_brought_to_at_their_rate_when_the_rounds_of_the_others_are_through():
    drive = passes(rate="auto").start()
    brought_to_all_there(drive, 3)
    drive.fill_all()
    drive.course._slowest = 2e6         # pylint: disable=protected-access
    slow = drive.come("slow", seek=True, aside=True)
    drive.course.window = 4
    drive.complete("announce", 3)
    before = drive.course.rate
    drive.send()
    drive.fill_all()
    drive.complete("announce", 4)
    assert not slow.aside and drive.send() is None and drive.course.rate == before
    drive.complete("sent", 3)
    assert drive.course.next().speed.rate == 2e6


def test_when_the_slowest_has_left_the_rate_is_sought_anew_in_the_midst_of_a_round():
    drive = one_far_slower(0)
    drive.fill_all()
    drive.complete("announce", 6)
    sending = drive.course.next()
    before = sending.speed.rate
    drive.course.min_rate = 5e7
    drive.leave(1)
    assert before < 2.2e6 and sending.speed.rate == 5e7 and drive.course.control.line is None
    sending.underway.round.tail = 3e6
    drive.course.sent(sending)
    drive.members.pop(1)
    drive.complete("sent", 6, reception=0.1)
    assert drive.course.rate == 5e7, "what was sent at the old rate tells nothing"


def test_the_rate_stays_when_another_one_than_the_slowest_leaves():
    drive = one_far_slower(0)
    drive.leave(2)
    assert drive.course.control.line == pytest.approx(2e6, rel=0.06)


# ---------------------------------------------------------------------------------------------------------------------
# Passes: parts of 64, 100, 100, 36 packets

def passes(packets=300, **options):
    """A Drive of an image that can be read again, to node0, with one round under way at a time."""
    options.setdefault("places", 9)
    return Drive(packets, windows=options.pop("windows", [1]), capacity=100, again=True, **options)


def brought_to_all_there(drive, rounds):
    """Bring so many rounds of the first pass."""
    for number in range(rounds):
        drive.fill_all()
        drive.complete("announce", number)
        drive.send()
        drive.complete("sent", number)


def held(*ranges):
    """Ranges, in packets."""
    return kmcast.Held([(start * PAYLOAD, stop * PAYLOAD) for start, stop in ranges])


def test_who_comes_late_takes_part_from_the_next_round_and_gets_the_beginning_in_another_pass():
    drive = passes().start()
    brought_to_all_there(drive, 1)
    drive.fill_all()
    drive.come("late", seek=True)
    assert drive.bring() == [(64, 100, "node0"), (164, 100, "latenode0"), (264, 36, "latenode0"),
                             (0, 64, "late"), (64, 100, "late")]
    finished = [[who.host for who in step.audience] for step in drive.hands.steps if step.kind == "finish"]
    assert finished == [["node0"], ["late"]], "nobody waits for another one"


def test_the_digest_of_a_round_is_that_of_its_place_in_every_pass():
    drive = passes().start()
    brought_to_all_there(drive, 4)
    drive.fill_all()
    drive.come("late", seek=True)
    drive.bring()
    assert drive.hands.digests == [0, 1, 2, 3, 0, 1, 2, 3]


def test_an_output_that_takes_rounds_in_order_waits_for_the_next_pass():
    drive = passes().start()
    brought_to_all_there(drive, 1)
    drive.fill_all()
    pipe = drive.come("pipe")
    assert pipe.waits
    assert drive.bring() == [(64, 100, "node0"), (164, 100, "node0"), (264, 36, "node0"),
                             (0, 64, "pipe"), (64, 100, "pipe"), (164, 100, "pipe"), (264, 36, "pipe")]
    assert not pipe.waits


@pytest.mark.parametrize("prefix, place", [(64, 64), (100, 64), (164, 164)])
def test_an_output_in_order_that_is_back_goes_on_where_it_stood(prefix, place):
    """Be it in the middle of a round, as another server may have cut the image elsewhere."""
    drive = passes().start()
    brought_to_all_there(drive, 1)
    drive.fill_all()
    drive.come("pipe", have=held((0, prefix)))
    brought = drive.bring()
    assert [start for start, _, who in brought if "pipe" in who] == [start for start in (64, 164, 264) if start >= place]


def test_who_is_back_gets_what_it_lacks_and_nothing_else():
    drive = passes().start()
    brought_to_all_there(drive, 4)
    drive.fill_all()
    drive.come("back", seek=True, have=held((0, 100), (170, 300)))
    assert drive.bring() == [(64, 100, "back"), (164, 100, "back")]


def test_who_has_everything_is_told_so_at_once():
    drive = passes().start()
    brought_to_all_there(drive, 4)
    drive.fill_all()
    drive.took()
    back = drive.come("back", seek=True, have=held((0, 300)))
    assert [(step.kind, set(step.audience)) for step in drive.hands.steps] == [("finish", {back})]


def test_a_pass_brings_what_any_of_those_present_lacks_to_all_who_lack_it():
    drive = passes().start()
    brought_to_all_there(drive, 4)
    drive.fill_all()
    drive.come("a", seek=True, have=held((64, 300)))
    drive.come("b", seek=True, have=held((0, 64)))
    drive.come("c", seek=True, have=held((0, 264)))
    drive.come("d", have=held((0, 264)))
    assert drive.bring() == [(0, 64, "a"), (64, 100, "b"), (164, 100, "b"), (264, 36, "bcd")]


def test_what_nobody_lacks_is_read_but_not_sent():
    """As its digest, and where it is cut, must be known for those behind."""
    drive = passes()
    drive.members[0].seek, drive.members[0].have = True, held((0, 200))
    drive.start()
    assert drive.bring() == [(164, 100, "node0"), (264, 36, "node0")]
    assert len(drive.hands.released) == 4 and sorted(drive.hands.digests) == [0, 1, 2, 3], "no buffer is used before it is hashed"


def test_the_first_rounds_that_are_sent_are_short_however_much_was_read_before_them():
    """As nobody knows yet what the lines carry: of a server that was started again, say."""
    drive = Drive(9000, capacity=1000, again=True, rate="auto")
    drive.members[0].seek, drive.members[0].have = True, held((0, 5000))
    drive.start()
    drive.fill_all()
    first = drive.course._underway[0].round         # pylint: disable=protected-access
    assert first.place <= 5000 * PAYLOAD < first.place + first.buffer.size and first.buffer.count <= 128
    assert len(drive.hands.released) < 10, "what nobody lacks is read in large parts"


def test_who_lacks_after_all_what_it_had_gets_it_again_even_when_it_was_told_that_all_was_well():
    drive = passes().start()
    brought_to_all_there(drive, 4)
    drive.fill_all()
    assert ("finish", None) in drive.took()
    drive.members[0].seek = True
    drive.roster.news.append(("lacks", drive.members[0], held((70, 71))))
    drive.course.hear()
    assert drive.bring() == [(64, 100, "node0")]
    assert ("finish", None) in drive.took()


def test_what_a_client_lacks_after_all_counts_before_the_start_too():
    drive = passes()
    drive.members[0].seek, drive.members[0].have = True, held((0, 300))
    drive.roster.news.append(("lacks", drive.members[0], held((70, 71))))
    drive.course.hear()
    drive.start()
    assert drive.bring() == [(64, 100, "node0")]


def test_who_lacks_what_cannot_be_read_again_is_dropped():
    drive = passes()
    drive.roster.again = False
    drive.start()
    brought_to_all_there(drive, 2)
    drive.roster.news.append(("lacks", drive.members[0], held((0, 1))))
    drive.course.hear()
    assert drive.members[0].sentence


def test_nobody_can_lack_the_same_again_and_again():
    drive = passes().start()
    drive.members[0].seek = True
    for _ in range(3):
        drive.bring()
        assert not drive.members[0].sentence
        drive.roster.news.append(("lacks", drive.members[0], held((0, 300))))
        drive.course.hear()
    assert drive.members[0].sentence


def test_it_is_over_when_all_places_are_served_or_nobody_has_come_for_as_long_as_it_lingers():
    for places, linger, over in ((1, 5.0, True), (2, 0, True), (2, 5.0, False), (1, kmcast.UNLIMITED, False)):
        drive = passes(places=places, linger=linger, more=linger == kmcast.UNLIMITED).start()
        drive.bring()
        drive.serve(0)
        assert drive.course.over == over, (places, linger)
        drive.hands.clock += 5.0
        drive.course.look(drive.hands.clock)
        assert drive.course.over == (linger < kmcast.UNLIMITED)


def test_who_comes_while_it_lingers_is_served_and_it_lingers_again():
    drive = passes(linger=5.0).start()
    drive.bring()
    drive.serve(0)
    drive.hands.clock += 4.0
    drive.come("late", seek=True)
    assert len(drive.bring()) == 4
    drive.hands.clock += 4.0
    drive.course.look(drive.hands.clock)
    assert not drive.course.over
    drive.serve(1)
    drive.hands.clock += 4.0
    drive.course.look(drive.hands.clock)
    assert not drive.course.over
    drive.hands.clock += 1.0
    drive.course.look(drive.hands.clock)
    assert drive.course.over


def test_what_those_who_are_gone_lack_is_not_brought():
    drive = passes().start()
    brought_to_all_there(drive, 2)
    late = drive.come("late", seek=True)
    drive.leave(0)
    drive.leave(1)
    assert drive.bring() == [(164, 100, "node0")], "which was under way"
    assert drive.course.deserted and drive.course.over and late.lacks == 300 * PAYLOAD


def test_a_part_that_does_not_fit_before_the_last_seq_begins_at_the_first():
    drive = passes().start()
    brought_to_all_there(drive, 4)
    drive.course._base = 2**31 - 10     # pylint: disable=protected-access
    drive.fill_all()
    drive.come("late", seek=True)
    drive.fill_all()
    assert drive.round(5).buffer.base == 0, "as if a round had been left out"


# ---------------------------------------------------------------------------------------------------------------------
# What is repaired by multicast

def plan(answers, count=1000, dialect=WIRE, multicasting=True):
    """What Course.plan() comes to for clients that asked for these places of a round: (groups, members)."""
    buffer = kmcast.Buffer(PAYLOAD, count)
    buffer.start(0, count, count * PAYLOAD)
    made = kmcast.Course(Hands(0), kmcast.Roster(1), dialect, PAYLOAD, 1000)
    made.multicasting = multicasting
    result = [], ()
    for result in made.plan(buffer, dict((who, wanted(*places))
                                         for who, places in answers.items())):
        pass
    return result


def test_different_losses_of_many_are_repaired_together():
    answers = dict((client, list(range(client, 1000, 50))) for client in range(10))
    groups, peers = plan(answers)
    assert len(groups) == 20 and sorted(peers) == list(range(10))
    for group in groups:
        assert len(group) == 10


@pytest.mark.parametrize("answers", [
    {}, {"a": [1, 2, 3]}, {"a": [1], "b": [2]}, {"a": list(range(16))}], ids=["nothing", "little", "one packet each", "16"])
def test_few_packets_are_repaired_by_tcp(answers):
    assert plan(answers) == ([], ())


def test_losses_that_cannot_be_combined_are_repaired_by_tcp():
    """A pass would be as long as what it replaces."""
    assert plan({"a": list(range(17)), "b": [17]}) == ([], ())
    assert len(plan({"a": list(range(17)), "b": list(range(17, 34))})[0]) == 17


def test_many_packets_of_a_client_alone_come_again_by_multicast():
    """Its line carries these as well as packets by TCP, at the rate that it is known to bear."""
    groups, peers = plan({"a": list(range(200))})
    assert sorted(groups) == [[place] for place in range(200)] and sorted(peers) == ["a"]


def test_who_lost_most_of_a_round_gets_it_by_tcp():
    answers = {"deaf": list(range(1000)), "a": list(range(0, 500, 5)), "b": list(range(1, 500, 5))}
    _, peers = plan(answers)
    assert sorted(peers) == ["a", "b"]


@pytest.mark.parametrize("options", [{"dialect": BASE_WIRE}, {"multicasting": False}],
                         ids=["base protocol", "no multicast"])
def test_without_a_session_or_multicast_all_is_repaired_by_tcp(options):
    assert plan({"a": list(range(0, 500, 5)), "b": list(range(1, 500, 5))}, **options) == ([], ())
