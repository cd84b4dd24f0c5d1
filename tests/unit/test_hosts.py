"""The list of hosts: who is meant by a name, who is missing, who is not invited."""

import pytest

import kmcast


def client(host, address="10.0.0.9"):
    member = kmcast.Member(address, 0.0)
    member.host = host
    return member


def roster(text, more=False, **options):
    hosts = kmcast.HostList(text)
    return kmcast.Roster(len(hosts.names), hosts=hosts, more=more, **options)


def come(taking_part, host, address="10.0.0.9"):
    """A client comes; returns why it is refused, None if it is not."""
    member = client(host, address)
    reason = taking_part.why_not(member=member)
    if not reason:
        taking_part.admit(member)
    return reason


@pytest.mark.parametrize("name, host, address", [
    ("node1", "node1", "10.0.0.1"), ("node1", "NODE1", "10.0.0.1"), ("Node1", "node1.example.org", "10.0.0.1"),
    ("node1.example.org", "node1", "10.0.0.1"), ("node1.example.org.", "node1.example.org", "10.0.0.1"),
    ("10.0.0.1", "whatever", "10.0.0.1"), ("10.0.0.1", None, "10.0.0.1"), ("  node1\t# rack 7", "node1", "10.0.0.1")])
def test_a_host_is_known_by_its_name_short_or_full_or_by_its_address(name, host, address):
    taking_part = roster("# rack 7\n\n%s\nother\n" % name)
    assert come(taking_part, host, address) is None
    assert taking_part.missing == ["other"] and not taking_part.begin(0.0)
    assert come(taking_part, "other") is None and taking_part.begin(0.0)


@pytest.mark.parametrize("name, host, address", [
    ("node1", "node2", "10.0.0.1"), ("node1.example.org", "node1.example.net", "10.0.0.1"), ("node1", "node10", "10.0.0.1"),
    ("10.0.0.1", "node1", "10.0.0.10"), ("node1", None, "10.0.0.1")])
def test_another_host_is_not_invited(name, host, address):
    taking_part = roster(name)
    assert come(taking_part, host, address) == kmcast.UNINVITED
    assert taking_part.missing == [name]


def test_more_lets_the_others_in_and_does_not_wait_for_them():
    taking_part = roster("node1\nnode2", more=True)
    assert come(taking_part, "guest", "10.0.0.7") is None and come(taking_part, "guest2", "10.0.0.8") is None
    assert not taking_part.begin(0.0) and taking_part.places == 4
    assert come(taking_part, "node2") is None and come(taking_part, "node1") is None
    assert taking_part.begin(0.0) and len(taking_part.everyone) == 4


def test_full_names_that_share_the_short_one_are_two_hosts():
    taking_part = roster("node1.a.org\nnode1.b.org")
    assert come(taking_part, "node1.b.org", "10.0.0.2") is None
    assert taking_part.missing == ["node1.a.org"]
    assert come(taking_part, "node1", "10.0.0.1") is None and taking_part.missing == []


def test_a_second_host_of_the_same_name_is_told_which_one_came_first():
    taking_part = roster("localhost\nnode2")
    assert come(taking_part, "localhost", "10.0.0.1") is None
    assert "localhost (10.0.0.1)" in come(taking_part, "localhost", "10.0.0.2")


def test_who_left_is_missing_again():
    taking_part = roster("node1\nnode2")
    assert come(taking_part, "node1") is None
    taking_part.leave(taking_part.here[0])
    assert taking_part.missing == ["node1", "node2"]
    assert come(taking_part, "node1", "10.0.0.44") is None and taking_part.missing == ["node2"]


def test_a_host_that_is_twice_on_the_list_is_one():
    hosts = kmcast.HostList("node1\nNODE1\nnode1.example.org\n10.0.0.1\n10.0.0.1\n")
    assert hosts.names == ["node1", "10.0.0.1"] and hosts.twice == ["NODE1", "node1.example.org", "10.0.0.1"]
    taking_part = roster("10.0.0.1\nnode1\nnode2")
    for _ in range(2):                          # it comes, goes and comes again
        assert come(taking_part, "node1", "10.0.0.1") is None
        assert taking_part.missing == ["node2"] and taking_part.places == 2
        taking_part.leave(taking_part.here[0])


def test_after_start_wait_those_who_did_not_come_are_known():
    taking_part = roster("node1\nnode2\nnode3", start_by=5.0)
    assert come(taking_part, "node2") is None and not taking_part.begin(5.0)
    assert taking_part.begin(5.1) and taking_part.missing == ["node1", "node3"] and taking_part.places == 3
    assert come(taking_part, "node1") == kmcast.NO_WAY_BACK and come(taking_part, "guest") == kmcast.UNINVITED
    taking_part.again = True
    assert come(taking_part, "node1") is None and taking_part.missing == ["node3"]


def test_all_are_served_when_each_name_of_the_list_is():
    """However often one of them comes."""
    taking_part = roster("node1\nnode2", start_by=0.0, more=True)
    taking_part.again = True
    come(taking_part, "node1")
    assert taking_part.begin(0.1)
    for host in ("guest", "node1", "node2"):
        assert not taking_part.all_served
        if host != "node1":
            come(taking_part, host)
        member = taking_part.here[0]
        member.outcome = "complete"
        taking_part.leave(member)
        if host == "guest":
            assert come(taking_part, "node1") is None, "again"
    assert taking_part.served == 3
    while taking_part.here:
        taking_part.here[0].outcome = "complete"
        taking_part.leave(taking_part.here[0])
    assert taking_part.all_served and taking_part.missing == []


@pytest.mark.parametrize("text, said", [
    ("", "names no host"), ("# nobody\n", "names no host"), ("a\n10.0.0.1 node1\n", "line 2: 10.0.0.1 node1"),
    ("10.0.0.300", "line 1"), ("a\n\nb;c", "line 3"), ("10.0.0.0/24", "line 1")])
def test_a_list_that_is_none_is_wrong_usage(text, said):
    with pytest.raises(kmcast.Failure) as error:
        kmcast.HostList(text, "hosts.txt")
    assert error.value.code == kmcast.USAGE and error.value.reason.startswith("hosts.txt") and said in error.value.reason


def test_a_thousand_hosts_are_found_one_by_one():
    taking_part = roster("\n".join("node%d.example.org" % number for number in range(1000)))
    for number in range(999, -1, -1):
        assert come(taking_part, "node%d" % number, "10.0.%d.%d" % divmod(number, 250)) is None
    assert taking_part.begin(0.0)
