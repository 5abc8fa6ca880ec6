"""The client's process: runs orders, each with a pipeline of its own, and says what came of it. Lines of JSON.

    order     {"manifest": path, "ids": [[…], …], "max_tokens": n, "repeat": n, "asks": n, "fork": [[…], …],
               and the options of Pipeline.connect: "retry_for" is 0 unless given, for an attack is on one link}
    answer    {"tokens": [[…], …], "whole": bool, "error": null | [kind, text, exit code], "seconds": s}

One request for each list of ids, all of them "repeat" times, on one link. Before them, as many questions for the
stages' status as "asks" says, each of which is a record each way on every link. After the first request, "fork" forks
the process; the child makes the requests listed there on the pipeline that it inherits, and its tokens are the first
of the answer's. With --plain it speaks without
encryption: what a search of captured traffic must find, is found in that.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minigpt

PLAIN = """
from transport.aead import Cipher
Cipher.encrypt = lambda self, n, ad, plaintext: bytes(plaintext) + bytes(16)
Cipher.decrypt = lambda self, n, ad, ciphertext: bytes(ciphertext)[:-16]
"""


def run(order: dict[str, Any]) -> dict[str, Any]:
    """What comes of one order."""
    requests, most = order.pop("ids") * order.pop("repeat", 1), order.pop("max_tokens")
    asks = order.pop("asks", 0)
    path, sampling = order.pop("manifest"), order.pop("sampling", {})
    forked = order.pop("fork", [])
    if order.get("client_key"):
        order["client_key"] = bytes.fromhex(order["client_key"])
    tokens: list[list[int]] = []
    error, whole, began = None, False, time.monotonic()
    try:
        with minigpt.Pipeline.connect(path, **{"retry_for": 0} | order) as pipeline:
            for _ in range(asks):
                pipeline.status()
            for number, ids in enumerate(requests):
                tokens.append([])
                for token in pipeline.generate(ids, max_tokens=most, **{"draft": 0} | sampling):
                    tokens[-1].append(token.id)
                if forked and number == 0:
                    tokens[:0] = in_a_fork(pipeline, forked, most)
        whole = True
    except Exception as caught:  # whatever it is, it is what the user sees
        error = [type(caught).__name__, str(caught), getattr(caught, "exit_code", None)]
    return {"tokens": tokens, "whole": whole, "error": error, "seconds": time.monotonic() - began}


def in_a_fork(pipeline: minigpt.Pipeline, requests: list[list[int]], most: int) -> list[list[int]]:
    """What a forked child is given for these requests, on the pipeline that this process has open."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            told = [[token.id for token in pipeline.generate(ids, max_tokens=most, draft=0)] for ids in requests]
            os.write(writing, json.dumps(told).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = json.loads(pipe.read() or b"[]")
    os.waitpid(child, 0)
    return told


def main() -> None:
    if "--plain" in sys.argv:
        exec(PLAIN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may come between the answers
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
