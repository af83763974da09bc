"""An engine core that runs no model, as a program: `python -m tests.server.fake_core --input … --output …`.

Emits tokens 300, 301, … one per request and step, `--pause` seconds apart. Speaks the messages of the real one.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time

import msgspec
import zmq

from shoal.config.engine_config import EngineConfig
from shoal.engine.parent import end_with_parent
from shoal.messages import (
    AbortRequests,
    AddRequest,
    ClientMessage,
    CoreOutputs,
    CoreReady,
    EngineStats,
    Shutdown,
    StartupProgress,
    TokenDelta,
    Utility,
    UtilityResult,
)
from shoal.types import FinishReason


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--input")
    parser.add_argument("--output")
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    arguments = parser.parse_args()
    config = EngineConfig.from_json(sys.stdin.buffer.readline())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    endpoints = [arguments.input, arguments.output]
    threading.Thread(target=end_with_parent, args=(endpoints,), daemon=True).start()
    context = zmq.Context()
    receiver, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    receiver.connect(arguments.input)
    sender.connect(arguments.output)
    decoder, encoder = msgspec.msgpack.Decoder(ClientMessage), msgspec.msgpack.Encoder()
    sender.send(encoder.encode(StartupProgress("load weights", 1, 2)))
    time.sleep(arguments.load_seconds)
    info = {"device": "no device", "dtype": "float32", "kv_cache_bytes": 1 << 20}
    sender.send(encoder.encode(CoreReady(config.generation, config.max_model_len, 65, config.block_size, info)))
    running: dict[str, list[int]] = {}
    while True:
        while receiver.poll(0 if running else 50):
            match decoder.decode(receiver.recv()):
                case AddRequest(request):
                    running[request.request_id] = [len(request.emitted_token_ids), request.sampling.max_tokens or 1]
                case AbortRequests(request_ids):
                    for request_id in request_ids:
                        running.pop(request_id, None)
                case Utility(call_id):
                    sender.send(encoder.encode(UtilityResult(call_id, EngineStats())))
                case Shutdown():
                    context.destroy(linger=500)
                    return
        deltas = []
        for request_id, progress in list(running.items()):
            delta = TokenDelta(request_id, [300 + progress[0] % 50])
            progress[0] += 1
            if progress[0] == progress[1]:
                delta.finish_reason = FinishReason.LENGTH
                del running[request_id]
            deltas.append(delta)
        if deltas:
            sender.send(encoder.encode(CoreOutputs(config.generation, deltas)))
            time.sleep(arguments.pause)


if __name__ == "__main__":
    main()
