"""What the server decides, by itself: who gets a place, who owes what, what is repaired how."""

import pytest

import kmcast


class Hands(object):
    """The hands of a Course that does nothing yet."""

    def fill(self, base, limit):
        self.filling = base, limit


def course(dialect=kmcast.SessionDialect, **options):
    return kmcast.Course(Hands(), kmcast.Roster(1), dialect, 1460, 1000, **options)


def member(host="node7", address="192.0.2.7"):
    made = kmcast.Member(address, 0.0)
    made.host = host
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

BUFFER = kmcast.Buffer(1460, 10)
BUFFER.start(100, 10, 14600)


def window(*members):
    made = kmcast.ServerWindow(kmcast.SessionDialect, 30.0)
    made.members += members
    return made


def announced(who):
    made = window(who)
    assert made.begin(kmcast.Step("announce", buffer=BUFFER, info=BUFFER.info(0)), 1.0) == [
        ("send", who, b"\x01" + BUFFER.info(0))]
    assert made.awaited() == [who]
    return made


def sent(who):
    made = announced(who)
    made.heard(who, kmcast.READY, 2.0)
    assert made.awaited() == [] and who.listening
    assert made.begin(kmcast.Step("sent", buffer=BUFFER, digest=b"d" * 32), 3.0) == [("send", who, b"\x08" + b"d" * 32)]
    return made


def request(*seqs):
    return kmcast.REQUEST + b"".join(kmcast.U32.pack(number) for number in (len(seqs),) + seqs)


def test_a_step_is_through_when_all_have_answered():
    who = member()
    made = sent(who)
    assert made.awaited() == [who]
    made.heard(who, kmcast.DONE, 4.0)
    assert made.awaited() == [] and made.requests() == {} and who.paid == 4.0


def test_what_is_asked_for_is_sent_as_packets_or_comes_again_by_multicast():
    who = member()
    made = sent(who)
    made.heard(who, request(103, 109), 4.0)
    assert made.requests() == {who: [3, 9]} and made.awaited() == []
    assert made.begin(kmcast.Step("again", buffer=BUFFER, coded=[who], message=b"m" * 12), 5.0) == [
        ("send", who, b"\x40" + b"m" * 12)]
    made.begin(kmcast.Step("sent", buffer=BUFFER, digest=b""), 6.0)
    made.heard(who, request(109), 7.0)
    assert made.begin(kmcast.Step("repair", buffer=BUFFER), 8.0) == [("packets", who, [9])]
    assert made.awaited() == [who]
    made.heard(who, kmcast.DONE, 9.0)
    assert made.awaited() == [] and (who.lost, who.by_tcp) == (3, 1)


@pytest.mark.parametrize("message", [kmcast.READY, kmcast.DONE, request(100)], ids=repr)
def test_what_is_not_owed_is_an_error(message):
    who = member()
    with pytest.raises(kmcast.ProtocolError):
        window(who).heard(who, message, 1.0)


@pytest.mark.parametrize("seq", [99, 110, 2**32 - 1])
def test_a_packet_outside_the_round_cannot_be_asked_for(seq):
    who = member()
    with pytest.raises(kmcast.ProtocolError):
        sent(who).heard(who, request(100, seq), 4.0)


def test_only_who_gets_nothing_done_has_stalled():
    who = member()
    made = announced(who)
    assert made.stalled(who, 0.0, 31.0) is None
    assert "ready for the next round" in made.stalled(who, 0.0, 31.1)
    assert made.stalled(who, 20.0, 31.1) is None, "its kernel took something"
    made.heard(who, kmcast.ALIVE, 30.0)
    assert made.stalled(who, 0.0, 59.0) is None
    made.heard(who, kmcast.SessionDialect.state(busy="writing"), 59.0)
    assert made.stalled(who, 0.0, 60.1), "words alone move nothing"


def test_signs_of_life_have_a_limit():
    who = member()
    made = announced(who)
    with pytest.raises(kmcast.ProtocolError):
        for _ in range(100):
            made.heard(who, kmcast.ALIVE, 10.0)


def test_a_client_says_what_it_is_busy_with():
    who = member()
    made = announced(who)
    made.heard(who, kmcast.SessionDialect.state(busy="writing", overflows=5), 2.0)
    assert who.busy == "writing" and who.figures == {"overflows": 5}
    with pytest.raises(kmcast.ProtocolError):
        made.heard(who, kmcast.SessionDialect.state(busy=7), 2.0)


# ---------------------------------------------------------------------------------------------------------------------
# What is repaired by multicast

def plan(answers, count=1000, dialect=kmcast.SessionDialect, multicasting=True):
    """Course.plan() for clients that asked for these places of a round."""
    buffer = kmcast.Buffer(1460, count)
    buffer.start(0, count, count * 1460)
    made = course(dialect)
    made.multicasting = multicasting
    return made.plan(buffer, answers)


def test_different_losses_of_many_are_repaired_together():
    answers = dict((client, list(range(client, 1000, 50))) for client in range(10))
    groups, peers = plan(answers)
    assert len(groups) == 20 and sorted(peers) == list(range(10))
    for group in groups:
        assert len(group) == 10


@pytest.mark.parametrize("answers", [
    {}, {"a": [1, 2, 3]}, {"a": list(range(200))}, {"a": [1], "b": [2]}],
    ids=["nothing", "little", "one client", "one packet each"])
def test_few_packets_or_one_client_are_repaired_by_tcp(answers):
    assert plan(answers) == ([], ())


def test_who_lost_most_of_a_round_gets_it_by_tcp():
    answers = {"deaf": list(range(1000)), "a": list(range(0, 500, 5)), "b": list(range(1, 500, 5))}
    _, peers = plan(answers)
    assert sorted(peers) == ["a", "b"]


@pytest.mark.parametrize("options", [{"dialect": kmcast.BaseDialect}, {"multicasting": False}],
                         ids=["base protocol", "no multicast"])
def test_without_a_session_or_multicast_all_is_repaired_by_tcp(options):
    assert plan({"a": list(range(0, 500, 5)), "b": list(range(1, 500, 5))}, **options) == ([], ())
