"""Messages between any two ranks: complete, in order, of any size, and at any time."""

from __future__ import annotations

from harness import free_port, run_ranks

SIZES = (0, 1, 7, 100_003, 0, 64)


def on_each_rank(rank, port):
    import os

    import torch

    from sps2_mega.comm.bridge import Bridge
    from sps2_mega.comm.channel import Message
    from sps2_mega.mcore.init import open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info = from_environment()
    store = open_store(info)
    bridge = Bridge.open(store, rank, info.world_size)
    got = [[], []]
    errors = []
    channels = [
        bridge.channel(
            on_message=lambda src, kind, detail, payload, number=number: got[number].append(
                (src, kind, detail, payload.tolist() if len(payload) < 100 else len(payload))
            ),
            on_error=errors.append,
            max_batches=limit,
        )
        for number, limit in enumerate((0, 2))
    ]
    others = [other for other in range(info.world_size) if other != rank]
    waited = []
    for number, channel in enumerate(channels):
        for detail, size in enumerate(SIZES):
            payload = torch.full((size,), 10 * rank + number, dtype=torch.uint8)
            batch = [Message(other, 5, detail, payload) for other in others]
            channel.post(batch, ready=lambda: waited.append(1))
    bridge.close()
    bridge.close()
    assert not errors
    assert len(waited) == 2 * len(SIZES)
    return got


def test_messages_of_all_ranks_and_channels_arrive_in_order():
    for rank, got in enumerate(run_ranks(on_each_rank, 3, free_port())):
        for number, messages in enumerate(got):
            for other in {0, 1, 2} - {rank}:
                value = 10 * other + number
                expected = [
                    (other, 5, detail, [value] * size if size < 100 else size)
                    for detail, size in enumerate(SIZES)
                ]
                assert [message for message in messages if message[0] == other] == expected
