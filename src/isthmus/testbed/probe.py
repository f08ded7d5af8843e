"""What runs inside a device to measure it: a script started as a file, since importing isthmus takes time.

``probe.py listen ADDRESS PORT`` answers one connection after the other: a line of JSON says what to do.
``probe.py gemm`` multiplies matrices in one group after the other, as the lines of JSON on its input say.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time
from pathlib import Path

PORT = 45713
MESSAGE_BYTES = 64
_WARM_UP_S = 0.2
_MATRIX_SIZE = 512


def listen(address: str, port: int) -> None:
    """Serves until it is killed. Prints a line when it is ready."""
    with socket.create_server((address, port)) as server:
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                serve(connection)


def serve(connection: socket.socket) -> None:
    """One request: receive and say how fast, send, send back what comes, or exchange messages with another device."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = json.loads(read_line(connection))
    if request["do"] == "receive":
        answer(connection, received_bits_per_s(connection))
    elif request["do"] == "send":
        send_for(connection, request["seconds"], request["buffer_bytes"])
    elif request["do"] == "echo":
        while message := connection.recv(MESSAGE_BYTES):
            connection.sendall(message)
    elif request["do"] == "exchange":
        answer(connection, round_trip_s(request["address"], request["count"]))


def read_line(connection: socket.socket) -> bytes:
    """The bytes up to the line's end, and not one more."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError(f"probe: the connection ended after {line!r}, wanted a line")
        line += byte
    return line


def read_message(connection: socket.socket) -> None:
    """Waits for all bytes of a message."""
    num_missing = MESSAGE_BYTES
    while num_missing:
        data = connection.recv(num_missing)
        if not data:
            raise ConnectionError(f"probe: the connection ended {num_missing} bytes before a message's end")
        num_missing -= len(data)


def answer(connection: socket.socket, value: float) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def ask(connection: socket.socket, **request: object) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(json.dumps(request).encode() + b"\n")


def send_for(connection: socket.socket, seconds: float, buffer_bytes: int) -> None:
    """Sends zeros for so long, then says that it is the end. With a small buffer it does not go on for much longer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    zeros = bytes(min(1 << 16, buffer_bytes))
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        connection.sendall(zeros)
    connection.shutdown(socket.SHUT_WR)


def received_bits_per_s(connection: socket.socket) -> float:
    """Payload from the end of the warm-up, which empties the link's bucket, to the end of what is sent."""
    buffer = bytearray(1 << 18)
    num_bytes, begins_at, last_at = 0, None, 0.0
    warm_at = None
    while count := connection.recv_into(buffer):
        last_at = time.monotonic()
        warm_at = warm_at or last_at + _WARM_UP_S
        if begins_at is None:
            begins_at = last_at if last_at >= warm_at else None
        else:
            num_bytes += count
    return 8 * num_bytes / (last_at - begins_at) if begins_at is not None and last_at > begins_at else 0.0


def round_trip_s(address: str, count: int) -> float:
    """Median of small messages there and back."""
    message = bytes(MESSAGE_BYTES)
    seconds = []
    with socket.create_connection((address, PORT), timeout=30) as connection:
        ask(connection, do="echo")
        for _ in range(count):
            started = time.perf_counter()
            connection.sendall(message)
            read_message(connection)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def gemm() -> None:
    """Loads PyTorch once, at full speed; then enters one device after the other and prints what it computes there."""
    import torch

    left = torch.rand(_MATRIX_SIZE, _MATRIX_SIZE)
    right = torch.rand(_MATRIX_SIZE, _MATRIX_SIZE)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request["num_threads"])
        for group in request["groups"]:
            Path(group, "cgroup.procs").write_text("0")
        for _ in range(3):
            torch.mm(left, right)
        num_products, started, computed_s = 0, time.monotonic(), time.process_time()
        while time.monotonic() - started < request["seconds"]:
            torch.mm(left, right)
            num_products += 1
        took_s = time.monotonic() - started
        flops = 2 * _MATRIX_SIZE**3 * num_products / took_s
        print(json.dumps({"gemm_flops": flops, "cpu_share": (time.process_time() - computed_s) / took_s}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "gemm":
        gemm()
    else:
        listen(sys.argv[2], int(sys.argv[3]))
