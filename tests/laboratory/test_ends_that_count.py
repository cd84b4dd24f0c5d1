"""The ends that decide: commands as producer and consumer, and who takes part."""

import time

import pytest

import helpers
from deployment import IMAGE, MIB, RATE, no_file, others


def test_command_as_producer(laboratory, deploy, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(IMAGE)
    run = deploy(laboratory(clients=2), IMAGE, ["--pipe", "cat '%s'" % image])
    run.finish()
    run.check_complete()


@pytest.mark.parametrize("command", ["cat '%s'; exit 7", "cat '%s'; kill -9 $$"])
def test_command_as_producer_fails(laboratory, deploy, tmp_path, command):
    """All bytes were there, but the command says that they are not the image: nobody reports success."""
    image = tmp_path / "image"
    image.write_bytes(IMAGE)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, ["--pipe", command % image], outputs=outputs)
    run.finish()
    run.check_server(1, *lab.clients)
    run.check_failed(*run.clients)
    no_file(outputs)
    for said in [run.server.stderr] + [client.stderr for client in run.clients]:
        assert "exit code 7" in said or "signal 9" in said, str(run)


def test_command_as_consumer(laboratory, deploy, tmp_path):
    """The server's exit code says that the commands have succeeded, not that the network has: it ends after them."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, clients=0, places=2)
    for number, host in enumerate(lab.clients):
        copy = tmp_path / str(number)
        command = "cat > '%s'; sleep 1; touch '%s.done'" % (copy, copy)
        run.add_client(host, ["--pipe", command], stdout=helpers.KEEP).output = str(copy)
    run.wait_end(run.server)
    done = sorted(tmp_path.glob("*.done"))
    run.finish()
    run.check_complete()
    assert len(done) == 2, str(run)


@pytest.mark.parametrize("command", ["cat > /dev/null; exit 7", "head -c 1000000 > /dev/null; exit 7", "exit 7"],
                         ids=["at the end", "in the middle", "at once"])
def test_command_as_consumer_fails(laboratory, deploy, command):
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE, RATE, clients=2, places=3)
    victim = run.add_client(lab.clients[2], ["--pipe", command], stdout=helpers.KEEP)
    run.finish()
    run.check_complete(*others(run, victim))
    run.check_server(3, victim.host)
    run.check_failed(victim)
    for said in (victim.stderr, run.server.stderr):
        assert "exit code 7: " + command in said, str(run)


# ---------------------------------------------------------------------------------------------------------------------
# Who takes part

def test_start_without_those_that_never_come(laboratory, deploy):
    """Three places, two clients: when --start-wait is over it starts, and says in the end that one never came."""
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, ["--start-wait", "2", "--min-clients", "2"], places=3)
    run.finish()
    run.check_complete(*run.clients)
    run.check_server(3)
    assert "never came" in run.server.stderr, str(run)


def test_start_waits_for_the_least_number(laboratory, deploy):
    """--start-wait is over, but fewer than --min-clients are there; the one that comes then starts it."""
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE[:MIB], ["--start-wait", "1", "--min-clients", "2"], clients=1, places=3)
    run.server.wait_stderr("is here")
    time.sleep(2)
    assert run.clients[0].consumer.size == 0, str(run)
    run.add_client(lab.clients[1])
    run.finish()
    run.check_complete(*run.clients)
    run.check_server(3)


def test_start_at_once_when_all_are_there(laboratory, deploy):
    lab = laboratory(clients=2)
    run = deploy(lab, IMAGE, ["--start-wait", "60", "--min-clients", "1"])
    run.finish(30)
    run.check_complete()


def test_start_with_places_of_two_tcp_threads_empty(laboratory, deploy):
    """The chain of threads is cut short where nobody came."""
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE[:MIB], ["--start-wait", "2", "--clients-per-thread", "2"], places=9)
    run.finish()
    run.check_complete(*run.clients)
    run.check_server(3)


def test_one_client_too_many(laboratory, deploy):
    """It is told why it is refused, and exits 3: nothing was written, it can fall back."""
    lab = laboratory(clients=3)
    run = deploy(lab, IMAGE, RATE, clients=2)
    run.wait_received(100000)
    late = run.add_client(lab.clients[2], ["--wait", "0"])
    run.finish()
    run.check_complete(*others(run, late))
    run.check_server(3)
    assert late.code == 3 and late.consumer.size == 0 and "refused" in late.stderr, str(run)
