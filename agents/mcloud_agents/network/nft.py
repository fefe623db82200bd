"""nftables through libnftables and its JSON language, in the calling thread's namespace.

Source: libnftables(3) and libnftables-json(5).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from mcloud_base.errors import Unavailable

_OUTPUT_JSON = 1 << 4
_FLEETING = re.compile(rb'"(handle|packets|bytes)": \d+')

_NETLINK_NETFILTER = 12
_GETGEN = 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
_REQUEST = 1  # NLM_F_REQUEST
_GEN_ID = 1  # NFTA_GEN_ID

Command = Mapping[str, Any]

_lock = threading.Lock()  # the library keeps some of its state for the whole process
_library: ctypes.CDLL | None = None


def _load() -> ctypes.CDLL:
    global _library
    if _library is None:
        library = ctypes.CDLL("libnftables.so.1")
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
            getattr(library, name).restype = ctypes.c_char_p
        library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        _library = library
    return _library


def run(commands: Sequence[Command]) -> list[dict[str, Any]]:
    """Run commands as one transaction: all of them, or none.

    Returns:
        What they print, without its first element, the library's version.

    Raises:
        Unavailable: PACKET_FILTER_REFUSED, with the library's message.
    """
    output = _run(commands)
    return list(json.loads(output)["nftables"][1:]) if output else []


def _run(commands: Sequence[Command]) -> bytes:
    text = json.dumps({"nftables": list(commands)}).encode()
    with _lock:
        library = _load()
        context = library.nft_ctx_new(0)  # its netlink socket belongs to the namespace of now
        try:
            library.nft_ctx_output_set_flags(context, _OUTPUT_JSON)
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            failed = library.nft_run_cmd_from_buffer(context, text)
            output = library.nft_ctx_get_output_buffer(context)
            error = library.nft_ctx_get_error_buffer(context)
        finally:
            library.nft_ctx_free(context)
    if failed:
        reason = error.decode(errors="replace").strip().splitlines()
        raise Unavailable(
            "PACKET_FILTER_REFUSED", f"nftables refused: {reason[0] if reason else 'no reason'}"
        )
    return output or b""


def list_table(family: str, name: str) -> list[dict[str, Any]]:
    """Return everything in a table; an empty list if there is no such table."""
    tables = run([{"list": {"tables": {"family": family}}}])
    if {"family": family, "name": name} not in [
        {key: item["table"][key] for key in ("family", "name")} for item in tables
    ]:
        return []
    return run([{"list": {"table": {"family": family, "name": name}}}])


def replace_table(family: str, name: str, content: Sequence[Command]) -> list[Command]:
    """Return the commands that put `content` in the place of a table, whether there is one."""
    table = {"table": {"family": family, "name": name}}
    return [{"add": table}, {"delete": table}, {"add": table}, *content]


def remove_table(family: str, name: str) -> list[Command]:
    """Return the commands that remove a table, whether there is one."""
    return replace_table(family, name, [])[:2]


def generation() -> int:
    """Return the number of transactions that the namespace's rulesets have seen, anybody's.

    Source: linux/netfilter/nf_tables.h, NFT_MSG_GETGEN and NFTA_GEN_ID.
    """
    request = struct.pack("=IHHII BBH", 20, _GETGEN, _REQUEST, 1, 0, 0, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
        kernel.send(request)
        answer = kernel.recv(4096)
    offset = 20
    while offset < len(answer):
        length, kind = struct.unpack_from("=HH", answer, offset)
        if kind == _GEN_ID:
            (number,) = struct.unpack_from(">I", answer, offset + 4)
            return int(number)
        offset += (length + 3) & ~3
    raise Unavailable("PACKET_FILTER_REFUSED", "the kernel does not count its rulesets")


def digest(commands: Sequence[Command]) -> str:
    """Return a fingerprint of commands."""
    return hashlib.sha256(json.dumps(commands, sort_keys=True).encode()).hexdigest()


def digest_tables(tables: Sequence[tuple[str, str]]) -> str:
    """Return a fingerprint of what the kernel has in tables (family, name).

    Handles and counters, which change by themselves, are left out: in the text, because taking
    a big ruleset apart takes longer than all the rest.
    """
    fingerprint = hashlib.sha256()
    for family, name in tables:
        try:
            listed = _run([{"list": {"table": {"family": family, "name": name}}}])
        except Unavailable:  # there is no such table
            listed = b""
        fingerprint.update(_FLEETING.sub(b"", listed) + b"\n")
    return fingerprint.hexdigest()
