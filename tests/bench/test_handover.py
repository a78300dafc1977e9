from __future__ import annotations

from baton.bench.handover import Layout, measure


async def test_all_bytes_cross_in_every_round() -> None:
    speed = await measure(Layout(layers=3, blocks=5, block_bytes=4096), rounds=2)
    assert speed.bytes == 3 * 5 * 4096
    assert speed.handover > 0 and speed.memcpy > 0
