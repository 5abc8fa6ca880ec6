"""Encrypted, attested links between two ends: a Noise handshake, then evidence sealed to its hash.

    errors.py    the tree of errors
    address.py   tcp://host:port and vsock://cid:port
    codec.py     messages ⇄ bytes: a strict subset of msgpack
    aead.py      ChaCha20-Poly1305, by one of two libraries
    kem.py       ML-KEM-768
    noise.py     the Noise handshake and cipher states
    records.py   records, and the messages that they carry
    session.py   an established link
    link.py      one end of a link: handshake, evidence, session; without I/O, as all above
    sockets.py   sockets, deadlines, and the system's errors
    channel.py   a link over a socket
    liveness.py  signs of life while an answer is due
    relay.py     passes bytes between two addresses, blindly

This package knows bytes and nothing of what they mean; of `attest` it takes the interface only.
"""
