"""The recipes of README do what README says, as they stand there: each is run from its text.

A recipe is a block of shell behind a paragraph that starts with a bold title. What is changed of its text: how many hosts
there are, and the name of a disk. What is not real: docker, firewall-cmd, and the disk, which is a file behind a loop device.
"""

import io
import os
import re
import shutil
import signal
import subprocess

import pytest

import helpers
from pythons import NEWEST

IMAGE = helpers.random_bytes(1000000, seed=20)
BIN = "/usr/local/bin/"

#: A file system of its own for a host: ours, of which it changes a copy.
MOUNT = """
set -e
mkdir "$0/upper" "$0/work" "$0/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$0/upper,workdir=$0/work" "$0/root"
for name in proc dev sys; do mount --rbind "/$name" "$0/root/$name"; done
echo ready
exec sleep 1000
"""

DOCKER = """#!/bin/sh
echo "$@" >> /root/docker.log
case $1 in
    save) shift; echo "images: $@" ;;
    load) cat > /root/loaded ;;
    run) ;;
    *) exit 1 ;;
esac
"""

FIREWALL_CMD = """#!/bin/sh
# Keeps what is permanent; --reload lets nothing else in.
for option; do
    case $option in
        --permanent) ;;
        --add-port=*/*) port=${option#*=}; echo "${port#*/} dport ${port%/*} accept" >> /root/firewall ;;
        --add-protocol=*) echo "ip protocol ${option#*=} accept" >> /root/firewall ;;
        --reload) sed 's/^/add rule inet filter input /' /root/firewall | nft -f - ;;
        *) echo "firewall-cmd: $option?" >&2; exit 2 ;;
    esac
done
"""

#: What a host with a firewall has before anybody asks for more.
CLOSED = """nft -f - <<END
table inet filter {
    chain input { type filter hook input priority 0; policy drop; ct state established,related accept; iif lo accept; }
}
END"""


# ---------------------------------------------------------------------------------------------------------------------
# The text

def recipes():
    """{title: [block of shell]} of README."""
    with io.open(os.path.join(helpers.ROOT, "README.md"), encoding="utf-8") as file:
        text = file.read()
    result, title = {}, None
    for heading, bold, block in re.findall(r"^(?:##+ ([^\n]*)|\*\*([^\n]+?)[.]?\*\*[^\n]*|```(?:sh|ini)\n(.*?)^```)$", text, re.MULTILINE | re.DOTALL):
        if block:
            result.setdefault(title, []).append(block)
        else:
            title = heading or bold
    return result


RECIPES = recipes()
FOLLOWED = set()


def lines_of(title):
    """The lines of a recipe's blocks, each a command."""
    return [line for line in "".join(RECIPES.get(title, ())).replace("\\\n", " ").splitlines() if line]


def recipe(*titles):
    """Mark a test of recipes: it gets the `lines` of each."""
    FOLLOWED.update(titles)
    return pytest.mark.parametrize("lines", [lines_of(title) for title in titles], ids=titles)


def for_hosts(line, count):
    """A line for the server with another number of hosts."""
    line = re.sub(r"\b(kmcast (?:server|check) .*(?:auto|eth1|10\.0\.0\.1)) \d+", r"\1 %d" % count, line)
    return line.replace("--min-clients 30", "--min-clients 1")


def test_each_recipe_of_readme_is_run_here():
    assert set(RECIPES) == FOLLOWED


# ---------------------------------------------------------------------------------------------------------------------
# The hosts

class Machine:
    """A host of the laboratory with a file system of its own, whose root is `root` as seen from here."""

    def __init__(self, host, directory, address, interface):
        self.host, self.address = host, address
        directory.mkdir()
        self._holder = host.popen(["unshare", "--mount", "sh", "-c", MOUNT, str(directory)], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
        if self._holder.stdout.readline() != b"ready\n":
            pytest.skip("no overlay file system here: %s" % self._holder.communicate()[1].decode("utf-8", "replace"))
        self._directory = "%s/root" % directory
        self.root = "/proc/%d/root%s" % (self._holder.pid, self._directory)
        commands = ["link set eth0 down", "link set eth0 name " + interface] if interface != "eth0" else []
        for command in commands + ["addr flush dev " + interface, "link set %s up" % interface,
                                   "addr add %s/24 broadcast + dev %s" % (address, interface),
                                   "route replace default dev " + interface]:
            host.run(["ip"] + command.split())

    def path(self, name):
        """Where a file of its own is for us."""
        return self.root + name

    def put(self, name, data, mode=0o644):
        """Write a file."""
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "wb") as file:
            file.write(data if isinstance(data, bytes) else data.encode("ascii"))
        os.chmod(self.path(name), mode)

    def get(self, name):
        """The content of a file, None if there is none."""
        try:
            with open(self.path(name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def start(self, script):
        """Start a line of shell, as root in /root; returns the Process."""
        return helpers.start(self.host.command([
            "nsenter", "--mount=/proc/%d/ns/mnt" % self._holder.pid, "chroot", self._directory, "/bin/sh", "-c",
            "cd /root || exit; " + script]), env={"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"})

    def run(self, script):
        """Run it to its end, which must be good; returns its output."""
        code, stderr, stdout = self.start(script).finish(60)
        assert code == 0, stderr
        return stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The path of a kmcast.pyz, into which what Python would make of it at each start is put as well."""
    path = tmp_path_factory.mktemp("packed") / "kmcast.pyz"
    subprocess.check_call(["sh", os.path.join(helpers.ROOT, "build_pyz.sh"), str(path)])
    subprocess.check_call([NEWEST, "-c", COMPILE, helpers.KMCAST, str(path)])
    return path


COMPILE = """
import py_compile, sys, zipfile
source, archive = sys.argv[1:]
if sys.version_info >= (3, 7):
    py_compile.compile(source, archive + "c", invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    with zipfile.ZipFile(archive, "a") as file:
        file.write(archive + "c", "__main__.pyc")
"""


@pytest.fixture
def machines(laboratory, packed, tmp_path):
    """A function that builds a server, 10.0.0.1, and clients, each a Machine with kmcast and the stand-ins."""
    def build(clients=2, interface="eth0", **options):
        lab = laboratory(clients=clients, **options)
        made = [Machine(host, tmp_path / host.name, "10.0.0.%d" % number, interface if number == 1 else "eth0")
                for number, host in enumerate(lab.hosts, 1)]
        for machine in made:
            machine.put(BIN + "kmcast", packed.read_bytes(), 0o755)
            machine.put(BIN + "python3", '#!/bin/sh\nexec %s "$@"\n' % NEWEST, 0o755)
            machine.put(BIN + "docker", DOCKER, 0o755)
            machine.put(BIN + "firewall-cmd", FIREWALL_CMD, 0o755)
        made[0].put("/root/image.tgz", IMAGE)
        made[0].lab = lab
        return made
    return build


def follow(hosts, on_server, on_each, codes=None):
    """Run a line on the server and one on each host to their ends; returns [(stderr, stdout)] of all, the server first."""
    processes = [hosts[0].start(for_hosts(on_server, len(hosts) - 1))] + [host.start(on_each) for host in hosts[1:]]
    ends = [process.finish(60) for process in processes]
    assert [end[0] for end in ends] == (codes or [0] * len(hosts)), "\n".join(end[1] for end in ends)
    return [end[1:] for end in ends]


def check_image(*hosts):
    """Each has the image."""
    for host in hosts:
        same = host.get("/root/image.tgz") == IMAGE
        assert same, host.address


def heard(ends):
    """No client had to do without multicast."""
    assert not [stderr for stderr, _ in ends if "multicast does not reach" in stderr or "no client receives" in stderr], ends


# ---------------------------------------------------------------------------------------------------------------------
# The recipes

@recipe("In five minutes")
def test_in_five_minutes(lines, machines):
    hosts = machines()
    for name in ("build_pyz.sh", "kmcast.py"):
        with open(os.path.join(helpers.ROOT, name), "rb") as file:
            hosts[0].put("/root/" + name, file.read())
    os.unlink(hosts[0].path(BIN + "kmcast"))
    build, install, on_server, on_each = lines
    hosts[0].run(build + " && " + install)
    heard(follow(hosts, on_server, on_each))
    check_image(*hosts)


@recipe("Without waiting for stragglers", "Leave room for others", "A lowest rate", "To go on where it broke off")
def test_options_of_the_server(lines, machines):
    hosts = machines()
    heard(follow(hosts, *lines))
    check_image(*hosts)


def one_after_the_other(server, hosts, on_each):
    """Each host's client comes when the one before has the image; then the server is told to end, and does so well."""
    for host in hosts:
        code, stderr, _ = host.start(on_each).finish(60)
        assert code == 0, stderr
    server.signal(signal.SIGTERM)
    code, stderr, _ = server.finish(60)
    assert code == 0, stderr


@recipe("Hosts that come when they come")
def test_hosts_that_come_when_they_come(lines, machines):
    hosts = machines(clients=3)
    one_after_the_other(hosts[0].start("exec " + for_hosts(lines[0], 1)), hosts[1:3], lines[1])
    check_image(*hosts[:3])


@recipe("The same as a service")
def test_the_same_as_a_service(lines, machines):
    """As systemd would run it; what systemd thinks of the unit is asked, too."""
    hosts = machines()
    hosts[0].put("/srv/image.tgz", IMAGE)
    hosts[0].put("/etc/systemd/system/kmcast.service", "\n".join(lines) + "\n")
    if shutil.which("systemd-analyze"):
        checked = hosts[0].start("systemd-analyze verify /etc/systemd/system/kmcast.service").finish(60)
        assert "kmcast.service" not in checked[1], checked[1]
    command, = [line[len("ExecStart="):] for line in lines if line.startswith("ExecStart=")]
    one_after_the_other(hosts[0].start("exec " + for_hosts(command, 1)), hosts[1:], "kmcast client -o image.tgz auto 10.0.0.1")
    check_image(*hosts)


@recipe("On by HTTP when it fails")
def test_on_by_http_when_it_fails(lines, machines):
    """No server ever comes."""
    hosts = machines()
    hosts[0].run("mkdir -p /srv/www && tar cf /srv/www/images.tar image.tgz")
    web = hosts[0].start("exec python3 -m http.server 80 --directory /srv/www")
    hosts[0].run("until grep -q ':0050 00000000:0000 0A' /proc/net/tcp; do sleep 0.1; done")      # it listens on port 80
    try:
        for host in hosts[1:]:
            host.run("mkdir /srv/images && " + lines[1].replace("--wait 600", "--wait 1"))
            same = host.get("/srv/images/image.tgz") == IMAGE
            assert same, host.address
    finally:
        web.stop()


@recipe("A pipe, kept for who comes late")
def test_a_pipe_kept_for_who_comes_late(lines, machines):
    hosts = machines()
    follow(hosts, *lines)
    assert [host.get("/root/loaded") for host in hosts[1:]] == 2 * [b"images: nova-api nova-compute\n"]
    assert hosts[0].get("/var/tmp/images.tar") == b"images: nova-api nova-compute\n"


@recipe("Docker images")
def test_docker_images(lines, machines):
    hosts = machines()
    follow(hosts, *lines)
    for host in hosts[1:]:
        assert host.get("/root/loaded") == b"images: nova-api nova-compute\n" and host.get("/root/docker.log") == b"load\n"


@recipe("Straight into tar")
def test_straight_into_tar(lines, machines):
    hosts = machines()
    hosts[0].put("/srv/www/index", IMAGE)
    for host in hosts[1:]:
        host.run("mkdir -p /srv")
    follow(hosts, *lines)
    assert [host.get("/srv/www/index") == IMAGE for host in hosts] == [True] * 3


@pytest.fixture
def disk(tmp_path):
    """A disk that holds nothing: the path of a loop device."""
    (tmp_path / "disk").write_bytes(bytes(4 << 20))
    made = subprocess.run(["losetup", "-f", "--show", str(tmp_path / "disk")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    if made.returncode:
        pytest.skip("no loop device to be had: " + made.stdout.strip())
    yield made.stdout.strip()
    helpers.stop_all()
    subprocess.check_call(["losetup", "-d", made.stdout.strip()])


def onto(disk, hosts, lines):
    """Follow a recipe for disks; returns what is on the disk of the only host."""
    follow(hosts, *[line.replace("/dev/sdX", disk) for line in lines])
    with open(disk, "rb") as file:
        return file.read(len(IMAGE))


@recipe("Onto a disk")
def test_onto_a_disk(lines, machines, disk):
    hosts = machines(clients=1)
    hosts[0].put("/root/disk.img", IMAGE)
    same = onto(disk, hosts, lines) == IMAGE
    assert same


@recipe("Onto a disk, packed")
def test_onto_a_disk_packed(lines, machines, disk):
    """What it refuses: tests/end_to_end/test_recipes.py."""
    hosts = machines(clients=1)
    hosts[0].put("/root/disk.img", IMAGE)
    hosts[0].run("gzip disk.img")
    same = onto(disk, hosts, lines) == IMAGE
    assert same


@recipe("These hosts and no others")
def test_these_hosts_and_no_others(lines, machines):
    hosts = machines(clients=3)
    hosts[0].put("/root/hosts.txt", "# rack 1\nnode1\n%s\n" % hosts[2].address)
    stranger = hosts[3].start(lines[1])
    server = hosts[0].start(lines[0])
    code, stderr, _ = stranger.finish(60)
    assert code == 3 and "not on the list" in stderr, stderr
    clients = [host.start(lines[1]) for host in hosts[1:3]]
    assert [process.finish(60)[0] for process in clients + [server]] == [0, 0, 0]
    check_image(*hosts[:3])


@recipe("This image and no other")
def test_this_image_and_no_other(lines, machines):
    hosts = machines(clients=1)
    hosts[1].put("/root/image.sha256", hosts[0].run("sha256sum image.tgz"))
    follow(hosts, *lines)
    check_image(*hosts)
    hosts[1].put("/root/image.sha256", "%064d  image.tgz\n" % 0)
    os.unlink(hosts[1].path("/root/image.tgz"))
    follow(hosts, *lines, codes=[1, 1])
    assert hosts[1].get("/root/image.tgz") is None


@recipe("A rehearsal")
def test_a_rehearsal(lines, machines):
    hosts = machines()
    ends = follow(hosts, lines[0].replace("--minutes 10", "--minutes 0.05"), lines[1])
    assert "multicast works for 2 of 2 clients" in ends[0][0]
    assert [host.get("/root/image.tgz") for host in hosts[1:]] == [None, None]


def share(hosts, name):
    """Bring a file of the server's to all hosts, as `scp -p` does."""
    for host in hosts[1:]:
        host.put(name, hosts[0].get(name), 0o600)


@recipe("With a key")
def test_with_a_key(lines, machines):
    hosts = machines()
    make, on_server, on_each = lines
    hosts[0].run(make)
    share(hosts, "/root/kmcast.key")
    heard(follow(hosts, on_server, on_each))
    check_image(*hosts)


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
@recipe("Encrypted")
def test_encrypted(lines, machines):
    """What is on the wire is looked at in tests/end_to_end/test_recipes.py."""
    hosts = machines()
    make, on_server, on_each = lines
    hosts[0].run(lines_of("With a key")[0] + " && " + make)
    for name in ("/root/kmcast.key", "/root/image.secret"):
        share(hosts, name)
    follow(hosts, on_server, on_each)
    check_image(*hosts)


@recipe("Only from these networks")
def test_only_from_these_networks(lines, machines):
    hosts = machines()
    heard(follow(hosts, *lines))
    check_image(*hosts)
    elsewhere = lines[0].replace("10.0.0.0/24", "10.0.2.0/24")
    server = hosts[0].start(for_hosts(elsewhere, 1))
    code, _, _ = hosts[1].start(lines[1].replace("client", "client --wait 0", 1)).finish(60)
    assert code == 3
    server.stop()


@recipe("Jumbo frames")
def test_jumbo_frames(lines, machines):
    hosts = machines(interface="eth1", mtu=9000)
    heard(follow(hosts, lines[0].replace("server", "server -v", 1), lines[1]))
    check_image(*hosts)


@recipe("Without multicast")
def test_without_multicast(lines, machines):
    hosts = machines(clients=3)
    stderr, _ = follow(hosts, *lines)[0]
    assert "from client to client" in stderr, stderr
    check_image(*hosts)


@recipe("A relay to another segment")
def test_a_relay_to_another_segment(lines, machines):
    """The relay has a second interface, which is the only way to its hosts."""
    server, relay, near, far = machines(clients=3)
    switch = ["nsenter", "--net=/run/netns/" + server.lab.switch, "ip"]
    for command in ("link add br1 type bridge mcast_snooping 0", "link set br1 up",
                    "link add second type veth peer name eth1 netns " + relay.host.namespace, "link set second master br1 up",
                    "link set %s nomaster" % far.host.port, "link set %s master br1" % far.host.port):
        subprocess.check_call(switch + command.split())
    for machine, command in ((relay, "link set eth1 up"), (relay, "addr add 10.0.1.1/24 broadcast + dev eth1"),
                             (far, "addr flush dev eth0"), (far, "addr add 10.0.1.2/24 broadcast + dev eth0"),
                             (far, "route replace default dev eth0")):
        machine.host.run(["ip"] + command.split())
    on_server, on_relay, on_each = lines
    started = [server.start(for_hosts(on_server, 2)), relay.start(for_hosts(on_relay, 1)), far.start(on_each),
               near.start(on_each.replace("10.0.1.1", "10.0.0.1"))]
    assert [process.finish(60)[0] for process in started] == [0] * 4, [process.stderr for process in started]
    check_image(server, near, far)


@recipe("Clients of the C implementation")
def test_clients_of_the_c_implementation(lines, machines):
    """tests/base_peer.py is one."""
    hosts = machines(clients=2)
    base = helpers.start_base_client([hosts[2].address, "10.0.0.1", 18383], host=hosts[2].host)
    started = [hosts[0].start(for_hosts(lines[0], 2)), hosts[1].start(lines[1])]
    assert [process.finish(60)[0] for process in started] == [0, 0], [process.stderr for process in started]
    code, stderr, data = base.finish(60)
    assert code == 0 and data == IMAGE, stderr
    check_image(*hosts[:2])


def closed(hosts):
    """Close the firewalls of all hosts, and see that nothing gets through."""
    for host in hosts:
        host.run(CLOSED)
    server = hosts[0].start("kmcast server -q -i image.tgz auto 1")
    code, stderr, _ = hosts[1].start("kmcast client --wait 0 -o image.tgz auto 10.0.0.1").finish(60)
    assert code == 3 and "no kmcast server" in stderr, stderr
    server.stop()


def opened(hosts, lines):
    """Close the firewalls of all hosts, open them as a recipe says, and see that an image gets through."""
    closed(hosts)
    for host in hosts:
        host.run("\n".join(["set -e"] + lines))
    heard(follow(hosts, "kmcast server -i image.tgz auto 40", "kmcast client -o image.tgz auto 10.0.0.1"))
    check_image(*hosts)


@recipe("Firewalls")
def test_firewalls(lines, machines):
    opened(machines(), lines)


@recipe("Firewalls, with nftables")
def test_firewalls_with_nftables(lines, machines):
    """Also for the chain."""
    hosts = machines()
    opened(hosts, lines)
    stderr, _ = follow(hosts, "kmcast server --unicast -i image.tgz auto 40", "kmcast client -o image.tgz auto 10.0.0.1")[0]
    assert "from client to client" in stderr and "open TCP port" not in stderr, stderr
    check_image(*hosts)


@recipe("A report and a page")
def test_a_report_and_a_page(lines, machines):
    hosts = machines()
    on_server, on_each, page = lines
    follow(hosts, on_server, on_each)
    hosts[0].run(page)
    assert b"2 of 2 hosts have the image" in hosts[0].get("/root/report.html")
    assert b"2 of 2 clients have the image" in hosts[0].get("/root/kmcast.log")


@recipe("The digest")
def test_the_digest(lines, machines):
    hosts = machines(clients=1)
    server = hosts[0].start("kmcast server -i image.tgz auto 1 2> kmcast.log")
    hosts[1].run("\n".join(["set -e"] + lines))
    assert server.finish(60)[0] == 0
    hosts[0].run(lines[1])
    hosts[1].run("echo more >> image.tgz; ! " + lines[1])


@recipe("The same options for all")
def test_the_same_options_for_all(lines, machines):
    hosts = machines()
    export, on_server, on_each = lines
    follow(hosts, export + "; " + on_server, export + "; " + on_each)
    check_image(*hosts)
    assert all(host.get("/var/log/kmcast.log") for host in hosts)


# ---------------------------------------------------------------------------------------------------------------------
# Kickstart and Kolla

def post():
    """The %post of the kickstart."""
    text, = RECIPES["Kickstart, with the central registry to fall back to"]
    return re.search(r"^%post[^\n]*\n(.*)^%end$", text, re.MULTILINE | re.DOTALL).group(1)


def kolla(machines, full=()):
    """Follow the recipes for Kolla with two hosts, of which those numbers have a full disk; returns the machines, and what the
    server said: (stdout, stderr)."""
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    (on_server, on_each), hosts = RECIPES["Kolla"], machines(interface="eth1")
    shutil.copy(hosts[0].path(BIN + "kmcast"), hosts[0].path("/root/kmcast.pyz"))
    hosts[0].start("exec %s -m http.server 80" % NEWEST)
    hosts[0].put("/srv/kolla/registry/layer", IMAGE)
    for host in hosts[1:]:
        os.unlink(host.path(BIN + "kmcast"))
    for number in full:
        hosts[number].put(BIN + "tar", "#!/bin/sh\nhead -c 100000 > /var/lib/kolla-images/part\nexit 2\n", 0o755)
    server = hosts[0].start(for_hosts(on_server.replace("\\\n", " "), 2))
    installing = [host.start("until curl -sf http://10.0.0.1/ > /dev/null; do sleep 0.1; done\n" + post()) for host in hosts[1:]]
    for process in installing:
        assert process.finish(60)[0] == 0, process.stderr
    code, stderr, stdout = server.finish(60)
    assert code == 0, stderr                    # of the echo
    for host in hosts[1:]:
        host.run(on_each)
    return hosts, stdout.decode("ascii"), stderr


@recipe("Kolla")
def test_kolla(lines, machines):
    hosts, stdout, _ = kolla(machines)
    assert stdout == "exit code 0\n"
    for host in hosts[1:]:
        assert host.get("/etc/kolla-registry") == b"registry=127.0.0.1:4000\n"
        assert host.get("/var/lib/kolla-images/registry/layer") == IMAGE
        assert host.get("/root/loaded") == b"images: registry:2\n"
        assert b"-p 127.0.0.1:4000:5000 -v /var/lib/kolla-images/registry" in host.get("/root/docker.log")


@recipe("Kickstart, with the central registry to fall back to")
def test_a_kickstart_that_gets_no_images_falls_back(lines, machines):
    """And the server lists it."""
    hosts, stdout, stderr = kolla(machines, full=[2])
    assert stdout == "exit code 3\n" and "node2 (10.0.0.3) does not have the image" in stderr, stderr
    assert [host.get("/etc/kolla-registry") for host in hosts[1:]] == [b"registry=127.0.0.1:4000\n", b"registry=10.0.0.1:4000\n"]
    assert hosts[1].get("/root/docker.log") and not hosts[2].get("/root/docker.log")
    assert not os.path.exists(hosts[2].path("/var/lib/kolla-images"))
