"""The fixtures of the laboratory tests; see deployment.py."""

import os

import pytest

import helpers
import lab as laboratories
from deployment import Deployment


@pytest.fixture
def laboratory():
    """A function that builds a laboratory with `clients` hosts beside the server, in wire mode, for this one test."""
    built = []

    def build(clients=4, **options):
        lab = laboratories.Laboratory(clients=clients, **options)
        lab.build()
        built.append(lab)
        return lab

    yield build
    for lab in built:
        lab.demolish()


@pytest.fixture
def deploy(laboratory, request):
    """A function that starts a server and clients; what was checked at its end is said at the top of this file.

    lab          the Laboratory
    data         the image, bytes
    server_args  options of the server
    client_args  options of every client; or a function of the client's number, from 0, that returns them
    clients      how many clients, one a host; None: on every host, 0: the test adds them itself
    places       how many the server waits for; None: as many
    stdin        what the server reads if not `data` all at once: as for helpers.Process, but it must give `data`
    outputs      a directory: the clients write to `image-N` there with -o; None: a Consumer reads from each
    consumers    a Consumer for each client, None: a plain one each
    client_python, server_python   interpreters; the former may be a list, used in turn
    on_server    the Host that the server runs on, if not lab.server
    server       a dict of further options of helpers.start_server(): env, prefix… and `start`, another start function

    Returns the Deployment.
    """
    deployments = []

    def start(lab, data, server_args=(), client_args=(), clients=None, places=None, stdin=None, outputs=None,
              consumers=None, client_python=None, server_python=None, port=18383, on_server=None, server=None,
              client=None):
        hosts = lab.clients if clients is None else lab.clients[:clients]
        options = dict(server or {})
        options["python"] = server_python or helpers.newest()
        run = Deployment(lab, data, server_args, port, len(hosts) if places is None else places,
                         on_server or lab.server, stdin, options)
        deployments.append(run)
        pythons = client_python if isinstance(client_python, (list, tuple)) else [client_python]
        for number, host in enumerate(hosts):
            run.add_client(host, client_args(number) if callable(client_args) else client_args,
                           consumer=consumers[number] if consumers else "keep",
                           output=outputs and os.path.join(str(outputs), "image-%d" % number),
                           python=pythons[number % len(pythons)], server=on_server, **(client or {}))
        return run

    yield start
    for run in deployments:
        print("-- deployment --\n%s" % run)     # shown by pytest when the test has failed
    for run in deployments:
        for made in run.clients:
            if made.consumer:
                made.consumer.pace = None
                made.consumer.go_on()
            if made.code == 0:
                made.finish(10)
        run.check_invariant()
