"""NBD, the server's side and a small client: bytes in, bytes out, sockets only in `server`.

`wire` has the numbers, `negotiation` the handshake, `transmission` the requests and replies;
`connection` drives the two for one client, `server` listens. `client` does the other side's
handshake, for attaching the kernel. `address` says where, `stdio` is a client without an address,
and `tls` makes what TLS needs of files. The protocol is that of NetworkBlockDevice/nbd,
doc/proto.md; docs/nbd.md tells what of it there is.
"""
