"""The table of latencies for links over tcp and over vsock, side by side in one kernel. Run by hand:

    python tests/system/uml/guest.py python tests/system/uml/bench.py --runs 10

A user-mode Linux has one processor and slow system calls: compare the rows with each other, and with nothing else.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the tests' helpers
sys.path.append(str(Path(__file__).resolve().parents[3]))

from places import SCHEMES, anywhere
from processes import Stages

import minigpt
from attest import AcceptUnattested, Unattested
from minigpt.cli import bench
from minigpt.client.pipeline import Pipeline
from transport.channel import Channel
from transport.link import CLIENT, End
from transport.sockets import Listener

TINY = Path(minigpt.__file__).parent / "data"
PROMPT = "The capital of France is"
STEP = {"hidden": bytes(3072)}  # a token of GPT-2 small
WARM = 100  # round trips that do not count


def started(stack: ExitStack, scheme: str, split: str) -> Pipeline:
    """A pipeline of stage processes whose links are of this kind."""
    places = []
    for _ in split.split("+"):
        with Listener(anywhere(scheme)) as listener:
            places.append(str(listener.address))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    stages = stack.enter_context(Stages(TINY, split, folder, model="tiny", places=places))
    for index in reversed(range(len(places))):
        stages.start(index, "--listen", places[index])
    return stack.enter_context(Pipeline.connect(stages.path, allow_mock=True))


def latencies(runs: int, tokens: int) -> str:
    """Markdown: one row for each kind of link, the runs interleaved."""
    with ExitStack() as stack:
        pipelines = {f"2, {scheme}": started(stack, scheme, "6+6") for scheme in SCHEMES}
        results: dict[str, list[bench.Run]] = {name: [] for name in pipelines}
        for number in range(runs + 1):
            order = list(pipelines.items())
            for name, pipeline in order if number % 2 else reversed(order):
                run = bench.run_once(pipeline, PROMPT, tokens)
                if number:  # the first warms up
                    results[name].append(run)
    return bench.markdown(bench.summarise(results))  # type: ignore[arg-type]


def round_trip(scheme: str, count: int) -> float:
    """Microseconds that a message takes there and back, the median; both ends are threads of this process."""

    def answer() -> None:
        accepted = listener.accept()
        assert accepted is not None
        end = End(Unattested(), AcceptUnattested(), bytes(32), bytes(32), 0, CLIENT)
        with Channel.accept(accepted[0], end) as channel:
            for _ in range(WARM + count):
                channel.send(channel.receive(10.0))
            channel.receive(10.0)

    with Listener(anywhere(scheme)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        end = End(Unattested(), AcceptUnattested(), bytes(32), bytes(32), CLIENT, 0)
        channel = Channel.connect(listener.address, end)
        times = []
        for _ in range(WARM + count):
            began = time.perf_counter()
            channel.send(STEP)
            channel.receive(10.0)
            times.append(time.perf_counter() - began)
        channel.send({})
        channel.close()
        thread.join(10)
    return 1e6 * statistics.median(times[WARM:])


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--runs", type=int, default=10)
    options.add_argument("--max-tokens", type=int, default=20)
    chosen = options.parse_args()
    print(latencies(chosen.runs, chosen.max_tokens))
    print()
    for kind in SCHEMES:
        print(f"3072 bytes there and back over {kind}: {round_trip(kind, 1000):.0f} µs")
