"""A client that begins TLS, with the certificates of tests/nbd/pki.py."""

import ssl

from tests.nbd.harness import RawClient
from zramd.nbd import wire


def trusting(place, *, named="client", version=None):
    """A client's context, of what a directory has."""
    context = ssl.create_default_context(cafile=place / "ca-cert.pem")
    if (place / f"{named}-cert.pem").exists():
        context.load_cert_chain(place / f"{named}-cert.pem", place / f"{named}-key.pem")
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


def begin(address):
    """A client that has asked for TLS, and was told to begin."""
    client = RawClient(address, None)
    client.receive(18)
    client.send(wire.CLIENT_FLAGS.pack(3) + wire.pack_option(wire.NBD_OPT_STARTTLS))
    assert option_reply(client) == (wire.NBD_OPT_STARTTLS, wire.NBD_REP_ACK, b"")
    return client


def secure(address, context):
    """A client that goes on in TLS."""
    client = begin(address)
    client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
    return client


def option_reply(client):
    magic, option, reply, length = wire.OPTION_REPLY.unpack(client.receive(20))
    assert magic == wire.NBD_OPT_REPLY_MAGIC
    return option, reply, client.receive(length)


def go(client):
    """Through what is left of the handshake."""
    client.send(wire.pack_option(wire.NBD_OPT_GO, wire.pack_go("", ())))
    while (got := option_reply(client))[1] == wire.NBD_REP_INFO:
        pass
    assert got[:2] == (wire.NBD_OPT_GO, wire.NBD_REP_ACK)
