"""What a container's neighbours are told of its addresses, byte by byte, and that nothing goes wrong where there is nothing to tell."""

from __future__ import annotations

import ipaddress
import os
import struct

import pytest

from ckpt.host import announce, netns
from ckpt.host.netns import Address

HARDWARE = bytes.fromhex("02fc00000001")


def test_an_arp_announcement() -> None:
    sent = announce.frame(Address(2, HARDWARE, ipaddress.ip_address("10.77.0.60")))
    assert sent[:14].hex() == "ffffffffffff" + HARDWARE.hex() + "0806"
    # Ethernet, IPv4, request; sender and target are the same address (RFC 5227).
    assert sent[14:].hex() == "0001080006040001" + HARDWARE.hex() + "0a4d003c" + "000000000000" + "0a4d003c"


def test_a_neighbour_advertisement() -> None:
    own = ipaddress.IPv6Address("fd77::60")
    sent = announce.frame(Address(2, HARDWARE, own))
    assert sent[:14].hex() == "333300000001" + HARDWARE.hex() + "86dd"
    length, following, hops = struct.unpack_from("!HBB", sent, 18)
    assert (length, following, hops) == (32, 58, 255)
    assert sent[22:38] == own.packed and sent[38:54] == ipaddress.IPv6Address("ff02::1").packed
    body = sent[54:]
    assert (body[0], body[1], body[4:8].hex()) == (136, 0, "20000000")
    assert body[8:24] == own.packed and body[24:] == b"\x02\x01" + HARDWARE
    whole = sent[22:54] + struct.pack("!II", len(body), 58) + body
    total = sum(struct.unpack(f"!{len(whole) // 2}H", whole))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF, "the checksum does not fit"


def test_the_addresses_of_this_host() -> None:
    found = list(netns.addresses())
    loopback = [one for one in found if str(one.address) == "127.0.0.1"]
    assert [(one.prefix, one.hardware) for one in loopback] == [(8, b"")]


def test_nothing_is_told_of_our_own_network() -> None:
    told = announce.now(os.getpid())
    assert (told.sent, told.problem) == (0, "")


def test_nobody_there() -> None:
    assert announce.now(0).problem == ""
    assert "cannot be seen" in announce.now(1 << 30).problem
    assert "cannot be seen" in netns.settle("/nowhere", ["fd77::60"])


def test_what_breaks_inside_comes_out() -> None:
    with pytest.raises(KeyError), announce.during(os.getpid()):
        raise KeyError
